"""The curves of one or several runs as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from umbel.core.errors import InputError, suggest
from umbel.core.extras import extra
from umbel.server import summary
from umbel.server.database import translated
from umbel.server.entries import RunEntry

if TYPE_CHECKING:  # matplotlib takes seconds to load
    from matplotlib.axes import Axes

FORMATS = (".png", ".pdf", ".svg")


class Drawn(NamedTuple):
    """A run to draw: its entry and its records as plain values."""

    entry: RunEntry
    history: summary.History


def draw_run(runs: Sequence[Drawn], path: Path, metric: str | None = None) -> list[str]:
    """Draws metrics by round to ``path`` (png, pdf or svg) and returns their names.

    Without ``metric``: the first score (accuracy, say) above the loss, as far as the runs have
    them. The best round of each run is marked; means over the clients' training examples are
    dotted; the privacy spent is on an axis of its own.

    Raises:
        InputError: no such metric, nothing was evaluated, or ``path`` cannot be written.
    """
    with extra("plots", str(path)):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    check_format(path)
    names = _choose(runs, metric)
    height = 1.2 + 3.2 * len(names)
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    for name, axes in zip(names, panels, strict=True):
        _panel(axes, runs, name)
    _epsilon(panels[0], runs)
    panels[-1].set_xlabel("round")
    figure.suptitle(_title(runs), fontsize=12)
    with translated(path, "picture"):
        figure.savefig(path)
    return names


def check_format(path: Path) -> None:
    """Raises :class:`InputError` where ``path`` is not of a kind that can be drawn."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"cannot draw a '{path.suffix}' file", where=str(path), fix=f"use {', '.join(FORMATS)}"
        )


def _choose(runs: Sequence[Drawn], metric: str | None) -> list[str]:
    found = list(dict.fromkeys(n for run in runs for n in summary.metrics(run.history)))
    where = ", ".join(run.entry.run_id for run in runs)
    if not found:
        raise InputError("no committed round was evaluated", where=where, fix="let it run first")
    if metric is not None:
        if metric not in found:
            raise InputError(f"unknown metric '{metric}'", where=where, fix=suggest(metric, found))
        return [metric]
    scores = [n for n in found if not summary.lower_is_better(n)]
    losses = [n for n in found if summary.lower_is_better(n)]
    return scores[:1] + losses[:1]


def _title(runs: Sequence[Drawn]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs"
    entry = runs[0].entry
    status = "" if entry.status == "finished" else f", {entry.status}"
    strategy = entry.configuration["strategy"]["name"]
    return f"{entry.name}: {strategy}, {entry.rounds_done} rounds{status}\n{entry.run_id}"


def _panel(axes: Axes, runs: Sequence[Drawn], metric: str) -> None:
    for place, run in enumerate(runs):
        color = f"C{place % 10}"
        points = summary.curve(run.history, metric)
        if not points:
            continue
        mark = "." if len(points) <= 60 else ""
        label = run.entry.run_id if len(runs) > 1 else "global model"
        x, y = [p.round for p in points], [p.value for p in points]
        axes.plot(x, y, color=color, marker=mark, linewidth=1.6, label=label)
        training = [] if len(runs) > 1 else summary.curve(run.history, metric, "training")
        if training:
            x, y = [p.round for p in training], [p.value for p in training]
            axes.plot(x, y, color="C7", linestyle=":", label="clients, while training")
        if top := summary.best(run.history, metric):
            text = f"best {top.value:.4g} (round {top.round})"
            axes.plot([top.round], [top.value], "o", color=color, mfc="white", ms=8, label=text)
    axes.set_ylabel(metric)
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize=8, frameon=False)


def _epsilon(axes: Axes, runs: Sequence[Drawn]) -> None:
    spent = [
        (place, [(r["round"], r["epsilon"]) for r in run.history if r.get("epsilon") is not None])
        for place, run in enumerate(runs)
    ]
    if not any(points for _, points in spent):
        return
    right = axes.twinx()
    for place, points in spent:
        finite = [(n, e) for n, e in points if math.isfinite(e)]
        x, y = [n for n, _ in finite], [e for _, e in finite]
        right.plot(x, y, color=f"C{place % 10}", linestyle="--", linewidth=1, alpha=0.7)
    right.set_ylabel("privacy spent, ε (dashed)")
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)
