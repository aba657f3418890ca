"""Umbel's engine beside a plain loop, Flower, pfl-research and FedJAX: the same work, in turn.

    umbel bench engine [--quick] [--workload W1] [--systems umbel,plain-2] [--save FOLDER]
    umbel bench engine --device cuda [--workload CIFAR,LORA] [--save FOLDER]
    umbel bench engine --sweep cohort | clients [--save FOLDER]
    umbel bench engine --draw FOLDER/engine-cohort.json [--save FOLDER]

Every run is a process of its own; repetitions are interleaved (A B C A B C …), so that whatever
else the machine does hits all alike. A round is what lies between the ends of two rounds, all that
a user waits for; round 1, with start-up and compilation, has a column of its own. All systems get
the same data and the same initial model; that they do the same work is seen in their final losses.
What is measured, and with which settings, is in docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from umbel.core.errors import InputError, RunError, suggest
from umbel.simulations.benchmarks.parts import pictures, processes, systems, workloads
from umbel.simulations.benchmarks.parts.processes import Measured
from umbel.simulations.benchmarks.parts.workloads import Files, Workload

Result: TypeAlias = dict[str, Any]
REFERENCE = "umbel"
WHERE = "umbel bench engine"
COLUMNS = (
    "s a round", "× Umbel", "clients/s", "% of peak", "end of round 1, s", "CPU s a round",
    "peak MB", "loss",
)  # fmt: skip
QUICK_ROUNDS = {"W1": 3, "W2": 10}
KNOWN = {**workloads.WORKLOADS, **workloads.GPU}


class Parser(argparse.ArgumentParser):
    """Options that are wrong are bad input like any other."""

    def error(self, message: str) -> NoReturn:
        """Raises :class:`InputError`."""
        raise InputError(message, where=WHERE, fix=f"see {WHERE} --help")


def parser() -> Parser:
    """The options."""
    found = Parser(WHERE, description=(__doc__ or "").split("\n")[0])
    found.add_argument("--quick", action="store_true", help="Umbel and the plain loops, few rounds")
    found.add_argument("--workload", metavar="A,B", help=f"of {', '.join(KNOWN)}")
    found.add_argument("--systems", metavar="A,B", help=f"of {', '.join(systems.SYSTEMS)}")
    found.add_argument("--rounds", type=int, help="of each run, at least 2")
    found.add_argument("--repeat", type=int, help="runs of each system; default 3")
    found.add_argument("--sweep", choices=("cohort", "clients"), help="cost over this, instead")
    found.add_argument("--values", metavar="10,100", help="points of the sweep")
    found.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    found.add_argument("--limit", type=float, default=600.0, help="seconds of one run, at most")
    found.add_argument("--save", type=Path, metavar="FOLDER", help="for the result and pictures")
    found.add_argument("--draw", type=Path, metavar="FILE", help="pictures of a saved result")
    found.add_argument(
        "--environments", type=Path, metavar="FOLDER", help="of the peers; default: the user cache"
    )
    return found


def measure(options: argparse.Namespace) -> Result:
    """Runs the benchmark; the result as plain values.

    Raises:
        InputError: an unknown system or workload, a number out of bounds, or no Linux.
    """
    if options.draw:
        return _drawn(options.draw, options.save)
    if not Path("/proc/self/smaps_rollup").exists():
        message = "memory and CPU of a tree of processes are read from /proc, which is not here"
        raise InputError(message, where=WHERE, fix="run it on Linux")
    _require(options.device)
    work = _work(options)
    short = options.quick or options.sweep
    usual = systems.USUAL if options.device == "cpu" else systems.ON_GPU
    if options.sweep:
        usual = (REFERENCE, "plain-2")
    chosen = _chosen(options.systems, systems.SYSTEMS, systems.QUICK if options.quick else usual)
    repeat = (1 if short else 3) if options.repeat is None else options.repeat
    if repeat < 1:
        raise InputError(f"--repeat {repeat}", where=WHERE, fix="at least 1")
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
    before = os.getloadavg()
    result: Result = {
        "benchmark": "engine",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(options.device),
        "versions": {n: version(n) for n in ("umbel", "torch", "numpy")}
        | {"python": platform.python_version()},
        "repeat": repeat,
        "sweep": options.sweep,
        "workloads": [],
    }
    with tempfile.TemporaryDirectory(prefix="umbel-bench-") as folder:
        environment = systems.environment(Path(folder) / "cache", options.device)
        for value, workload in work:
            place = Path(folder) / workload.name
            files = workloads.write(workload, place)
            bench = Bench(workload, files, place, environment, options, _note)
            result["workloads"].append(bench.run(chosen, repeat) | {"value": value})
            files.data.unlink()
            result["load"] = {"before": list(before), "after": list(os.getloadavg())}
            _save(result, options.save)
    return result


def _drawn(path: Path, folder: Path | None) -> Result:
    """A saved result, with pictures of it in ``folder``: beside it, where that is ``None``."""
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        folder = folder or path.parent
        folder.mkdir(parents=True, exist_ok=True)
        result["pictures"] = [str(picture) for picture in pictures.draw(result, folder)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{path} is no saved result ({type(error).__name__}: {error})",
            where=WHERE,
            fix="give the .json that --save left",
        ) from error
    return result


def _save(result: Result, folder: Path | None) -> None:
    """After each workload, so that who interrupts the next one keeps what there is."""
    if folder is None:
        return
    result["pictures"] = [str(path) for path in pictures.draw(result, folder)]
    name = f"engine-{result['sweep']}.json" if result["sweep"] else "engine.json"
    text = json.dumps(result, indent=2, default=str) + "\n"
    (folder / name).write_text(text, encoding="utf-8")
    (folder / name).with_suffix(".md").write_text(_markdown(result), encoding="utf-8")


def _markdown(result: Result) -> str:
    """The tables as a document takes them."""
    lines = []
    for work in result["workloads"]:
        lines += [f"{work['name']}: {work['title']}", "", f"| system | {' | '.join(COLUMNS)} |"]
        lines.append("|---" + "|---:" * len(COLUMNS) + "|")
        lines += [f"| {' | '.join([r['title'], *_cells(r)])} |" for r in work["systems"]]
        floor = f"| floor: its matrix products | {work['floor']['seconds']:.3g} "
        lines += [floor + "| " * (len(COLUMNS) - 1) + "|", ""]
    return "\n".join(lines)


class Bench:
    """One workload: every system, over all repetitions."""

    def __init__(
        self,
        workload: Workload,
        files: Files,
        folder: Path,
        environment: dict[str, str],
        options: argparse.Namespace,
        note: Callable[[str], None],
    ) -> None:
        self._workload, self._files, self._folder = workload, files, folder
        self._environment, self._options, self._note = environment, options, note

    def run(self, names: Sequence[str], repeat: int) -> Result:
        """Interleaved runs; a system that fails once is left out from then on."""
        device = self._options.device
        rate = workloads.sgemm_rate(device=device)
        runs: dict[str, list[Measured]] = {name: [] for name in names}
        losses: dict[str, list[float]] = {name: [] for name in names}
        for number in range(1, repeat + 1):
            for name in names:
                if any(run.error for run in runs[name]):
                    continue
                taken, loss = self._once(name, number)
                runs[name].append(taken)
                losses[name] += [] if loss is None else [loss]
                said = taken.error or f"{statistics.median(taken.rounds):.4g} s a round"
                self._note(f"{self._workload.name} {number}/{repeat} {name}: {said}")
        w = self._workload
        start = workloads.final_loss(w, self._files, self._files.init)
        rows = [_row(name, runs[name], losses[name]) for name in names]
        _compare(rows, start)
        # Before and after, since the floor is that of the machine with nobody else on it.
        count, rate = workloads.flops(w), max(rate, workloads.sgemm_rate(device=device))
        for row in rows:
            if "error" not in row:
                row["clients_per_second"] = w.cohort / row["seconds_per_round"]
                row["share_of_peak"] = count / rate / row["seconds_per_round"]
        parameters = sum(p.numel() for p in workloads.module(w).parameters())
        return {
            "name": w.name,
            "title": w.title,
            "parameters": parameters,
            "clients": w.clients,
            "cohort": w.cohort,
            "rounds": w.rounds,
            "initial_loss": start,
            "floor": {"flops": count, "flops_per_second": rate, "seconds": count / rate},
            "systems": rows,
        }

    def _once(self, name: str, number: int) -> tuple[Measured, float | None]:
        system = systems.SYSTEMS[name]
        folder = self._folder / f"{name}-{number}"
        folder.mkdir()
        device = self._options.device
        if device != "cpu" and not system.gpu:
            return _failed("this benchmark runs it on a CPU only"), None
        try:
            command = systems.command(
                system,
                self._workload,
                self._files,
                folder,
                device,
                self._options.environments,
                self._note,
            )
        except RunError as error:
            return _failed(str(error)), None
        taken = processes.measure(
            command, self._environment, self._workload.rounds, self._options.limit
        )
        if taken.error:
            return taken, None
        return taken, workloads.final_loss(self._workload, self._files, folder / "final.npz")


def _failed(error: str) -> Measured:
    return Measured([], 0.0, 0.0, None, 0.0, {}, error)


def _row(name: str, runs: Sequence[Measured], losses: Sequence[float]) -> Result:
    """The figures of one system: medians over repetitions of medians over rounds."""
    system = systems.SYSTEMS[name]
    row: Result = {"name": name, "title": system.title, "settings": system.settings}
    errors = [run.error for run in runs if run.error]
    facts = runs[-1].facts
    row |= {key: facts[key] for key in ("versions", "notes", "engine_plan") if facts.get(key)}
    if errors:
        return row | {"error": errors[0]}
    middle = statistics.median
    medians = [middle(run.rounds) for run in runs]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes]
    return row | {
        "seconds_per_round": middle(medians),
        "repetitions": medians,
        "fastest_round_seconds": min(min(run.rounds) for run in runs),
        "first_round_seconds": middle(run.first_round for run in runs),
        "first_round_cold_seconds": runs[0].first_round,
        "cpu_seconds_per_round": middle(run.cpu_seconds / len(run.rounds) for run in runs),
        "peak_bytes": max(peaks, default=None),
        "others_busy_cores": middle(run.others for run in runs),
        "loss": middle(losses),
    }


def _compare(rows: Sequence[Result], start: float) -> None:
    """Ratios to Umbel, and whether every system has learned as much as the others."""
    measured = [row for row in rows if "error" not in row]
    base = next((r["seconds_per_round"] for r in measured if r["name"] == REFERENCE), None)
    typical = statistics.median(r["loss"] for r in measured) if measured else start
    for row in measured:
        row["ratio"] = row["seconds_per_round"] / base if base else None
        # Cohorts and orders differ by chance from system to system; a tenth of the way is ample.
        row["comparable"] = abs(row["loss"] - typical) <= 0.1 * abs(start - typical) + 0.002


def _work(options: argparse.Namespace) -> list[tuple[int | None, Workload]]:
    values = _values(options)
    work: list[tuple[int | None, Workload]]
    if options.sweep:
        work = list(workloads.sweep(options.sweep, values))
    else:
        usual = workloads.WORKLOADS if options.device == "cpu" else workloads.GPU
        names = _chosen(options.workload, KNOWN, tuple(usual))
        work = [(None, KNOWN[name]) for name in names]
        if options.quick:
            work = [(v, w._replace(rounds=QUICK_ROUNDS.get(w.name, 2))) for v, w in work]
    if options.rounds is not None:
        if options.rounds < 2:
            message = f"--rounds {options.rounds}: the first round is not counted"
            raise InputError(message, where=WHERE, fix="at least 2")
        work = [(v, w._replace(rounds=options.rounds)) for v, w in work]
    return work


def _values(options: argparse.Namespace) -> list[int] | None:
    if options.values is None:
        return None
    words = options.values.split(",")
    # A sweep's cohort is 100 of the clients, and nobody's cohort is below one.
    least = 1 if options.sweep == "cohort" else 100
    if not options.sweep or not all(w.isdecimal() and int(w) >= least for w in words):
        message = f"--values {options.values}"
        fix = f"with --sweep, whole numbers from {least}: --values 100,1000"
        raise InputError(message, where=WHERE, fix=fix)
    return [int(w) for w in words]


def _chosen(text: str | None, known: Sequence[str] | Any, usual: Sequence[str]) -> Sequence[str]:
    names = [name.strip() for name in text.split(",")] if text else list(usual)
    for name in names:
        if name not in known:
            fix = suggest(name, known)
            raise InputError(f"unknown '{name}'", where=WHERE, fix=fix)
    return names


def _require(device: str) -> None:
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            message = "--device cuda: torch sees no GPU here"
            raise InputError(message, where=WHERE, fix="run it where there is one")


def _machine(device: str) -> Result:
    cpu = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", facts.read_text(), re.M)):
        cpu = found[1]
    machine: Result = {"cpu": cpu, "cores": os.cpu_count(), "platform": platform.platform()}
    if hasattr(os, "sysconf"):
        machine["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device != "cpu":
        import torch

        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def show(result: Result) -> None:
    """Prints the tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140, highlight=False)
    machine, load = result["machine"], result["load"]
    console.print(
        f"{result['date']}, {machine['cores']} cores ({machine['cpu']}), load "
        f"{load['before'][0]:.1f} before and {load['after'][0]:.1f} after, "
        f"torch {result['versions']['torch']}, {result['repeat']} repetition(s)"
    )
    for work in result["workloads"]:
        console.print(f"\n{work['name']}: {work['title']}; {work['parameters']} parameters")
        if result["sweep"]:
            console.print(f"{result['sweep']} {work['value']}")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("system")
        for title in COLUMNS:
            table.add_column(title, justify="right")
        for row in work["systems"]:
            table.add_row(row["title"], *_cells(row))
        floor = work["floor"]
        rate = f"{floor['flops'] / 1e9:.3g} GFLOP at {floor['flops_per_second'] / 1e9:.0f} GFLOP/s"
        table.add_row("floor: its matrix products", f"{floor['seconds']:.3g}")
        console.print(table)
        busy = [r["others_busy_cores"] for r in work["systems"] if "error" not in r]
        others = f"; other programs kept {max(busy):.1f} cores busy" if busy else ""
        console.print(f"floor: {rate}{others}; loss before round 1: {work['initial_loss']:.3f}")
        for row in work["systems"]:
            if plan := row.get("engine_plan"):
                console.print(f"{row['title']}: plan {plan['plan']}, by {plan['source']}")
            if "error" in row:
                console.print(f"{row['title']}: {row['error']}")
            elif not row["comparable"]:
                console.print(f"{row['title']}: its loss is not that of the others: look into it")
    for path in result.get("pictures", []):
        console.print(f"drawn: {path}")


def _cells(row: Result) -> list[str]:
    if "error" in row:
        return ["–"] * len(COLUMNS)
    peak, ratio = row["peak_bytes"], row["ratio"]
    rate, share = row.get("clients_per_second"), row.get("share_of_peak")  # not in older results
    return [
        f"{row['seconds_per_round']:.3g}",
        f"{ratio:.2f}" if ratio else "–",
        f"{rate:.3g}" if rate else "–",
        f"{100 * share:.2g}" if share else "–",
        f"{row['first_round_seconds']:.1f}",
        f"{row['cpu_seconds_per_round']:.3g}",
        f"{peak / 1e6:.0f}" if peak else "–",
        f"{row['loss']:.3f}" + ("" if row["comparable"] else " !"),
    ]


def main() -> None:
    """Runs the benchmark and prints its tables."""
    show(measure(parser().parse_args()))


if __name__ == "__main__":
    main()
