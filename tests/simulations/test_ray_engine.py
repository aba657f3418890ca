"""Ray changes nothing but where the work is done: on two nodes, and when one of them is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from umbel.core.errors import InputError, RunError
from umbel.core.run_file import RunFile, resolve
from umbel.server.records import RoundResult, Scores
from umbel.server.rounds import Start, rounds
from umbel.simulations import workers
from umbel.simulations.engines.ray import KINDS
from umbel.simulations.engines.ray import ray as ray_engine
from umbel.simulations.engines.vectorised import vectorised
from umbel.simulations.parcels import pack, unpack
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import simulate

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 2)  # on any machine: no cohort is trained alone


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head of one CPU; tests add a second node."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def run_file(number: int = 4, **run: Any) -> RunFile:
    return resolve(
        {
            "run": {"rounds": number, "seed": 5, "engine_plan": "stacked:chunk=2", **run},
            "data": {
                "name": "digits",
                "split": {"kind": "dirichlet", "clients": 14, "alpha": 0.4},
                "client_holdout": 0.2,
            },
            "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [16]}},
            "client": {"device": "cpu", "momentum": 0.5, "batch_size": 8},
            "strategy": {"name": "fedadam", "cohort": 11},
        }
    )


PATIENT = 400
"""Rounds for which a test waits, half a second each, until Ray has started its second worker."""


class Done:
    """What a run of some rounds came to; ``watch`` may end it after a round."""

    def __init__(
        self,
        make: Callable[..., Any],
        run: RunFile,
        watch: Callable[[int, list[int]], bool] = lambda number, pids: False,
        whole: bool = False,
    ) -> None:
        prepared, said = prepare(run), list[str]()
        chosen = prepared.strategy
        if whole:
            chosen = chosen._replace(combine=chosen.combine._replace(merge=None))
        engine = make(run, prepared.data, prepared.task, chosen.client, said.append)
        self.sizes = engine.examples()
        self.results: list[RoundResult] = []
        model = prepared.model()
        begin = Start(0, model, chosen.init(model.params))
        try:
            for result in rounds(run, chosen, engine, begin, lambda r, m: Scores({}, {})):
                self.results.append(result)
                self.plan = engine.plan_record()["plan"]
                if watch(result.record.round, engine.workers()):
                    break
        finally:
            engine.close()
        # A slow machine may have kept Ray waiting, too.
        self.said = [text for text in said if not text.startswith("waiting for a ")]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Done)
        return all(
            a.record.as_json() | {"seconds": 0} == b.record.as_json() | {"seconds": 0}
            and all(torch.equal(t, b.model.tensors()[n]) for n, t in a.model.tensors().items())
            for a, b in zip(self.results, other.results, strict=True)
        )


def test_a_parcel_holds_what_was_put_into_it() -> None:
    value = {
        "a": torch.arange(6).view(2, 3).t(),
        "b": [torch.tensor(True), torch.zeros(0), torch.tensor([1.5], dtype=torch.bfloat16)],
        "c": "text",
    }
    parcel = pack(value)
    for buffer in parcel.buffers:
        buffer.flags.writeable = False  # as Ray hands them out
    found = unpack(parcel)
    assert found["c"] == "text"
    assert torch.equal(found["a"], value["a"])
    for mine, other in zip(value["b"], found["b"], strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)
    found["a"].add_(1)  # a copy: Ray's memory would end the process
    assert value["a"][0, 0] == 0


@slow
def test_a_worker_has_a_gpu_to_itself(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray deals out two GPUs that are not there; the workers compute on CPUs all the same."""
    monkeypatch.setitem(KINDS, "cpu", "GPU")
    run = run_file(PATIENT, ray_address=cluster.address)
    node = cluster.add_node(num_cpus=3, num_gpus=2)
    most = 0

    def three_rounds_of_two(number: int, pids: list[int]) -> bool:
        nonlocal most
        time.sleep(0.5 * (len(pids) < 2))
        most = max(most, len(pids))
        return number >= 4 and len(pids) == 2

    try:
        several = Done(ray_engine, run, three_rounds_of_two)
    finally:
        cluster.remove_node(node)
    assert most == 2
    assert Done(vectorised, run_file(len(several.results))) == several
    with pytest.raises(RunError, match="no node of the Ray cluster has a GPU"):
        Done(ray_engine, run_file(1, ray_address=cluster.address))


@slow
def test_two_nodes_give_the_bits_of_the_vectorised_engine_and_are_left_alone(
    cluster: Cluster,
) -> None:
    node = cluster.add_node(num_cpus=1)

    def both(number: int, pids: list[int]) -> bool:
        time.sleep(0.5 * (len(pids) < 2))
        return number >= 4 and len(pids) == 2

    run = run_file(PATIENT, ray_address=cluster.address)
    try:
        several = Done(ray_engine, run, both)
        whole = Done(ray_engine, run_file(ray_address=cluster.address), whole=True)
        alive = Path(f"/proc/{cluster.head_node.all_processes['raylet'][0].process.pid}").exists()
    finally:
        cluster.remove_node(node)
    assert len(set(several.sizes.tolist())) > 5  # ragged
    length = len(several.results)
    assert length < PATIENT
    assert several == Done(vectorised, run_file(length))
    assert several == Done(vectorised, run_file(length, processes=2))
    assert whole == Done(vectorised, run_file(), whole=True)
    assert several.plan == "stacked:chunk=2"
    assert several.said == ["starting Ray's workers: some seconds until the first round"]
    assert alive
    assert not ray.is_initialized()


@slow
@pytest.mark.parametrize("what", ["worker", "node"])
def test_a_worker_or_node_that_is_lost_changes_no_bit(cluster: Cluster, what: str) -> None:
    node = cluster.add_node(num_cpus=1)
    gone: list[int] = []

    def lose(number: int, pids: list[int]) -> bool:
        # With both there, and in the middle: the round that follows finds one missing.
        if gone:
            return number == gone[0] + 15
        if number < 2 or len(pids) < 2:
            time.sleep(0.5)
            return False
        gone.append(number)
        if what == "worker":
            os.kill(pids[0], signal.SIGKILL)
        else:
            cluster.remove_node(node, allow_graceful=False)
        return False

    run = run_file(PATIENT, ray_address=cluster.address)
    try:
        several = Done(ray_engine, run, lose)
    finally:
        if what == "worker":
            cluster.remove_node(node)
    assert gone
    assert several == Done(vectorised, run_file(len(several.results)))
    assert sum("was lost" in text for text in several.said) == 1
    assert len(several.said) == 2


@slow
def test_a_worker_killed_at_its_work_is_replaced_and_the_work_redone(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The first to train client c03 in round 2 kills its own process, in a user's own loss."""
    own = tmp_path / "fatal_task.py"
    own.write_text(
        "import os, pathlib, signal\n"
        "from umbel.tasks.kinds.classification import classification\n"
        "ONCE = pathlib.Path(__file__).with_suffix('.once')\n"
        "DRIVER = pathlib.Path(__file__).with_suffix('.driver')\n"
        "def task(info, model=None):\n"
        "    plain = classification(info, model)\n"
        "    def losses(forward, batch):\n"
        "        if DRIVER.exists() and int(DRIVER.read_text()) != os.getpid():\n"
        "            try:\n"
        "                ONCE.touch(exist_ok=False)\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "            except FileExistsError:\n"
        "                pass\n"
        "        return plain.losses(forward, batch)\n"
        "    return plain._replace(losses=losses)\n"
    )
    table = run_file(ray_address=cluster.address).model_dump(mode="json")
    table["task"] = {"kind": "fatal_task:task", "model": {"name": "mlp", "hidden": [16]}}
    sys.path.append(str(tmp_path))
    try:
        run = resolve(table)

        def arm(number: int, pids: list[int]) -> bool:
            if number == 2:
                own.with_suffix(".driver").write_text(str(os.getpid()))
            return False

        several = Done(ray_engine, run, arm)
        assert own.with_suffix(".once").exists()
        assert several == Done(vectorised, run)
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("fatal_task", None)
    assert sum("was lost" in text for text in several.said) == 1


def own_metrics(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    """Importable here, and nowhere else."""
    return {"right": (model(batch["x"]).argmax(-1) == batch["y"]).float()}


@slow
def test_a_module_that_a_worker_cannot_import_is_named(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "only_here", sys.modules[__name__])
    monkeypatch.setattr(own_metrics, "__module__", "only_here")

    def make(run: Any, data: Any, task: Any, rule: Any, announce: Any) -> Any:
        return ray_engine(run, data, task._replace(metrics=own_metrics), rule, announce)

    with pytest.raises(InputError, match="cannot load the run's parts: No module named 'only_here"):
        Done(make, run_file(ray_address=cluster.address))
    assert not ray.is_initialized()


@slow
def test_a_stored_run_goes_on_with_ray(cluster: Cluster, tmp_path: Path) -> None:
    straight = simulate(run_file(store=str(tmp_path / "a")))
    began = run_file(store=str(tmp_path / "b"), checkpoint_seconds=0.0)

    class Stop(Exception):
        pass

    def stop(record: Any, planned: int) -> None:
        if record.round == 2:
            raise Stop

    with pytest.raises(Stop):
        simulate(began, on_round=stop)
    with_ray = run_file(store=str(tmp_path / "b"), ray_address=cluster.address)
    from umbel.server.store import RunStore

    (left,) = RunStore(str(tmp_path / "b")).list()
    outcome = simulate(with_ray, engine="ray", resume=left.run_id)
    assert outcome.rounds == 4
    assert straight.model is not None
    assert outcome.model is not None
    assert Path(outcome.model).read_bytes() == Path(straight.model).read_bytes()


def test_a_run_over_experiences_is_that_of_the_vectorised_engine(
    cluster: Cluster, tmp_path: Path
) -> None:
    ewc = {"name": "ewc", "strength": 50.0, "examples": 3}
    stages = {"experiences": 2, "defence": ewc}
    tables = [
        run_file(store=str(tmp_path / "a")).model_dump(mode="json"),
        run_file(store=str(tmp_path / "b"), ray_address=cluster.address).model_dump(mode="json"),
    ]
    here, there = (
        simulate(resolve({**table, "continual": stages}), engine=engine)
        for table, engine in zip(tables, ("vectorised", "ray"), strict=True)
    )
    assert here.model is not None
    assert there.model is not None
    assert Path(here.model).read_bytes() == Path(there.model).read_bytes()
    assert here.continual == there.continual


SCRIPT = """
import sys
from umbel.core.run_file import resolve
from umbel.simulations.simulate import simulate
run = resolve({
    "run": {"rounds": 100000, "store": sys.argv[1]},
    "data": {"name": "digits", "split": {"kind": "iid", "clients": 20}},
    "task": {"kind": "classification"},
    "client": {"local_steps": 1, "device": "cpu"},
    "evaluate": {"every": 0},
})
outcome = simulate(run, engine="ray", on_round=lambda record, _: print(record.round, flush=True))
print(outcome.status, outcome.rounds, flush=True)
"""


@slow
def test_ctrl_c_keeps_the_run_and_ends_the_cluster_that_was_started(tmp_path: Path) -> None:
    def ours() -> set[str]:
        return {p.name for p in Path("/proc").glob("[0-9]*") if _session(p) == process.pid}

    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "1"
        assert len(ours()) > 1
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all in the foreground
        *_, last = process.stdout.read().splitlines()
        assert process.wait(60) == 0
        assert last.split()[0] == "interrupted"
        until = time.monotonic() + 30
        while (left := ours()) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left
    finally:
        if process.poll() is None:
            process.kill()


def _session(process: Path) -> int:
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0
    return int(fields[3]) if fields[0] != "Z" else 0


def test_what_cannot_run_on_ray_is_refused_before_anything_starts() -> None:
    for run, message in (
        (run_file(processes=0), "processes = 0 leaves Ray no worker"),
        (run_file(ray_address="ray://10.0.0.1:10001"), "is the address of Ray's client"),
        (run_file(ray_address="127.0.0.1:1"), "no Ray cluster at '127.0.0.1:1': .* refused"),
    ):
        prepared = prepare(run)
        with pytest.raises(InputError, match=message):
            ray_engine(run, prepared.data, prepared.task, prepared.strategy.client)
    assert not ray.is_initialized()
