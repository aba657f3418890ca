"""Accuracy against epsilon on MNIST: one hundred clients by example, a thousand by client.

    umbel bench private_mnist --data PATH [--rounds 40] [--picture FILE.png]

Each point is a whole run, calibrated to its budget at delta 1e-5; beside them the same runs without
privacy. The noise is seeded, as in every simulation.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

BUDGETS = {"example": (1.0, 3.0, 8.0), "client": (3.0, 8.0, 20.0)}
DELTA = 1e-5

PUBLISHED = (
    # Abadi et al. 2016, section 5.2 (arXiv:1607.00133): one data holder, DP-SGD on PCA features.
    (0.5, 0.90), (2.0, 0.95), (8.0, 0.97),
)  # fmt: skip
"""(epsilon, accuracy) of central DP-SGD at delta 1e-5."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="umbel bench private_mnist")
    found.add_argument("--data", required=True, help="the folder with MNIST's IDX files")
    found.add_argument("--rounds", type=int, default=40)
    found.add_argument("--units", default="example,client")
    found.add_argument("--picture", type=Path, default=None)
    return found


def table(unit: str, epsilon: float | None, options: argparse.Namespace) -> dict[str, Any]:
    """The run file of one point; ``None``: without privacy."""
    clients, cohort = (100, 20) if unit == "example" else (1000, 200)
    by_example = unit == "example"
    privacy: dict[str, Any] = {"unit": "none"}
    if epsilon is not None:
        privacy = {"unit": unit, "epsilon": epsilon, "delta": DELTA}
        privacy |= {"clip_norm": 1.0 if by_example else 0.5}
    if epsilon is not None and not by_example:
        why = "the adversary sees the published models alone"
        privacy |= {"adversary": "outsider", "adversary_because": why}
    return {
        "run": {"name": f"mnist-{unit}", "rounds": options.rounds, "store": "runs"},
        "data": {
            "name": "mnist",
            "path": options.data,
            "split": {"kind": "iid", "clients": clients},
        },
        "task": {"kind": "classification", "model": {"name": "cnn"}},
        "client": {"batch_size": 60 if by_example else 20, "lr": 0.25 if by_example else 0.1},
        "strategy": {"cohort": cohort, "weights": "uniform"},
        "evaluate": {"every": 0},
        "privacy": privacy,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Unit -> points, each a run."""
    from umbel.core import run_file
    from umbel.core.versions import versions
    from umbel.simulations.simulate import simulate

    points: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for unit in options.units.split(","):
            for budget in (None, *BUDGETS[unit]):
                run = run_file.resolve(table(unit, budget, options))
                run = run.model_copy(
                    update={"run": run.run.model_copy(update={"store": f"{folder}/runs"})}
                )
                outcome = simulate(run)
                spent = outcome.privacy or {}
                points.setdefault(unit, []).append(
                    {
                        "epsilon": spent.get("epsilon"),
                        "noise_multiplier": spent.get("noise_multiplier"),
                        "accuracy": outcome.metrics["accuracy"],
                        "seconds": round(outcome.seconds, 1),
                    }
                )
    result = {
        "delta": DELTA,
        "rounds": options.rounds,
        "load": os.getloadavg()[0],
        "versions": versions(),
        "points": points,
    }
    if options.picture is not None:
        draw(result, options.picture)
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """The curves as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (unit, points) in enumerate(result["points"].items()):
        spent = [p for p in points if p["epsilon"] is not None]
        x, y = [p["epsilon"] for p in spent], [p["accuracy"] for p in spent]
        axes.plot(x, y, "o-", color=f"C{place}", label=f"hidden: one {unit}")
        axes.axhline(points[0]["accuracy"], color=f"C{place}", linestyle=":", linewidth=1)
    axes.plot(*zip(*PUBLISHED, strict=True), "x", color="C7", label="central, Abadi et al. 2016")
    axes.set_xscale("log")
    axes.set_xlabel(f"ε at δ = {result['delta']:g} (dotted: without privacy)")
    axes.set_ylabel("accuracy on MNIST's test set")
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def show(result: dict[str, Any]) -> None:
    """Prints the points."""
    print(f"MNIST, {result['rounds']} rounds, delta {result['delta']:g}, load {result['load']:.1f}")
    for unit, points in result["points"].items():
        for point in points:
            spent = "no privacy" if point["epsilon"] is None else f"epsilon {point['epsilon']:.2f}"
            print(f"{unit:8} {spent:14} accuracy {point['accuracy']:.4f}  {point['seconds']:.0f} s")


def main() -> None:
    """From the command line."""
    show(measure(parser().parse_args()))


if __name__ == "__main__":
    main()
