"""Rounds to FedAvg's own accuracy on MNIST by label shards, strategy by strategy.

    python -m umbel.simulations.benchmarks.rounds_to_target --data FOLDER [--plot FILE.png]

100 clients hold two shards of 300 digits each, so about two classes; 20 take part in a round, each
for five epochs in batches of 60 (the local batch is a tenth of the client's data, a setting of the
SCAFFOLD paper's table 3), with the 2NN of the FedAvg paper and SGD at 0.05. Whatever a strategy
adds has the value in ``STRATEGIES``; nothing else is tuned. The target is the mean accuracy of
FedAvg's last ten rounds; a strategy is there in the round from which on its mean over five rounds
has reached it.

Sources: McMahan et al. 2017, section 3 (arXiv:1602.05629), for the shards and the model;
Karimireddy et al. 2020, section 7 (arXiv:1910.06378), for the comparison by rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from umbel.core.extras import extra
from umbel.core.run_file import resolve
from umbel.server.plots import check_format
from umbel.simulations.simulate import simulate

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"mu": 0.01},
    "fedavgm": {"momentum": 0.9},
    "fedadam": {"server_lr": 0.01, "tau": 1e-3},
    "fedyogi": {"server_lr": 0.01, "tau": 1e-3},
    "fednova": {},
    "scaffold": {},
    "feddyn": {"alpha": 0.01},
}
LAST, SMOOTH = 10, 5


def accuracies(data: Path, name: str, rounds: int, seed: int) -> list[float]:
    """Test accuracy after each round of one strategy."""
    with tempfile.TemporaryDirectory() as store:
        table = {
            "run": {"name": name, "rounds": rounds, "seed": seed, "store": store},
            "data": {
                "name": "mnist",
                "path": str(data),
                "split": {"kind": "shards", "clients": 100},
            },
            "task": {"kind": "classification", "model": "2nn"},
            "client": {"lr": 0.05, "batch_size": 60, "local_epochs": 5},
            "strategy": {"name": name, "cohort": 20, **STRATEGIES[name]},
            "evaluate": {"per_client": False},
        }
        history = simulate(resolve(table)).history
    return [record.metrics["accuracy"] for record in history]


def reached(curve: Sequence[float], target: float) -> int | None:
    """The first round whose mean with the four before it is at ``target``; ``None``: none is."""
    for last in range(SMOOTH, len(curve) + 1):
        if sum(curve[last - SMOOTH : last]) / SMOOTH >= target:
            return last
    return None


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--data", type=Path, required=True, help="the folder that holds mnist/")
    options.add_argument("--rounds", type=int, default=80)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", nargs="*", choices=STRATEGIES, default=[*STRATEGIES])
    options.add_argument("--plot", type=Path, help="where the curves are drawn")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The target, and by strategy its curve, its last accuracy and the round of the target."""
    if options.plot:
        check_format(options.plot)
    names = ["fedavg", *(name for name in options.only if name != "fedavg")]
    curves = {n: accuracies(options.data, n, options.rounds, options.seed) for n in names}
    last = {name: sum(curve[-LAST:]) / len(curve[-LAST:]) for name, curve in curves.items()}
    target = last["fedavg"]
    ends = {name: reached(curve, target) for name, curve in curves.items()}
    rows = {
        name: {"last": last[name], "round": ends[name], "accuracy": curve}
        for name, curve in curves.items()
    }
    if options.plot:
        draw(curves, target, options.plot)
    before = ends["fedavg"] or options.rounds
    passed = any((ends.get(name) or before) < before for name in ("scaffold", "fednova"))
    return {"target": target, "strategies": rows, "passed": passed}


def draw(curves: Mapping[str, Sequence[float]], target: float, path: Path) -> None:
    """Accuracy by round, means over five rounds, and the target."""
    with extra("plots", str(path)):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in curves.items():
        ends = range(SMOOTH, len(curve) + 1)
        means = [sum(curve[e - SMOOTH : e]) / SMOOTH for e in ends]
        axes.plot(ends, means, label=name, linewidth=2.2 if name == "fedavg" else 1.4)
    axes.axhline(target, color="C7", linestyle=":", label="FedAvg's last ten rounds")
    axes.set_ylim(bottom=0.5)
    axes.set_xlabel("round")
    axes.set_ylabel("test accuracy, mean over five rounds")
    axes.set_title("MNIST, 100 clients of two shards each, 20 a round")
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right")
    figure.savefig(path)


def show(result: dict[str, Any]) -> None:
    """Prints the table; exits 1 where neither SCAFFOLD nor FedNova is quicker than FedAvg."""
    table = Table("strategy", "its own keys", "last ten rounds", "rounds to the target")
    for name, row in result["strategies"].items():
        keys = ", ".join(f"{key} = {value}" for key, value in STRATEGIES[name].items())
        table.add_row(name, keys, f"{row['last']:.4f}", str(row["round"] or "not reached"))
    console = Console(width=100)
    console.print(table)
    console.print(f"target: {result['target']:.4f}, FedAvg's last ten rounds")
    raise SystemExit(int(not result["passed"]))


def main() -> None:
    """Measures and prints."""
    show(measure(parser().parse_args()))


if __name__ == "__main__":
    main()
