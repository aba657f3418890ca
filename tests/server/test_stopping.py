"""When a run ends before its last round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from umbel.core.errors import InputError
from umbel.core.run_file import EarlyStopping, RunFile, resolve
from umbel.server.records import RoundRecord
from umbel.server.stopping import Patience
from umbel.simulations.simulate import simulate


def rounds_until(section: EarlyStopping, values: list[float | None]) -> int | None:
    patience = Patience(section)
    for number, value in enumerate(values, 1):
        metrics = {} if value is None else {section.metric: value}
        if patience(RoundRecord(number, 0.0, (), metrics=metrics)):
            return number
    return None


@pytest.mark.parametrize(
    ("table", "values", "stops"),
    [
        ({"patience": 2}, [3.0, 2.0, 2.0, 2.5, 1.0], 4),
        ({"patience": 2}, [3.0, 2.0, 2.0, 1.5, 1.6], None),
        ({"patience": 2, "min_delta": 0.1}, [3.0, 2.95, 2.91, 1.0], 3),
        ({"patience": 1, "metric": "accuracy"}, [0.1, 0.2, 0.3, 0.25], 4),
        ({"patience": 1, "metric": "depth", "better": "lower"}, [3.0, 2.0, 4.0], 3),
        ({"patience": 2}, [3.0, None, None, None, 4.0, None, 4.0], 7),
        ({"patience": 2}, [float("nan"), 1.0, float("nan"), float("nan")], 4),
        ({"patience": 2}, [float("nan"), float("nan"), 1.0], 2),
    ],
)
def test_patience(table: dict[str, Any], values: list[float | None], stops: int | None) -> None:
    assert rounds_until(EarlyStopping(**table), values) == stops


def run_file(store: Path, **stopping: Any) -> RunFile:
    return resolve(
        {
            "run": {"rounds": 40, "store": str(store), "checkpoint_seconds": 0.0},
            "data": {"name": "digits", "split": {"kind": "iid", "clients": 4}},
            "task": {"kind": "classification"},
            "client": {"lr": 0.5, "device": "cpu"},
            "evaluate": {"early_stopping": {"patience": 2, "min_delta": 0.02, **stopping}},
        }
    )


def test_a_run_stops_early_and_says_so_also_when_it_was_interrupted(tmp_path: Path) -> None:
    whole = simulate(run_file(tmp_path / "a"))
    assert whole.status == "finished"
    assert 3 <= whole.rounds < 40
    losses = [record.metrics["loss"] for record in whole.history]
    assert min(losses[-2:]) >= min(losses[:-2]) - 0.02
    assert whole.history[-1].note.startswith("stopped early: loss has not improved by more than")

    class Killed(Exception):
        pass

    seen: list[int] = []

    def kill(record: RoundRecord, planned: int) -> None:
        seen.append(record.round)
        if record.round == whole.rounds - 1:
            raise Killed

    with pytest.raises(Killed):
        simulate(run_file(tmp_path / "b"), on_round=kill)
    from umbel.server.store import RunStore

    (left,) = RunStore(str(tmp_path / "b")).list()
    resumed = simulate(run_file(tmp_path / "b"), resume=left.run_id)
    assert resumed.rounds == whole.rounds
    assert resumed.history[-1].note == whole.history[-1].note
    again = simulate(run_file(tmp_path / "b"), resume=left.run_id)
    assert (again.rounds, again.status) == (whole.rounds, "finished")


def test_an_unknown_metric_is_refused_before_the_first_round(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown metric 'acuracy'"):
        simulate(run_file(tmp_path, metric="acuracy"))
    assert not list(tmp_path.iterdir())
