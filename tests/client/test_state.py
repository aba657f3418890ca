"""What clients keep: versions, atomic, bounded, the same for whoever reads."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from umbel.client.state import ClientStates
from umbel.core.errors import RunError


def tree(value: float, size: int = 3) -> dict[str, torch.Tensor]:
    return {"c/w": torch.full((size,), float(value)), "c/n": torch.tensor(7)}


def value(states: ClientStates, number: int, client: str = "a") -> float | None:
    [found] = states.get(number, [client])
    return None if found is None else float(found["c/w"][0])


def test_a_round_reads_the_newest_from_before_it(tmp_path: Path) -> None:
    states = ClientStates(tmp_path / "run" / "clients.db", "scaffold")
    assert states.get(1, ["a", "b"]) == [None, None]
    assert not states.path.exists()
    states.put(1, {"a": tree(1.0)})
    states.put(4, {"a": tree(4.0), "b": tree(5.0)})
    assert [value(states, n) for n in (1, 2, 4, 5, 50)] == [None, 1.0, 1.0, 4.0, 4.0]
    assert value(states, 4, "b") is None
    [kept] = states.get(9, ["b"])
    assert kept is not None
    assert {n: (t.dtype, tuple(t.shape)) for n, t in kept.items()} == {
        "c/n": (torch.int64, ()),
        "c/w": (torch.float32, (3,)),
    }


def test_a_repeated_round_reads_what_it_read_the_first_time(tmp_path: Path) -> None:
    states = ClientStates(tmp_path / "clients.db", "scaffold")
    for number in (1, 2, 3):
        states.put(number, {"a": tree(number)})
        states.settle(number)
    states.put(4, {"a": tree(4.0)})
    states.put(5, {"a": tree(5.0)})
    again = ClientStates(tmp_path / "clients.db", "scaffold")  # after a kill in round 5
    again.rewind(3)
    assert value(again, 4) == 3.0
    assert value(again, 9) == 3.0
    again.put(4, {"a": tree(4.5)})
    assert value(again, 5) == 4.5


def test_going_back_one_checkpoint_is_possible_and_further_is_refused(tmp_path: Path) -> None:
    states = ClientStates(tmp_path / "clients.db", "scaffold")
    for number in range(1, 7):
        states.put(number, {"a": tree(number)})
        states.settle(number)
    states.rewind(5)
    assert value(states, 6) == 5.0
    with pytest.raises(RunError, match="what clients kept in round 2 is gone"):
        states.rewind(2)


def test_versions_that_nothing_can_ask_for_are_dropped(tmp_path: Path) -> None:
    states = ClientStates(tmp_path / "clients.db", "scaffold")
    states.put(1, {"a": tree(1.0, 50_000)})
    states.settle(1)
    size = states.size()
    for number in range(2, 40):
        states.put(number, {"a": tree(number, 50_000)})
        states.settle(number)
    assert states.size() < 4 * size


def test_more_than_the_limit_is_refused_whole(tmp_path: Path) -> None:
    states = ClientStates(tmp_path / "clients.db", "scaffold", limit=300_000)
    states.put(1, {"a": tree(1.0)})
    with pytest.raises(RunError, match=r"the limit is .* GiB.*state_gib"):
        states.put(2, {"a": tree(2.0), "b": tree(2.0, 100_000)})
    assert value(states, 9) == 1.0
    assert value(states, 9, "b") is None


def test_another_algorithm_is_refused(tmp_path: Path) -> None:
    ClientStates(tmp_path / "clients.db", "scaffold").put(1, {"a": tree(1.0)})
    with pytest.raises(RunError, match="'scaffold', and this run is of 'feddyn'"):
        ClientStates(tmp_path / "clients.db", "feddyn").get(2, ["a"])


def test_a_damaged_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "clients.db").write_bytes(b"not a database" * 100)
    with pytest.raises(RunError, match="cannot keep what clients have"):
        ClientStates(tmp_path / "clients.db", "scaffold").get(1, ["a"])


def _writes(states: ClientStates, first: int) -> None:
    for number in range(1, 6):
        states.put(number, {f"c{first + k}": tree(number) for k in range(3)})


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    states = ClientStates(tmp_path / "clients.db", "scaffold")
    states.put(1, {"a": tree(1.0)})  # an open connection, which must not be used by a fork
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_writes, args=(states, 3 * k)) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    copy = pickle.loads(pickle.dumps(states))
    assert [value(copy, 9, f"c{k}") for k in range(9)] == [5.0] * 9


def _put(path: Path, client: str, together: Any) -> None:
    together.wait()
    ClientStates(path, "scaffold").put(1, {client: {"c/w": torch.ones(3)}})


def test_processes_that_open_a_new_file_at_once_wait_for_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    clients = ["c0", "c1", "c2"]
    for attempt in range(10):
        path, together = tmp_path / f"{attempt}.db", context.Barrier(3)
        made = [context.Process(target=_put, args=(path, c, together)) for c in clients]
        for process in made:
            process.start()
        for process in made:
            process.join()
        assert [process.exitcode for process in made] == [0, 0, 0]
        assert all(t is not None for t in ClientStates(path, "scaffold").get(2, clients))
