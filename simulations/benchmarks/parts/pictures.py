"""The results as pictures: dots for the table, lines for a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbel.core.extras import extra

if TYPE_CHECKING:  # matplotlib takes seconds to load
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"cohort": "clients a round", "clients": "clients in the federation"}


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws ``result`` into ``folder``; the pictures' paths."""
    if result["sweep"]:
        return [_sweep(result, folder / f"engine-{result['sweep']}.png")]
    return [_dots(work, folder / f"engine-{work['name']}.png") for work in result["workloads"]]


def _dots(work: Mapping[str, Any], path: Path) -> Path:
    """Dots, since the axis is logarithmic and has no zero that a bar could stand on."""
    rows = [row for row in work["systems"] if "error" not in row]
    rows.sort(key=lambda row: row["seconds_per_round"])
    figure, axes = _figure(0.4 * len(rows) + 1.6)
    for place, row in enumerate(rows):
        color = "C0" if row["name"].startswith("umbel") else "C7"
        seconds = row["seconds_per_round"]
        axes.plot([min(row["repetitions"]), max(row["repetitions"])], [place] * 2, color, alpha=0.4)
        axes.plot([seconds], [place], "o", color=color)
        axes.annotate(
            f"{seconds:.3g} s", (seconds, place), (0, 6), textcoords="offset points", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    floor = work["floor"]["seconds"]
    if rows and floor > rows[0]["seconds_per_round"] / 30:
        label = f"its matrix products alone: {floor:.2g} s"
        axes.axvline(floor, color="C3", linestyle=":", label=label)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a round (line: from the fastest repetition to the slowest)")
    axes.set_title(f"{work['name']}: {work['title']}", fontsize=9)
    figure.savefig(path)
    return path


def _sweep(result: Mapping[str, Any], path: Path) -> Path:
    figure, axes = _figure(4.2)
    names = {row["name"]: row["title"] for w in result["workloads"] for row in w["systems"]}
    for place, (name, title) in enumerate(names.items()):
        points = [
            (work["value"], row["seconds_per_round"])
            for work in result["workloads"]
            for row in work["systems"]
            if row["name"] == name and "error" not in row
        ]
        axes.plot([n for n, _ in points], [s for _, s in points], f"C{place}.-", label=title)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(AXES[result["sweep"]])
    axes.set_ylabel("seconds a round")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)
    return path


def _figure(height: float) -> tuple[Figure, Axes]:
    with extra("plots", "pictures"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
