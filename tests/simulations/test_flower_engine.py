from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from umbel.core.run_file import RunFile, resolve
from umbel.simulations.simulate import simulate

pytestmark = [pytest.mark.flower, pytest.mark.slow]

SCRIPT = """
import sys
from umbel.core.run_file import resolve
from umbel.simulations.simulate import simulate
run = resolve({
    "run": {"rounds": 100000, "store": sys.argv[1], "checkpoint_seconds": 0.5},
    "data": {"name": "digits", "split": {"kind": "iid", "clients": 2}},
    "task": {"kind": "classification"},
    "client": {"local_steps": 1},
    "evaluate": {"every": 0},
})
outcome = simulate(run, engine="flower", on_round=lambda record, _: print(record.round, flush=True))
print(outcome.status, outcome.rounds, flush=True)
"""


def run_file(store: Path) -> RunFile:
    return resolve(
        {
            "run": {"rounds": 3, "store": str(store), "seed": 5},
            "data": {
                "name": "digits",
                "split": {"kind": "dirichlet", "clients": 4, "alpha": 0.5},
                "client_holdout": 0.2,
            },
            "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [16]}},
            "client": {"device": "cpu"},
            "strategy": {"name": "fedadam", "cohort": 3},
        }
    )


def descendants(pid: int) -> set[int]:
    """The processes that ``pid`` started, and theirs."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: set[int] = set()
    front = [pid]
    while front:
        front = [c for p in front for c in children.get(p, []) if c not in found]
        found.update(front)
    return found


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def gone(pids: set[int], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_flowers_simulation_makes_the_model_of_the_sequential_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another's cluster, which Ray would join by itself: Flower's actors are never sent there.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    path, before = os.environ.get("PYTHONPATH"), descendants(os.getpid())
    seen: set[int] = set()
    flower = simulate(
        run_file(tmp_path / "flower"),
        engine="flower",
        on_round=lambda record, total: seen.update(descendants(os.getpid())),
    )
    plain = simulate(run_file(tmp_path / "plain"), engine="sequential")
    assert flower.status == plain.status == "finished"
    assert flower.model is not None
    assert plain.model is not None
    left = safetensors.torch.load_file(flower.model)
    right = safetensors.torch.load_file(plain.model)
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        torch.testing.assert_close(left[name], tensor)
    assert flower.metrics == pytest.approx(plain.metrics)
    assert flower.per_client.keys() == plain.per_client.keys()
    for ours, theirs in zip(flower.history, plain.history, strict=True):
        assert sorted(ours.participants) == sorted(theirs.participants)
        assert ours.training == pytest.approx(theirs.training)
    assert seen - before, "Ray's processes were seen while it ran"
    assert gone(seen - before, 20.0), "Ray's processes end with the run"
    assert os.environ.get("PYTHONPATH") == path


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_an_interrupt_ends_the_run_and_all_its_processes(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "1"
            started = descendants(process.pid)
            assert started
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
            rest, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    status, _, rounds = rest.strip().splitlines()[-1].partition(" ")
    assert status == "interrupted"
    assert int(rounds) >= 1
    assert process.returncode == 0
    assert gone(started, 20.0)
