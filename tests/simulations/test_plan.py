"""Plans are read back as written, found once a machine, and can be pinned."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from umbel.core.errors import InputError
from umbel.core.payloads import TrainPlan, Updates
from umbel.core.run_file import resolve
from umbel.datasets.federated import FederatedData, Holdings, Info, Numbered
from umbel.simulations import choose, plan_cache
from umbel.simulations.engines.vectorised import Vectorised, vectorised
from umbel.simulations.plan import EnginePlan
from umbel.strategies.parts import ClientRule
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.task import Task

CLIENTS = 12


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "umbel" / "engine-plans.json"


def logistic():
    return nn.Linear(6, 3)


class Sorted(nn.Linear):
    """Prints as any other linear layer does."""

    def _get_name(self):
        return "Linear"

    def forward(self, x):
        return super().forward(x).sort(-1)[0]


def losses(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def engine(build=logistic, plan=None, rounds=1, **client):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((CLIENTS * 4, 6)).astype(np.float32)
    train = {"x": x, "y": draw.integers(0, 3, CLIENTS * 4)}
    held = Holdings.of(np.split(np.arange(CLIENTS * 4), CLIENTS))
    data = FederatedData(Info("x", (6,), 3), Numbered(CLIENTS), train, held, None, None, None)
    table = {"lr": 0.1, "batch_size": 2, "device": "cpu", **client}
    run = resolve(
        {"run": {"rounds": rounds}, "data": {"name": "x"}, "task": {"kind": "x"}, "client": table}
    )
    task = Task(build, losses, lambda model, batch: {})
    return vectorised(run, data, task, ClientRule(), pytest.fail, plan=plan), task, data


def record_of(build=logistic, plan=None, rounds=1, **client):
    """The record after a round, and the round's deltas."""
    made, task, data = engine(build, plan, rounds, **client)
    assert isinstance(made, Vectorised)
    assert made.plan_record() == {}
    model = model_of(initial_module(task, 0))
    (updates,) = made.train(TrainPlan(1, list(data.names), model, CLIENTS))
    assert isinstance(updates, Updates)
    return made.plan_record(), updates.delta


@pytest.mark.parametrize(
    "text",
    [
        "lean",
        "stacked",
        "grouped:chunk=5",
        "vmap:chunk=100",
        "lean:compile",
        "vmap:chunk=2,compile",
    ],
)
def test_text(text):
    assert str(EnginePlan.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("groped", "unknown kernel 'groped'.*grouped"),
        ("", "unknown kernel ''"),
        ("lean:chunk", "'chunk' is neither chunk=N"),
        ("lean:chunk=0", "'chunk=0' is neither"),
        ("lean:chunk=-1", "'chunk=-1' is neither"),
        ("lean:clients=5", "'clients=5' is neither.*lean:chunk=5"),
        ("vmap:chunk=5,", "'' is neither"),
        ("vmap:compiled,chunk=5", "'compiled' is neither.*vmap:chunk=5,compile"),
    ],
)
def test_text_that_is_no_plan(text, says):
    with pytest.raises(InputError, match=says):
        EnginePlan.parse(text)


def test_the_fastest_of_the_trial_is_taken_and_remembered(cache):
    first, delta = record_of()
    assert first["source"] == "trial"
    assert first["refused"] == {"grouped": "it has no convolution"}
    assert {"lean:chunk=8", "stacked:chunk=5"} <= first["seconds_per_client"].keys()
    seconds = first["seconds_per_client"]  # a whole cohort is preferred by a tenth
    assert 0.9 * seconds[first["plan"]] <= min(seconds.values())
    assert len(json.loads(cache.read_text())) == 1

    second, again = record_of()
    assert second == {**first, "source": "cache"}
    for name, d in delta.items():
        assert torch.equal(again[name], d)


def test_another_setting_is_another_plan(cache):
    for client in ({}, {"batch_size": 4}, {"optimizer": "adam"}):
        assert record_of(**client)[0]["source"] == "trial"
    assert len(json.loads(cache.read_text())) == 3


def test_the_length_of_a_run_is_another_plan_only_where_it_is_long(cache):
    """So that a run of five rounds ends with the bits of one of three that went on to five."""
    sources = [record_of(rounds=rounds)[0]["source"] for rounds in (3, 5, 20, 100_000)]
    assert sources == ["trial", "cache", "cache", "trial"]
    assert len(json.loads(cache.read_text())) == 2


def test_a_pinned_plan_is_taken_whatever_is_remembered():
    record_of()
    for text in ("lean", "vmap", "stacked:chunk=5"):
        record, _ = record_of(plan=text)
        assert (record["plan"], record["source"]) == (text, "pinned")


def test_a_remembered_plan_of_a_model_that_only_looks_the_same_is_not_trusted(monkeypatch):
    monkeypatch.setattr(choose, "_fastest", lambda seconds: EnginePlan("stacked"))
    record_of(lambda: nn.Sequential(nn.Linear(6, 3)))
    monkeypatch.undo()
    record, _ = record_of(lambda: nn.Sequential(Sorted(6, 3)))
    assert record["source"] == "trial"
    assert "stacked" in record["refused"] or "stacked" in record["seconds_per_client"]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1', "\x00"])
def test_a_broken_file_costs_a_trial(cache, text):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert record_of()[0]["source"] == "trial"
    assert record_of()[0]["source"] == "cache"


def test_entries_of_another_version_cost_a_trial(cache):
    record_of()
    entries = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: {"plan": "no-such-kernel"} for key in entries}))
    assert record_of()[0]["source"] == "trial"


def test_a_cache_that_cannot_be_written_is_no_error(cache):
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where the folder should be")
    assert record_of()[0]["source"] == "trial"


def test_the_file_does_not_grow_for_ever(cache, monkeypatch):
    monkeypatch.setattr(plan_cache, "KEPT", 2)
    for name in "abc":
        plan_cache.remember(name, {"plan": name})
    assert list(json.loads(cache.read_text())) == ["b", "c"]
    assert plan_cache.recall("a") is None
    assert plan_cache.recall("c") == {"plan": "c"}


@pytest.mark.parametrize(("most", "tried"), [(100, [5, 10, 20, 40, 100]), (10, [5, 10]), (5, [5])])
def test_no_trial_of_a_chunk_that_leaves_a_small_one_behind(most, tried):
    asked = []

    def measure(plan, clients, best):
        asked.append(clients)
        return 1e-3 / clients

    assert list(choose._climb(EnginePlan("stacked"), 5, most, measure))[-1].chunk is None
    assert asked == tried


@pytest.mark.slow
def test_compiled_steps_are_tried_where_a_run_is_long(monkeypatch):
    monkeypatch.setattr(choose, "LONG", 0.0)
    record, delta = record_of()
    seconds = record["seconds_per_client"]
    assert {"stacked:compile", "vmap:compile"} <= seconds.keys()
    assert record["refused"] == {"grouped": "it has no convolution"}
    monkeypatch.undo()
    _, plain = record_of(plan="stacked")
    for name, d in plain.items():
        torch.testing.assert_close(delta[name], d)


@pytest.mark.slow
def test_a_trial_goes_on_where_nothing_can_be_compiled(tmp_path):
    """In a process of its own: torch looks for a compiler once."""
    program = """if True:
        import sys
        from umbel.core.run_file import resolve
        from umbel.simulations import choose
        from umbel.simulations.simulate import simulate
        from umbel.server.store import RunStore

        choose.LONG = 0.0
        table = {"store": sys.argv[1], "rounds": 1, "processes": 0}
        run = {"run": table, "data": {"name": "digits"}, "task": {"kind": "classification"}}
        done = simulate(resolve(run))
        print(RunStore(sys.argv[1]).get(done.run_id).engine_plan)
    """
    place = {
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", program, str(tmp_path / "store")]
    done = subprocess.run(
        command, env={**os.environ, **place}, capture_output=True, text=True, check=True
    )
    record = ast.literal_eval(done.stdout.splitlines()[-1])
    assert record["source"] == "trial"
    assert "compile" not in record["plan"]
    assert "cannot be compiled" in record["refused"]["vmap:compile"]
