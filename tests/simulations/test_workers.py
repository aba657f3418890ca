"""Workers change nothing but the time: not their number, not their deaths, not their parent's."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from umbel.core.errors import InputError, RunError
from umbel.core.run_file import RunFile, resolve
from umbel.datasets.federated import FederatedData, Holdings, Info, Numbered
from umbel.server.records import RoundResult, Scores
from umbel.server.rounds import Start, rounds
from umbel.server.store import RunStore
from umbel.simulations import dispatch, workers
from umbel.simulations.arena import Arena
from umbel.simulations.engines.vectorised import vectorised
from umbel.simulations.groups import MOST, groups
from umbel.simulations.simulate import simulate
from umbel.simulations.workers import Workers
from umbel.strategies.build import build_strategy
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.task import Task

pytestmark = pytest.mark.skipif(not workers.available(), reason="no worker processes here")

SIZES = [7, 3, 12, 5, 1, 9, 4, 8, 2, 6]
HERE = os.getpid()


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(workers, "cores", lambda: 4)  # on any machine

    def held() -> tuple[int, set[str]]:
        # What this process maps: others, and other tests beside these, use /dev/shm as well.
        mapped = Path("/proc/self/maps").read_text().split()
        # Torch's compiler keeps a semaphore, once.
        ours = {m for m in mapped if m.startswith("/dev/shm/") and "/sem." not in m}
        return len(os.listdir("/proc/self/fd")), ours

    before = held()
    yield
    assert multiprocessing.active_children() == []
    files, shared = held()
    assert files <= before[0]
    assert shared <= before[1]


def losses(model: Any, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    return {"accuracy": (model(batch["x"]).argmax(-1) == batch["y"]).float()}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))


def federated() -> FederatedData:
    draw = np.random.default_rng(5)
    count = sum(SIZES)
    x = draw.standard_normal((count, 12)).astype(np.float32)
    train = {"x": x, "y": draw.integers(0, 3, count)}
    parts = np.split(draw.permutation(count), np.cumsum(SIZES)[:-1])
    names = Numbered(len(SIZES))
    return FederatedData(Info("x", (12,), 3), names, train, Holdings.of(parts), None, None, None)


def run_file(number: int = 3, **strategy: Any) -> RunFile:
    return resolve(
        {
            "run": {"rounds": number},
            "data": {"name": "x"},
            "task": {"kind": "x"},
            "client": {"lr": 0.1, "batch_size": 4, "momentum": 0.5, "device": "cpu"},
            "strategy": {"name": "fedadam", "server_lr": 0.1, "cohort": 8, **strategy},
        }
    )


class Done:
    """What a run of some rounds came to."""

    def __init__(
        self,
        processes: int | None,
        plan: str = "stacked:chunk=2",
        loss: Callable[[Any, Any], torch.Tensor] = losses,
        data: FederatedData | None = None,
        whole: bool = False,
        watch: Callable[[list[int]], None] = lambda pids: None,
        **strategy: Any,
    ) -> None:
        run, self.said = run_file(**strategy), list[str]()
        task = Task(mlp, loss, accuracy)
        chosen = build_strategy(run.strategy)
        if whole:
            chosen = chosen._replace(combine=chosen.combine._replace(merge=None))
        engine = vectorised(
            run, data or federated(), task, chosen.client, self.said.append,
            plan=plan, processes=processes,
        )  # fmt: skip
        model = model_of(initial_module(task, 0))
        begin = Start(0, model, chosen.init(model.params))
        self.results: list[RoundResult] = []
        self.pids: list[int] = []
        try:
            for result in rounds(run, chosen, engine, begin, lambda r, m: Scores({}, {})):
                self.results.append(result)
                self.pids = engine.workers()  # type: ignore[attr-defined]
                watch(self.pids)
        finally:
            engine.close()

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Done)
        return all(
            a.record.as_json() | {"seconds": 0} == b.record.as_json() | {"seconds": 0}
            and all(torch.equal(t, b.model.tensors()[n]) for n, t in a.model.tensors().items())
            for a, b in zip(self.results, other.results, strict=True)
        )


LONG = [pytest.mark.slow, pytest.mark.compiled]
COMPILED = pytest.param("stacked:chunk=3,compile", marks=LONG)


@pytest.mark.parametrize("plan", ["stacked:chunk=2", "lean:chunk=3", "vmap:chunk=1", COMPILED])
def test_any_number_of_workers_gives_the_same_bits(plan: str) -> None:
    alone = Done(0, plan)
    assert alone.pids == []
    for count in (1, 2, 3):
        several = Done(count, plan)
        assert len(several.pids) == count
        assert several == alone
        assert several.said == []
    assert alone.results[-1].record.participants == sorted(alone.results[-1].record.participants)


def test_weights_and_caps_are_the_same_in_workers() -> None:
    for strategy in ({"weights": "uniform"}, {"max_weight": 4.0}):
        alone, several = Done(0, **strategy), Done(2, **strategy)
        assert several == alone
        assert bool(alone.results[0].record.capped) == ("max_weight" in strategy)


def test_a_combiner_that_needs_the_whole_cohort_gets_every_update() -> None:
    alone, several = Done(0, whole=True), Done(2, whole=True)
    assert len(several.pids) == 2
    assert several == alone
    folded = Done(0)
    for name, tensor in alone.results[-1].model.params.items():
        torch.testing.assert_close(tensor, folded.results[-1].model.params[name])


def test_reserves_stand_in_for_clients_that_fail_in_workers() -> None:
    data = federated()
    data.train["y"][data.train_holdings.of_client(2)[0]] = 77
    done = [Done(n, data=data, cohort=7, over_selection=0.5) for n in (0, 2)]
    assert done[0] == done[1]
    assert done[0].said == done[1].said
    failed = [f for r in done[1].results for f in r.record.failures]
    assert {f.client for f in failed} == {"c2"}
    assert failed[0].reason == "IndexError: Target 77 is out of bounds."
    assert {len(r.record.participants) for r in done[1].results} == {7}


def test_an_input_error_in_a_worker_is_the_runs() -> None:
    def refuses(model: Any, batch: Any) -> torch.Tensor:
        if os.getpid() != HERE:
            raise InputError("no such thing", where="[task]", fix="do without")
        return losses(model, batch)

    with pytest.raises(InputError, match="no such thing") as caught:
        Done(2, loss=refuses)
    assert (caught.value.where, caught.value.fix) == ("[task]", "do without")
    assert "in refuses" in caught.value.__notes__[0]


def test_a_killed_worker_is_replaced_and_its_work_redone(tmp_path: Path) -> None:
    once = tmp_path / "killed"

    def dies(model: Any, batch: Any) -> torch.Tensor:
        if os.getpid() != HERE and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(model, batch)

    struck = Done(2, loss=dies)
    assert once.exists()
    assert struck.said == [
        "a worker process died (killed by signal 9); it is replaced and its work redone"
    ]
    assert struck == Done(0)


def test_workers_killed_between_rounds_are_replaced() -> None:
    def kill(pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    struck = Done(2, watch=kill)
    assert len(struck.said) == 1
    assert struck == Done(0)


def test_clients_that_kill_every_worker_end_the_run() -> None:
    def dies(model: Any, batch: Any) -> torch.Tensor:
        if os.getpid() != HERE:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(model, batch)

    with pytest.raises(RunError, match="die again and again, the last one killed by signal 9"):
        Done(2, loss=dies)


def test_a_round_that_is_given_up_does_not_reach_the_next() -> None:
    def work(shared: int, task: int) -> int:
        time.sleep(0.01)
        return shared * 100 + task

    pool = Workers(work, 2, 1000, 1000, lambda text: None)
    try:
        stream = pool.map(1, range(8), [1.0] * 8)
        assert next(stream) == 100
        stream.close()  # type: ignore[attr-defined]
        assert list(pool.map(2, range(8), [1.0] * 8)) == [200 + n for n in range(8)]
    finally:
        pool.close()


def test_what_costs_most_is_begun_first_and_the_order_is_kept() -> None:
    def work(shared: None, task: int) -> tuple[int, float]:
        return task, time.monotonic()

    pool = Workers(work, 1, 1000, 1000, lambda text: None)
    try:
        found = list(pool.map(None, range(2), [1.0, 5.0]))
    finally:
        pool.close()
    assert [task for task, _ in found] == [0, 1]
    assert found[1][1] < found[0][1]


def test_a_tensor_without_room_is_sent_all_the_same() -> None:
    arena = Arena(2, 100)
    value = {"small": torch.arange(5.0), "large": torch.randn(50), "none": torch.zeros(0, 3)}
    half = {"half": torch.randn(3, 4).bfloat16(), "scalar": torch.tensor(7)}
    first, second = arena.write(0, value), arena.write(1, half)
    for given, found in ((value, arena.read(first)), (half, arena.read(second))):
        assert given.keys() == found.keys()
        for name, tensor in given.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("count", [1, 7, MOST, 3 * MOST + 5])
def test_groups_are_all_chunks_in_order_and_about_equal(count: int) -> None:
    draw = np.random.default_rng(count)
    dealt = [np.array([i]) for i in range(count)]
    costs = draw.uniform(1, 3, count).tolist()
    found = groups(dealt, costs)
    assert [int(c[0]) for g in found for c in g.chunks] == list(range(count))
    assert len(found) <= MOST
    assert sum(g.cost for g in found) == pytest.approx(sum(costs))
    if count > MOST:
        assert max(g.cost for g in found) <= sum(costs) / MOST + 3


def table(store: Path, number: int, processes: int) -> dict[str, Any]:
    return {
        "run": {
            "rounds": number, "seed": 3, "store": str(store), "processes": processes,
            "engine_plan": "stacked:chunk=2",
        },
        "data": {"name": "digits", "split": {"kind": "dirichlet", "clients": 8, "alpha": 0.5}},
        "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [16]}},
        "client": {"lr": 0.1, "device": "cpu"},
        "strategy": {"name": "fedadam", "cohort": 5, "server_lr": 0.05},
    }  # fmt: skip


def test_a_run_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    whole = simulate(resolve(table(tmp_path / "whole", 4, 0)))
    short = simulate(resolve(table(tmp_path / "cut", 2, 3)))
    grown = simulate(resolve(table(tmp_path / "cut", 4, 2)), resume=short.run_id)
    assert whole.model is not None
    assert grown.model is not None
    assert Path(grown.model).read_bytes() == Path(whole.model).read_bytes()


CHILD = """
import sys
from umbel.core.run_file import resolve
from umbel.simulations import simulate, workers
from umbel.simulations.engines import vectorised

def told(record, planned):
    pids = [w.process.pid for w in made[0]._workers]
    print(*pids, flush=True)

made, real = [], vectorised.Dispatch._start
def start(self, plan, groups):
    real(self, plan, groups)
    made.append(self._workers)
vectorised.Dispatch._start = start
workers.cores = lambda: 4
run = resolve(eval(sys.argv[1]))
print(simulate.simulate(run, on_round=told).status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent_however_it_ends(
    ended_by: signal.Signals, tmp_path: Path
) -> None:
    arguments = [sys.executable, "-c", CHILD, repr(table(tmp_path, 100_000, 2))]
    # A group of its own: Ctrl-C in a terminal goes to a process and its workers alike.
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout is not None
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
        if ended_by == signal.SIGINT:
            os.killpg(parent.pid, ended_by)
        else:
            os.kill(parent.pid, ended_by)
        said = parent.stdout.read()
        parent.wait(60)
        patience = time.monotonic() + 60
        while any(alive(pid) for pid in pids):
            assert time.monotonic() < patience, "a worker outlives its parent"
            time.sleep(0.01)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    if ended_by == signal.SIGINT:
        assert said.split()[-1] == "interrupted"
    store = RunStore(tmp_path)
    [entry] = store.list()
    store.close()
    assert entry.status == "interrupted"


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_data_are_held_once() -> None:
    bulk = 256 << 20
    data = np.ones(bulk // 4, np.float32)

    def work(shared: None, task: int) -> float:
        return float(data[task :: len(data) // 1000].sum()) + float(data.sum())

    pool = Workers(work, 2, 1000, 1000, lambda text: None)
    try:
        list(pool.map(None, range(4), [1.0] * 4))
        for pid in pool.pids():
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
            assert private * 1024 < bulk / 2
    finally:
        pool.close()


def test_short_rounds_stay_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "WORTH", 60.0)  # however loaded this machine is
    assert Done(None).pids == []


def test_long_rounds_get_a_worker_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(model: Any, batch: Any) -> torch.Tensor:
        end = time.thread_time() + 0.02  # of this thread, as it is counted
        while time.thread_time() < end:
            pass
        return losses(model, batch)

    monkeypatch.setattr(workers, "cores", lambda: 3)
    several = Done(None, loss=slow)
    assert len(several.pids) == 3
    assert several == Done(0)


def test_few_clients_on_many_cores_stay_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 1000)
    assert list(itertools.chain(Done(2).pids)) == []
