"""The run store: what goes in comes out, and nothing that a kill leaves is half a round."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch

from umbel.core import run_file
from umbel.core.errors import InputError, RunError
from umbel.core.payloads import Failure
from umbel.core.trees import Model
from umbel.server.database import locate
from umbel.server.records import RoundRecord, RoundResult
from umbel.server.store import RunStore

RUN = run_file.resolve(
    {
        "run": {"name": "tiny", "rounds": 6},
        "data": {"name": "digits", "split": {"kind": "iid", "clients": 2}},
        "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [8]}},
    }
)


def result(number: int) -> RoundResult:
    """What round ``number`` leaves; a function of the number alone, as rounds are."""
    value = torch.arange(3, dtype=torch.float32) / 3 + number
    params = {"z.weight": value, "a.bias": value.to(torch.bfloat16)}
    buffers = {"seen": torch.tensor(number, dtype=torch.int64)}
    state = {"m": {"z.weight": value.double() / 7}, "t": torch.tensor(number), "empty": {}}
    record = RoundRecord(
        number,
        0.5,
        ["c0", "c1"],
        failures=[Failure("c2", "update is not finite")],
        metrics={"accuracy": number / 10, "loss": math.nan},
        epsilon=0.1 * number,
    )
    return RoundResult(record, Model(params, buffers), state)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def assert_is_round(store: RunStore, run_id: str, number: int) -> None:
    """The store shows exactly ``number`` rounds, and the state after the last of them."""
    history = store.history(run_id)
    assert [r.round for r in history] == list(range(1, number + 1))
    assert store.get(run_id).rounds_done == number
    assert store.get(run_id).seconds == pytest.approx(0.5 * number)
    saved = store.latest(run_id)
    if number == 0:
        assert saved is None
        return
    assert saved is not None
    expected = result(number)
    assert saved.round == number
    for name, tensor in expected.model.tensors().items():
        assert same(saved.model.tensors()[name], tensor)
    assert same(saved.state["m"]["z.weight"], expected.state["m"]["z.weight"])  # type: ignore[index]
    assert same(saved.state["t"], expected.state["t"])  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


def test_round_trip_keeps_bits_dtypes_order_and_empty_trees(store: RunStore) -> None:
    run_id = store.create(RUN, engine="vectorised", text='[run]\nname = "tiny"\n')
    store.commit(run_id, result(1), checkpoint=True)
    assert_is_round(store, run_id, 1)
    saved = store.latest(run_id)
    assert saved is not None
    # Sums over a tree are taken in its order: sorted names would give other last bits.
    assert list(saved.model.params) == ["z.weight", "a.bias"]
    assert list(saved.state) == ["m", "t", "empty"]
    assert saved.state["empty"] == {}
    assert store.history(run_id)[0].failures == [Failure("c2", "update is not finite")]
    assert math.isnan(store.history(run_id)[0].metrics["loss"])
    folder = store.folder / run_id
    assert (folder / "run.toml").read_text() == '[run]\nname = "tiny"\n'
    assert json.loads((folder / "run.json").read_text())["run"]["rounds"] == 6
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__
    assert store.get(run_id).run == RUN


def test_tensors_that_share_memory_are_kept(store: RunStore) -> None:
    run_id = store.create(RUN, engine="vectorised")
    rows = torch.arange(6.0).reshape(2, 3)
    model = Model(
        {"w": rows[0], "v": rows[1].t()}, {"empty": torch.zeros(0), "also": torch.zeros(0)}
    )
    state = {"anchor": model.params}
    store.commit(run_id, RoundResult(result(1).record, model, state), checkpoint=True)
    saved = store.latest(run_id)
    assert saved is not None
    assert same(saved.model.params["v"], rows[1])
    assert same(saved.state["anchor"]["w"], rows[0])  # type: ignore[index]
    assert saved.model.buffers["also"].shape == (0,)


def test_rounds_without_checkpoint_wait_for_the_next_one(store: RunStore) -> None:
    run_id = store.create(RUN, engine="vectorised")
    store.commit(run_id, result(1), checkpoint=True)
    store.commit(run_id, result(2), checkpoint=False)
    assert_is_round(store, run_id, 1)
    store.commit(run_id, result(3), checkpoint=True)
    assert_is_round(store, run_id, 3)
    store.commit(run_id, result(4), checkpoint=False)
    store.finish(run_id, "interrupted")
    assert_is_round(store, run_id, 4)


def test_the_last_two_checkpoints_stay(store: RunStore) -> None:
    run_id = store.create(RUN, engine="vectorised")
    for number in range(1, 6):
        store.commit(run_id, result(number), checkpoint=True)
    folder = store.folder / run_id / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["round-000004.safetensors", "round-000005.safetensors"]


def test_a_left_out_round_is_refused(store: RunStore) -> None:
    run_id = store.create(RUN, engine="vectorised")
    with pytest.raises(ValueError, match="round 1 was never committed"):
        store.commit(run_id, result(2), checkpoint=True)
    assert_is_round(store, run_id, 0)


def test_finish_writes_a_model_that_torch_loads(store: RunStore, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    params = {n: p.detach() for n, p in module.named_parameters()}
    model = Model(params, dict(module.named_buffers()))
    run_id = store.create(RUN, engine="vectorised")
    store.commit(run_id, RoundResult(result(1).record, model, {}), checkpoint=True)
    store.finish(run_id, "finished")
    path = store.model_path(run_id)
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    other.load_state_dict(safetensors.torch.load_file(path))
    assert all(same(a, b) for a, b in zip(other.parameters(), module.parameters(), strict=True))
    assert store.export(run_id, tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == path.read_bytes()


def test_status_follows_the_process(store: RunStore) -> None:
    run_id = store.create(RUN, engine="vectorised")
    elsewhere = RunStore(store.location)
    assert elsewhere.get(run_id).status == "running"
    with pytest.raises(InputError, match="is running already, in process"):
        elsewhere.reopen(run_id)
    assert store.get(run_id).status == "running"  # asking did not let go of the lock
    store.close()
    assert elsewhere.get(run_id).status == "interrupted"
    assert elsewhere.reopen(run_id) == ""
    elsewhere.finish(run_id, "failed", error="all clients failed")
    assert store.get(run_id).status == "failed"
    assert store.get(run_id).error == "all clients failed"
    with pytest.raises(ValueError, match="neither created nor reopened"):
        store.commit(run_id, result(1), checkpoint=True)


def test_a_forked_child_does_not_keep_a_dead_run_alive(store: RunStore) -> None:
    run_id = store.create(RUN, engine="vectorised")
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        store.close()
        assert wait_for(lambda: RunStore(store.location).get(run_id).status == "interrupted")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def wait_for(condition, tries: int = 500) -> bool:  # type: ignore[no-untyped-def]
    import time

    for _ in range(tries):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(store: RunStore) -> None:
    run_id = store.create(RUN, engine="vectorised")
    for number in (1, 2, 3):
        store.commit(run_id, result(number), checkpoint=True)
    store.close()
    path = store.folder / run_id / "checkpoints" / "round-000003.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(RunError, match=r"round-000003\.safetensors.* damaged.* go on from round 2"):
        store.latest(run_id)
    assert "rounds after 2 are dropped" in store.reopen(run_id)
    assert_is_round(store, run_id, 2)
    store.commit(run_id, result(3), checkpoint=True)
    assert_is_round(store, run_id, 3)


@pytest.mark.parametrize("damage", ["delete", "empty", "halve"])
def test_without_a_whole_checkpoint_a_run_does_not_go_on(store: RunStore, damage: str) -> None:
    run_id = store.create(RUN, engine="vectorised")
    store.commit(run_id, result(1), checkpoint=True)
    store.close()
    path = store.folder / run_id / "checkpoints" / "round-000001.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage != "delete":
        path.write_bytes(whole[: len(whole) // 2] if damage == "halve" else b"")
    with pytest.raises(RunError, match=r"round-000001\.safetensors"):
        store.reopen(run_id)
    path.write_bytes(whole)
    assert store.reopen(run_id) == ""
    assert_is_round(store, run_id, 1)


def test_runs_are_found_by_prefix_or_latest(store: RunStore) -> None:
    assert store.list() == []
    with pytest.raises(InputError, match="the store is empty"):
        store.get("2026")
    assert not store.folder.exists()  # looking makes nothing
    first = store.create(RUN, engine="vectorised")
    assert store.get(first[:17]).run_id == first
    second = store.create(RUN, engine="sequential")
    assert len({first, second}) == 2
    assert store.get("latest").run_id == store.list()[0].run_id
    assert store.get(second).engine == "sequential"
    with pytest.raises(InputError, match="2 runs begin with '2'"):
        store.get("2")
    with pytest.raises(InputError, match="no run 'tinny'"):
        store.get("tinny")
    with pytest.raises(InputError, match="no run ''"):
        store.get("")


def test_a_sqlite_url_names_the_file(tmp_path: Path) -> None:
    store = RunStore(f"sqlite:///{tmp_path}/deep/my.db")
    run_id = store.create(RUN, engine="vectorised")
    assert (tmp_path / "deep" / "my.db").is_file()
    assert (tmp_path / "deep" / run_id / "run.json").is_file()


def test_other_databases_are_refused_without_showing_the_password() -> None:
    with pytest.raises(InputError, match="mysql") as caught:
        RunStore("mysql://me:secret@host/db")
    assert "secret" not in str(caught.value)


def test_a_postgresql_url_has_its_folder_and_shows_no_password() -> None:
    place = locate("postgresql+psycopg://me:secret@host/db?folder=/srv/runs&sslmode=require")
    assert (place.folder, place.file) == (Path("/srv/runs"), None)
    assert "secret" not in place.shown
    assert dict(place.url.query) == {"sslmode": "require"}
    assert locate("postgresql://host/db").folder == Path("runs")


def test_a_file_in_the_way_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(InputError, match="cannot write the run store") as caught:
        RunStore(tmp_path / "runs").create(RUN, engine="vectorised")
    assert "--store" in caught.value.fix


def test_a_damaged_database_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "umbel.db").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="damaged or not a store"):
        RunStore(tmp_path).list()


CHILD = textwrap.dedent("""
    import importlib.util, os, signal, sys
    spec = importlib.util.spec_from_file_location("the_tests", sys.argv[1])
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    from umbel.server.store import RunStore
""")


def child(tmp_path: Path, body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "child.py"
    script.write_text(CHILD + textwrap.dedent(body))
    command = [sys.executable, str(script), __file__, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


# Every line of the store, its database and its checkpoints that a commit runs is a moment to die.
KILLED = """
    location, run_id = sys.argv[2:4]
    def commit(die_at):
        store = RunStore(location)
        store.reopen(run_id)
        done = store.get(run_id).rounds_done
        count = 0
        def trace(frame, event, argument):
            nonlocal count
            if "/server/" not in frame.f_code.co_filename or "tests" in frame.f_code.co_filename:
                return None
            if event == "line":
                count += 1
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        next_rounds = [tests.result(done + 1), tests.result(done + 2)]
        sys.settrace(trace)
        store.commit(run_id, next_rounds[0], checkpoint=False)
        store.commit(run_id, next_rounds[1], checkpoint=True)
        sys.settrace(None)
    outcomes = []
    for die_at in range(1, 10000):
        pid = os.fork()
        if pid == 0:
            try:
                commit(die_at)
            except BaseException:
                import traceback; traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        store = RunStore(location)
        assert store.get(run_id).status == "interrupted"
        done = store.get(run_id).rounds_done
        tests.assert_is_round(store, run_id, done)
        store.close()
        outcomes.append(done)
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert outcomes == sorted(outcomes) and all(n % 2 == 0 for n in outcomes), outcomes
    print(len(outcomes), outcomes[-1])
"""


@pytest.mark.slow
def test_killed_at_any_line_of_a_commit_the_store_is_consistent(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    run_id = store.create(RUN, engine="vectorised")
    store.close()
    done = child(tmp_path, KILLED, str(tmp_path / "runs"), run_id)
    assert done.returncode == 0, done.stderr
    kills, rounds = map(int, done.stdout.split())
    assert kills > 40  # moments of death
    # Killed after the transaction, a round stands: some of those deaths committed theirs.
    assert rounds > 2
    assert_is_round(store, run_id, rounds)
    left = sorted(p.name for p in (store.folder / run_id / "checkpoints").iterdir())
    assert left == [f"round-{rounds - 2:06d}.safetensors", f"round-{rounds:06d}.safetensors"]


WRITERS = """
    def write(engine):
        store = RunStore(sys.argv[2])
        run_id = store.create(tests.RUN, engine=engine)
        for number in range(1, 16):
            store.commit(run_id, tests.result(number), checkpoint=True)
        store.finish(run_id, "finished")
    children = []
    for engine in ("left", "right", "third"):
        children.append(os.fork())
        if children[-1] == 0:
            write(engine)
            os._exit(0)
    print([os.waitpid(pid, 0)[1] for pid in children])
"""


def test_several_processes_write_one_new_store_and_lose_nothing(tmp_path: Path) -> None:
    done = child(tmp_path, WRITERS, str(tmp_path / "runs"))
    assert done.stdout.strip() == "[0, 0, 0]", done.stderr
    store = RunStore(tmp_path / "runs")
    assert {entry.engine for entry in store.list()} == {"left", "right", "third"}
    for entry in store.list():
        assert entry.status == "finished"
        assert_is_round(store, entry.run_id, 15)


FULL = """
    import resource
    store = RunStore(sys.argv[2])
    run_id = store.create(tests.RUN, engine="vectorised")
    store.commit(run_id, tests.result(1), checkpoint=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # the system then refuses to write more
    try:
        store.commit(run_id, tests.result(2), checkpoint=True)
    except Exception as error:
        print(type(error).__name__, error)
    print(run_id)
"""


def test_a_full_disk_is_one_error_and_loses_no_committed_round(tmp_path: Path) -> None:
    done = child(tmp_path, FULL, str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    message, run_id = done.stdout.strip().splitlines()
    assert message.startswith("RunError")
    assert "the disk is full" in message
    assert_is_round(RunStore(tmp_path / "runs"), run_id, 1)


def test_the_store_loads_no_torch() -> None:
    program = (
        "import sys, umbel.server.store\n"
        "print([m for m in ('torch', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
