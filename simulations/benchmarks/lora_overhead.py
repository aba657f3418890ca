"""What the runtime adds to a bare PyTorch loop of the same steps, on the LoRA recipe.

    umbel bench lora_overhead --data FOLDER [--rounds 6] [--engine sequential]

After each round of the recipe shakespeare-lora a plain loop takes the same steps: the same clients,
batches, model, adapter and optimizer, a mean of what they learned, and nothing else. A round of
Umbel is all from the end of one commit to the end of the next: sampling, training, figures, the
update gate, the mean, the record of what averaging A and B apart loses, checkpoint, database. Both
run in one process in turn, so that whatever else the machine does hits both alike; CPU seconds
beside wall seconds, because waiting is no work. The first round and
the last, which measures the model, are left out. FOLDER holds
``tinyshakespeare/``; the base model has random weights, which cost what trained ones do.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from torch.nn import functional as F

from umbel.client import batches
from umbel.core.run_file import load
from umbel.server.records import RoundRecord
from umbel.simulations.prepare import Prepared, prepare
from umbel.simulations.simulate import simulate
from umbel.tasks.evaluate import tensor_of

GOAL = 1.10
"""The most that a round may take, in bare loops."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="umbel bench lora_overhead")
    found.add_argument("--data", required=True)
    found.add_argument("--rounds", type=int, default=6)
    found.add_argument("--engine", default="vectorised", choices=("vectorised", "sequential"))
    return found


def bare(prepared: Prepared, columns: dict[str, torch.Tensor], record: RoundRecord) -> None:
    """The steps of a round's participants, as one writes them by hand."""
    section, number = prepared.run.client, record.round
    start = {n: p.detach().clone() for n, p in prepared.module.named_parameters()}
    travelling = [n for n, p in prepared.module.named_parameters() if p.requires_grad]
    total = {name: torch.zeros_like(start[name]) for name in travelling}
    for client in record.participants:
        module = copy.deepcopy(prepared.module).train()
        params = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, section.lr, weight_decay=section.weight_decay)
        held = prepared.data.train_holdings.of_client(prepared.data.names.index(client))
        own = {name: column[torch.from_numpy(held).long()] for name, column in columns.items()}
        steps = section.local_steps
        size = section.batch_size
        for index in batches.schedule(1, number, client, len(held), size, None, steps):
            batch = {name: column[torch.from_numpy(index)] for name, column in own.items()}
            targets = torch.cat([batch["x"][:, 1:], batch["y"][:, None]], 1)
            optimizer.zero_grad()
            loss = F.cross_entropy(module(batch["x"]).flatten(0, 1), targets.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        ended = dict(module.named_parameters())
        for name in travelling:
            total[name] += (ended[name].detach() - start[name]) / len(record.participants)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of rounds and of bare loops, and their ratios."""
    recipe = str(files("umbel.simulations.recipes").joinpath("shakespeare-lora.toml"))
    wall: dict[str, list[float]] = {"umbel": [], "bare": []}
    cpu: dict[str, list[float]] = {"umbel": [], "bare": []}
    with tempfile.TemporaryDirectory() as store:
        sets = [f"data.path={options.data}", f"run.store={store}", "run.processes=0"]
        run = load(recipe, [*sets, "evaluate.every=0", f"run.rounds={options.rounds + 2}"])
        run = run.model_copy(update={"task": run.task.model_copy(update={"init_from": None})})
        prepared = prepare(run)
        columns = {name: tensor_of(column) for name, column in prepared.data.train.items()}
        last = [time.perf_counter(), time.process_time()]

        def note(name: str) -> None:
            now = [time.perf_counter(), time.process_time()]
            wall[name].append(now[0] - last[0])
            cpu[name].append(now[1] - last[1])
            last[:] = now

        def after(record: RoundRecord, rounds: int) -> None:
            note("umbel")
            bare(prepared, columns, record)
            note("bare")

        simulate(run, engine=options.engine, on_round=after)
    ratios = {"wall": _ratios(wall), "cpu": _ratios(cpu)}
    middle = {name: round(statistics.median(found), 3) for name, found in ratios.items()}
    return {
        "engine": options.engine,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "cpu_seconds": {n: round(statistics.median(taken[1:-1]), 3) for n, taken in cpu.items()},
        "times_bare": middle,
        "each": {name: [round(r, 3) for r in found] for name, found in ratios.items()},
        "goal": GOAL,
        "met": middle["cpu"] <= GOAL,
    }


def _ratios(taken: dict[str, list[float]]) -> Sequence[float]:
    pairs = zip(taken["umbel"][1:-1], taken["bare"][1:-1], strict=True)
    return [ours / plain for ours, plain in pairs]


def show(result: dict[str, Any]) -> None:
    """Prints the figures."""
    seconds, times = result["cpu_seconds"], result["times_bare"]
    print(f"{result['engine']}, {result['rounds']} rounds, load {result['load']}")
    print(f"CPU seconds a round: {seconds['umbel']:.2f}, a bare loop {seconds['bare']:.2f}")
    print(f"a round is {times['cpu']:.3f} bare loops of CPU time, {times['wall']:.3f} of wall time")
    print(f"goal: {result['goal']:.2f}, {'met' if result['met'] else 'MISSED'}")


def main() -> None:
    """From the command line."""
    show(measure(parser().parse_args()))


if __name__ == "__main__":
    main()
