"""Accuracy against epsilon on MNIST: one hundred clients by example, a thousand by client.

    umbel bench private_mnist --data PATH [--curves example,client,banded] [--budgets 3,8]
        [--keep FOLDER] [--picture FILE.png]

Each point is a whole run, calibrated to its budget at delta 1e-5, on pictures dealt evenly; beside
them the same model without privacy, and what others published. ``--keep`` keeps each point as it
comes: a bench that was cut off goes on from there. The noise is seeded, as in every simulation.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from umbel.core.extras import extra

DELTA = 1e-5

HIDDEN = "the adversary sees the published models alone"


class Curve(NamedTuple):
    """What is hidden, and from whom.

    Args:
        label: in the picture.
        clients: of the federation.
        privacy: ``[privacy]``, without its budget.
        client: ``[client]``.
        strategy: ``[strategy]``.
        plain: ``[client]`` of the run without privacy, whose gradients nobody clips; ``None``: no
            such run.
        rounds: of each run.
    """

    label: str
    clients: int
    privacy: dict[str, Any]
    client: dict[str, Any]
    strategy: dict[str, Any]
    plain: dict[str, Any] | None
    rounds: int


WHOLE = {"batch_size": 20, "lr": 0.15, "local_epochs": 2}

CURVES = {
    "example": Curve(
        "one example of 100 clients, hidden from the server",
        clients=100,
        privacy={"unit": "example", "clip_norm": 1.0},
        client={"batch_size": 75, "lr": 2.0, "local_steps": 2, "schedule": "cosine"},
        strategy={"cohort": 20},
        plain={"batch_size": 75, "lr": 0.3, "local_steps": 2},
        rounds=100,
    ),
    "client": Curve(
        "one of 1,000 clients, hidden from those who see the models",
        clients=1000,
        privacy={
            "unit": "client",
            "clip_norm": 1.0,
            "adversary": "outsider",
            "adversary_because": HIDDEN,
        },
        client=WHOLE,
        strategy={"cohort": 100},
        plain=WHOLE,
        rounds=40,
    ),
    "banded": Curve(
        "the same, and it is known who took part: banded noise",
        clients=1000,
        privacy={"unit": "client", "clip_norm": 1.0, "mechanism": "banded"},
        client=WHOLE,
        strategy={"cohort": 100},
        plain=None,
        rounds=40,
    ),
}

PUBLISHED: dict[str, tuple[tuple[float, float], ...]] = {
    # Figure 3 and section 5.2 (arXiv:1607.00133): delta 1e-5, a network on 60 PCA components.
    "one example, ONE data holder: Abadi et al. 2016": ((0.5, 0.90), (2.0, 0.95), (8.0, 0.97)),
    # Table 1 (arXiv:1712.07557): epsilon 8 for all; 100, 1,000 and 10,000 clients at delta 1e-3,
    # 1e-5 and 1e-6; the one with 1,000 clients is comparable.
    "one of 1,000 clients: Geyer et al. 2017": ((8.0, 0.92),),
}
"""(epsilon, accuracy), as their papers say."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="umbel bench private_mnist")
    found.add_argument("--data", required=True, help="the folder with MNIST's IDX files")
    found.add_argument("--curves", default=",".join(CURVES))
    found.add_argument("--budgets", default="3,8")
    found.add_argument("--rounds", type=int, default=None, help="fewer or more than planned")
    found.add_argument("--keep", type=Path, default=None)
    found.add_argument("--picture", type=Path, default=None)
    return found


def table(curve: Curve, epsilon: float | None, data: str, store: str) -> dict[str, Any]:
    """The run file of one point; ``None``: without privacy."""
    client, privacy = curve.plain, dict[str, Any](unit="none")
    if epsilon is not None:
        client, privacy = curve.client, {**curve.privacy, "epsilon": epsilon, "delta": DELTA}
    model = {"name": "cnn", "channels": [8, 16, 16], "kernel": 3, "hidden": 32}
    return {
        "run": {"name": "private-mnist", "rounds": curve.rounds, "store": store, "processes": 0},
        "data": {
            "name": "mnist",
            "path": data,
            "split": {"kind": "iid", "clients": curve.clients},
        },
        "task": {"kind": "classification", "model": model},
        "client": client,
        "strategy": {**curve.strategy, "weights": "uniform"},
        "evaluate": {"every": 0},
        "privacy": privacy,
    }


def point(curve: Curve, epsilon: float | None, data: str) -> dict[str, Any]:
    """One run."""
    from umbel.core import run_file
    from umbel.simulations.simulate import simulate

    with tempfile.TemporaryDirectory() as folder:
        outcome = simulate(run_file.resolve(table(curve, epsilon, data, f"{folder}/runs")))
    spent = outcome.privacy or {}
    return {
        "epsilon": spent.get("epsilon"),
        "noise_multiplier": spent.get("noise_multiplier"),
        "rounds": outcome.rounds,
        "accuracy": outcome.metrics["accuracy"],
        "seconds": round(outcome.seconds, 1),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Curve -> points, each a run."""
    from umbel.core.versions import versions

    points: dict[str, list[dict[str, Any]]] = {}
    # Column by column, so that what was cut off has a bit of every curve.
    for budget in [*map(float, options.budgets.split(",")), None]:
        for name in options.curves.split(","):
            curve = CURVES[name]
            if budget is None and curve.plain is None:
                continue
            if options.rounds is not None:
                curve = curve._replace(rounds=options.rounds)
            points.setdefault(name, []).append(_kept(options, name, curve, budget))
    result = {
        "delta": DELTA,
        "load": os.getloadavg()[0],
        "versions": versions(),
        "points": points,
    }
    if options.picture is not None:
        draw(result, options.picture)
    return result


def _kept(
    options: argparse.Namespace, name: str, curve: Curve, budget: float | None
) -> dict[str, Any]:
    if options.keep is None:
        return point(curve, budget, options.data)
    options.keep.mkdir(parents=True, exist_ok=True)
    path: Path = options.keep / f"{name}-{'plain' if budget is None else f'{budget:g}'}.json"
    if not path.exists():
        path.write_text(json.dumps(point(curve, budget, options.data)))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """The curves as a picture."""
    with extra("plots", str(path)):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (name, points) in enumerate(result["points"].items()):
        spent = sorted((p["epsilon"], p["accuracy"]) for p in points if p["epsilon"] is not None)
        axes.plot(*zip(*spent, strict=True), "o-", color=f"C{place}", label=CURVES[name].label)
        for plain in (p for p in points if p["epsilon"] is None):
            axes.axhline(plain["accuracy"], color=f"C{place}", linestyle=":", linewidth=1)
    for marker, (label, published) in zip("x+", PUBLISHED.items(), strict=True):
        axes.plot(*zip(*published, strict=True), marker, color="C7", label=label)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 3, 8], ["0.5", "1", "2", "3", "8"])
    axes.minorticks_off()
    axes.set_xlabel(f"ε at δ = {result['delta']:g} (dotted: without privacy)")
    axes.set_ylabel("accuracy on MNIST's test set")
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def show(result: dict[str, Any]) -> None:
    """Prints the points."""
    print(f"MNIST, delta {result['delta']:g}, load {result['load']:.1f}")
    for name, points in result["points"].items():
        for p in points:
            spent = "no privacy" if p["epsilon"] is None else f"epsilon {p['epsilon']:.2f}"
            print(f"{name:8} {spent:14} accuracy {p['accuracy']:.4f}  {p['seconds']:.0f} s")


def main() -> None:
    """From the command line."""
    show(measure(parser().parse_args()))


if __name__ == "__main__":
    main()
