"""The search for settings, with real runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from umbel.cli.main import run as umbel
from umbel.core.errors import InputError
from umbel.server.store import RunStore
from umbel.simulations.tune import Trial, tune

pytest.importorskip("optuna")

TEXT = """
[run]
name = "search"
rounds = 3
store = "{store}"
[data]
name = "digits"
split = {{ kind = "iid", clients = 4 }}
[task]
kind = "classification"
[client]
local_steps = 2
device = "cpu"
[tune]
trials = 5
metric = "accuracy"
prune_after = 1
[tune.space]
"client.lr" = {{ low = 1e-6, high = 1.0, log = true }}
"client.batch_size" = {{ low = 4, high = 16, step = 4 }}
"strategy.name" = {{ choices = ["fedavg", "fedavgm"] }}
"""


def table(store: Path, **tune: Any) -> dict[str, Any]:
    import tomllib

    found = tomllib.loads(TEXT.format(store=store))
    found["tune"].update(tune)
    return found


class Stop(Exception):
    pass


def test_a_search_that_was_stopped_goes_on_and_finds_the_best_of_its_runs(tmp_path: Path) -> None:
    done: list[Trial] = []

    def stop(trial: Trial, planned: int) -> None:
        done.append(trial)
        assert planned == 5
        if len(done) == 2:
            raise Stop

    with pytest.raises(Stop):
        tune(table(tmp_path), on_trial=stop)
    search = tune(table(tmp_path), on_trial=lambda trial, planned: done.append(trial))
    assert [trial.number for trial in done] == [0, 1, 2, 3, 4]
    assert [trial.settings for trial in search.trials] == [trial.settings for trial in done]
    assert len({trial.settings["client.lr"] for trial in done}) == 5  # nothing drawn again
    assert all(trial.settings["client.batch_size"] in (4, 8, 12, 16) for trial in done)
    assert search.best is not None
    finished = [trial for trial in done if trial.status == "finished"]
    assert search.best.value == max(trial.value or 0.0 for trial in finished)
    assert {trial.status for trial in done} <= {"finished", "pruned"}
    store = RunStore(str(tmp_path))
    for trial in search.trials:
        assert trial.run_id is not None
        entry = store.get(trial.run_id)
        assert entry.configuration["client"]["lr"] == trial.settings["client.lr"]
        assert entry.configuration["strategy"]["name"] == trial.settings["strategy.name"]
        last = store.history(trial.run_id)[-1]
        assert last.metrics["accuracy"] == trial.value
        assert last.note.startswith("pruned") == (trial.status == "pruned")
    shown = tune(table(tmp_path), on_trial=lambda trial, planned: done.append(trial))
    assert shown == search
    assert len(done) == 5
    with pytest.raises(InputError, match="holds another search"):
        tune(table(tmp_path, metric="loss"))


def _dies(*arguments: Any, **more: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_trial_that_was_killed_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("umbel.simulations.tune.simulate", _dies)
        child = multiprocessing.get_context("fork").Process(
            target=tune, args=(table(tmp_path, trials=1),)
        )
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    search = tune(table(tmp_path, trials=1))
    assert [(t.status, t.error) for t in search.trials] == [
        ("failed", "interrupted"),
        ("finished", ""),
    ]
    assert search.best == search.trials[1]


def test_a_hopeless_trial_is_pruned(tmp_path: Path) -> None:
    space = {"client.lr": {"choices": [0.2, 1e-7]}}
    search = tune(table(tmp_path, trials=12, space=space))
    assert {t.status for t in search.trials if t.settings["client.lr"] == 0.2} == {"finished"}
    late = [t.status for t in search.trials[3:] if t.settings["client.lr"] == 1e-7]
    assert "pruned" in late
    assert search.best is not None
    assert search.best.settings == {"client.lr": 0.2}


def test_the_verb_answers_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(TEXT.format(store=tmp_path / "runs"))
    assert umbel(["tune", str(path), "--set", "tune.trials=1", "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["metric"] == "accuracy"
    assert answer["best"] == answer["trials"][0]
    assert umbel(["tune", str(path)]) == 0
    assert "best: --set client.lr=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "nothing to search"),
        ({"space": {"client.lt": {"low": 1, "high": 2}}}, "unknown key 'lt'"),
        ({"space": {"client.lr": {"low": 0.0, "high": 1.0}}}, "client.lr = 0.0"),
        ({"space": {"client.lr": {"low": 2, "high": 1}}}, "low = 2 is not below high = 1"),
        ({"space": {"client.lr": {"low": 1, "high": "x"}}}, "high = 'x'"),
        ({"space": {"client.lr": {"low": 1, "hihg": 2}}}, "unknown key 'hihg'"),
        ({"space": {"client.lr": {"choices": []}}}, "choices"),
        ({"space": {"client.lr": {"low": 1}}}, "nothing to choose from"),
        ({"space": {"lr": {"low": 1, "high": 2}}}, "'lr' is not section.key"),
        ({"space": {"client.lr": {"low": 0.0, "high": 1.0, "log": True}}}, "log needs low"),
        ({"metric": "acuracy", "trials": 1}, "unknown metric 'acuracy'"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tune(table(tmp_path, **changes))
