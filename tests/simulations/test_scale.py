"""A million clients cost a round what a thousand do, and a thousand rounds leave nothing behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from umbel.core.run_file import RunFile, resolve
from umbel.datasets.federated import Holdings, Numbered
from umbel.server.records import RoundRecord, Scores
from umbel.server.rounds import Start, rounds
from umbel.simulations import workers
from umbel.simulations.benchmarks import scale
from umbel.simulations.engines.vectorised import vectorised
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import simulate


def peak_of_a_round(clients: int) -> float:
    """Bytes that Python and numpy take at most in a round after the first, the median of five."""
    prepared = prepare(scale.run_file(clients, 7, "unused"))
    run, strategy, model = prepared.run, prepared.strategy, prepared.model()
    engine = vectorised(run, prepared.data, prepared.task, strategy.client)
    begin = Start(0, model, strategy.init(model.params))
    stream = rounds(run, strategy, engine, begin, lambda r, m: Scores({}, {}))
    next(stream)
    next(stream)
    peaks = []
    tracemalloc.start()
    try:
        for _ in range(5):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            next(stream)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
        engine.close()
    return statistics.median(peaks)


def test_a_round_does_not_touch_clients_that_are_not_in_it() -> None:
    # One list, or array, with an entry for each of 200,000 clients would take 1.6 MB.
    few, many = peak_of_a_round(1_000), peak_of_a_round(200_000)
    assert many < few + 400_000


def test_a_client_costs_8_bytes_and_a_sample_4() -> None:
    clients, each = 100_000, 3
    order = np.arange(clients * each, dtype=np.int32)
    held = Holdings(np.arange(clients + 1, dtype=np.int64) * each, order)
    assert held.offsets.nbytes + held.index.nbytes == 8 * (clients + 1) + 4 * clients * each
    names = Numbered(clients)
    assert names.index(names[99_999]) == 99_999
    for wrong in ("c1", "c0999999", "c99999x", "d99999", "c१२३४५", "", "c100000"):
        with pytest.raises(ValueError, match="no client"):
            names.index(wrong)
    assert "c00001" in names
    assert names[2:4] == ["c00002", "c00003"]


def tiny(store: Path, number: int, processes: int) -> RunFile:
    return resolve(
        {
            "run": {
                "rounds": number,
                "store": str(store),
                "processes": processes,
                "checkpoint_seconds": 0.05,
                "engine_plan": "stacked:chunk=4",
            },
            "data": {"name": "digits", "split": {"kind": "iid", "clients": 20}},
            "task": {"kind": "classification", "model": {"name": "logistic"}},
            "client": {"local_steps": 1, "batch_size": 8, "device": "cpu"},
            "strategy": {"name": "fedadam", "cohort": 8, "server_lr": 0.01},
            "evaluate": {"every": 50},
        }
    )


@pytest.mark.skipif(not workers.available(), reason="reads /proc")
def test_what_100_000_clients_keep_is_on_disk_alone(tmp_path: Path) -> None:
    given = scale.run_file(100_000, 24, str(tmp_path)).model_dump(mode="json")
    given["run"] |= {"engine_plan": "lean", "processes": 0, "checkpoint_seconds": 3600.0}
    given["strategy"] = {"name": "scaffold", "cohort": 50}
    given["task"]["model"] = {"name": "mlp", "hidden": [2000]}
    seen = []

    def look(record: RoundRecord, planned: int) -> None:
        if record.round in (4, planned):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append(pages * os.sysconf("SC_PAGE_SIZE"))

    simulate(resolve(given), on_round=look)
    (database,) = tmp_path.glob("*/clients.db")
    early, late = seen
    # A thousand clients were sampled in between, and 96 kB are kept for each.
    assert database.stat().st_size > 100e6
    assert late - early < 40e6


@pytest.mark.slow
@pytest.mark.skipif(not workers.available(), reason="reads /proc")
@pytest.mark.parametrize("processes", [0, 2])
def test_a_thousand_rounds_leave_nothing_behind(processes: int, tmp_path: Path) -> None:
    warm, seen = 200, list[tuple[int, int]]()
    others = set(multiprocessing.active_children())  # which an earlier test may have left

    def look(record: RoundRecord, planned: int) -> None:
        if record.round in (warm, planned):
            gc.collect()
            own = set(multiprocessing.active_children()) - others
            pids = [os.getpid(), *(child.pid for child in own)]
            assert len(pids) == 1 + processes
            pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
            files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
            seen.append((pages * os.sysconf("SC_PAGE_SIZE"), files))

    simulate(tiny(tmp_path, warm + 1000, processes), on_round=look)
    (memory, files), (later, then) = seen
    assert then <= files + 10  # a store's thread opens its own; a leak would be one a round
    # A tensor of the model's size that stays each round would be 2.6 MB; a kilobyte of Python, 1.
    assert later - memory < (1 + processes) * 4 << 20
