"""A run killed at any moment goes on from its last commit and ends with the bit-same model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.server.records import RoundRecord
from umbel.server.store import RunStore
from umbel.simulations.simulate import simulate

# Calls `target` as the product does, and kills its own process with SIGKILL before, or after, the
# n-th call. There is no such switch in the product.
KILLER = """
import importlib, os, signal, sys
target, moment, nth, run_file = sys.argv[1:]
module, _, path = target.partition(":")
holder = importlib.import_module(module)
*outer, name = path.split(".")
for part in outer:
    holder = getattr(holder, part)
real, calls = getattr(holder, name), 0

def fatal(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(nth) and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **kwargs)
    if calls == int(nth) and moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(holder, name, fatal)
sys.argv = ["umbel", "simulate", run_file]
from umbel.cli.main import main
main()
"""

# Every phase of a round, in time; the third of five rounds unless it comes but once.
PHASES = [
    ("umbel.server.rounds:sample", "before", 3),
    ("umbel.server.rounds:Gate.check", "before", 3),
    ("umbel.server.rounds:Gate.check", "after", 3),
    ("umbel.server.rounds:step", "before", 3),
    ("umbel.server.rounds:step", "after", 3),
    ("umbel.server.evaluation:evaluate", "before", 3),
    ("umbel.server.checkpoints:write", "before", 3),
    ("umbel.server.checkpoints:write", "after", 3),
    ("os:replace", "before", 5),
    ("os:fsync", "after", 9),
    ("umbel.server.journal:enter", "before", 3),
    ("umbel.server.journal:enter", "after", 3),
    ("umbel.server.store:RunStore.commit", "after", 1),
    ("umbel.server.store:RunStore.finish", "before", 1),
    ("umbel.server.store:RunStore.export", "after", 1),
]


def table(store: Path, checkpoint_seconds: float = 0.0) -> dict[str, object]:
    return {
        "run": {
            "rounds": 5,
            "seed": 3,
            "store": str(store),
            "checkpoint_seconds": checkpoint_seconds,
        },
        "data": {
            "name": "digits",
            "split": {"kind": "dirichlet", "clients": 6, "alpha": 0.5, "minimum": 5},
        },
        "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [16]}},
        "client": {"lr": 0.1, "momentum": 0.9},
        "strategy": {"name": "fedadam", "cohort": 3, "server_lr": 0.05},
    }


def with_state(store: Path) -> dict[str, object]:
    """The same with a strategy whose clients keep variates, in two workers."""
    whole = table(store)
    run = whole["run"]
    assert isinstance(run, dict)
    return {
        **whole,
        "run": {**run, "processes": 2, "engine_plan": "stacked:chunk=1"},
        "client": {"lr": 0.1},
        "strategy": {"name": "scaffold", "cohort": 3},
    }


def toml(run: RunFile) -> str:
    lines = []
    for section, keys in run.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        for key, value in keys.items():
            if value is not None:
                lines.append(f"{key} = {inline(value)}")
    return "\n".join(lines)


def inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {inline(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # As many as the children below have: how a product is cut decides its last bits. The product
    # itself goes on with the threads that a run began with.
    threads, asked = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS")
    if asked is not None:
        os.environ["OMP_NUM_THREADS"] = asked


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[RoundRecord]]:
    outcome = simulate(resolve(table(tmp_path_factory.mktemp("calm"))))
    assert outcome.model is not None
    return tensors(Path(outcome.model)), list(outcome.history)


def tensors(path: Path) -> bytes:
    """The bytes of the tensors, without the header that names the run."""
    document = path.read_bytes()
    return document[8 + int.from_bytes(document[:8], "little") :]


def same_rounds(left: list[RoundRecord], right: list[RoundRecord]) -> bool:
    def timeless(record: RoundRecord) -> dict[str, object]:
        return {k: v for k, v in record.as_json().items() if k != "seconds"}

    return [timeless(r) for r in left] == [timeless(r) for r in right]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "moment", "nth"), PHASES)
def test_killed_at_any_phase_it_ends_with_the_same_model(
    target: str,
    moment: str,
    nth: int,
    tmp_path: Path,
    undisturbed: tuple[bytes, list[RoundRecord]],
) -> None:
    run = resolve(table(tmp_path / "store"))
    run_file = tmp_path / "run.toml"
    run_file.write_text(toml(run))
    arguments = [target, moment, str(nth), str(run_file)]
    ended = subprocess.run([sys.executable, "-c", KILLER, *arguments], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()

    store = RunStore(run.run.store)
    [entry] = store.list()
    assert entry.status == "interrupted"
    history = store.history(entry.run_id)
    assert [r.round for r in history] == list(range(1, entry.rounds_done + 1))
    model, rounds = undisturbed
    assert same_rounds(history, rounds[: len(history)])

    outcome = simulate(run, resume=entry.run_id)
    assert outcome.status == "finished"
    assert outcome.model is not None
    assert tensors(Path(outcome.model)) == model
    assert same_rounds(list(outcome.history), rounds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "moment", "nth"),
    [
        ("umbel.server.rounds:step", "before", 3),
        ("umbel.client.state:ClientStates.settle", "after", 3),
        ("umbel.server.journal:enter", "before", 3),
    ],
)
def test_clients_state_is_that_of_an_undisturbed_run(
    target: str, moment: str, nth: int, tmp_path: Path
) -> None:
    calm = simulate(resolve(with_state(tmp_path / "calm")))
    run = resolve(with_state(tmp_path / "store"))
    run_file = tmp_path / "run.toml"
    run_file.write_text(toml(run))
    arguments = [target, moment, str(nth), str(run_file)]
    ended = subprocess.run([sys.executable, "-c", KILLER, *arguments], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    [entry] = RunStore(run.run.store).list()
    outcome = simulate(run, resume=entry.run_id)
    assert calm.model is not None
    assert outcome.model is not None
    assert tensors(Path(outcome.model)) == tensors(Path(calm.model))
    assert same_rounds(list(outcome.history), list(calm.history))


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments(
    tmp_path: Path, undisturbed: tuple[bytes, list[RoundRecord]]
) -> None:
    run = resolve(table(tmp_path / "store"))
    run_file = tmp_path / "run.toml"
    run_file.write_text(toml(run))
    command = [sys.executable, "-c", "from umbel.cli.main import main; main()", "simulate"]
    store = RunStore(run.run.store)
    for k in range(4):
        known = store.list()
        more = ["--resume", known[0].run_id] if known else []
        child = subprocess.Popen(
            [*command, str(run_file), *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        begun = time.monotonic()
        while child.poll() is None and time.monotonic() - begun < 60:
            entries = store.list()
            if entries and entries[0].rounds_done > k:
                break
            time.sleep(0.005)
        child.kill()
        child.wait()
    [entry] = store.list()
    outcome = simulate(run, resume=entry.run_id)
    assert outcome.model is not None
    assert tensors(Path(outcome.model)) == undisturbed[0]
    assert same_rounds(list(outcome.history), undisturbed[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_ctrl_c_and_term_leave_a_resumable_run(
    number: signal.Signals, tmp_path: Path, undisturbed: tuple[bytes, list[RoundRecord]]
) -> None:
    # Rounds are held back for a minute: the interrupt must commit those that are done.
    run = resolve(table(tmp_path / "store", checkpoint_seconds=60.0))
    run_file = tmp_path / "run.toml"
    run_file.write_text(toml(run))
    code = (
        "import os, sys, umbel.server.rounds as r\n"
        "real, calls = r.step, 0\n"
        "def step(*a):\n"
        "    global calls\n"
        "    calls += 1\n"
        f"    if calls == 3: os.kill(os.getpid(), {int(number)})\n"
        "    return real(*a)\n"
        "r.step = step\n"
        "from umbel.cli.main import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "simulate", str(run_file), "--format", "json"]
    ended = subprocess.run(command, capture_output=True, env={**os.environ})
    assert ended.returncode == 1, ended.stderr.decode()
    told = json.loads(ended.stdout)
    assert told["status"] == "interrupted"
    assert told["rounds"] == 2
    assert Path(told["model"]).exists()
    assert f"--resume {told['run_id']}" in ended.stderr.decode()
    assert "Traceback" not in ended.stderr.decode()
    outcome = simulate(run, resume=told["run_id"])
    assert outcome.model is not None
    assert tensors(Path(outcome.model)) == undisturbed[0]


def test_a_run_goes_on_with_the_threads_and_the_plan_that_it_began_with(tmp_path: Path) -> None:
    run = resolve(table(tmp_path))
    first = simulate(run)
    begun = RunStore(tmp_path).get(first.run_id)
    assert begun.engine_plan["plan"]
    assert begun.versions["threads"] == 1
    torch.set_num_threads(2)
    longer = run.model_copy(update={"run": run.run.model_copy(update={"rounds": 6})})
    grown = simulate(longer, resume=first.run_id)
    assert torch.get_num_threads() == 1
    assert grown.rounds == 6
    assert RunStore(tmp_path).get(first.run_id).engine_plan["source"] == "pinned"
    other = run.model_copy(update={"run": run.run.model_copy(update={"engine_plan": "lean"})})
    assert RunStore(tmp_path).get(simulate(other).run_id).engine_plan["plan"] == "lean"


def test_resume_with_another_configuration_is_refused(tmp_path: Path) -> None:
    run = resolve(table(tmp_path))
    first = simulate(run)
    changed = run.model_copy(update={"client": run.client.model_copy(update={"lr": 0.2})})
    with pytest.raises(InputError, match=r"lr = 0.2 in \[client\], and the stored run has 0.1"):
        simulate(changed, resume=first.run_id)


def test_a_finished_run_can_be_given_more_rounds(tmp_path: Path) -> None:
    def of(rounds: int, store: Path) -> RunFile:
        run = resolve(table(store))
        return run.model_copy(update={"run": run.run.model_copy(update={"rounds": rounds})})

    short = simulate(of(2, tmp_path / "a"))
    grown = simulate(of(4, tmp_path / "a"), resume=short.run_id)
    whole = simulate(of(4, tmp_path / "b"))
    assert grown.model is not None
    assert whole.model is not None
    assert tensors(Path(grown.model)) == tensors(Path(whole.model))
    assert [r.round for r in grown.history] == [1, 2, 3, 4]
