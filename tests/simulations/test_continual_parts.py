"""Defences that change the model, or how it is asked; and clients that are not in step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.datasets.federated import take
from umbel.server.course_asking import Asked, class_means
from umbel.server.records import RoundRecord
from umbel.simulations.continual import Local
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import Outcome, check, simulate
from umbel.strategies.defences.adapters import Adapted
from umbel.strategies.defences.columns import Columns
from umbel.tasks.features import features


def table(store: Path, defence: Any = "naive", **sections: Any) -> RunFile:
    whole: dict[str, Any] = {
        "run": {"rounds": 6, "seed": 3, "store": str(store), "checkpoint_seconds": 0.0},
        "data": {"name": "digits", "holdout": 0.5, "split": {"kind": "iid", "clients": 3}},
        "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [16]}},
        "client": {"lr": 0.01, "optimizer": "adam", "device": "cpu"},
        "evaluate": {"every": 0},
        "continual": {"experiences": 3, "defence": defence},
    }
    for section, keys in sections.items():
        whole[section] = {**whole.get(section, {}), **keys}
    return resolve(whole)


def final(outcome: Outcome) -> dict[str, Tensor]:
    assert outcome.model is not None
    return safetensors.torch.load_file(outcome.model)


@pytest.mark.parametrize(
    ("defence", "hidden"), [({"name": "adapters", "rank": 8}, [16]), ("columns", [8])]
)
def test_parts_of_their_own_forget_nothing(tmp_path: Path, defence: Any, hidden: list[int]) -> None:
    """Not even under momentum at the server, which would go on moving what was trained."""
    sections = {
        "continual": {"head": "multi"},
        "task": {"model": {"name": "mlp", "hidden": hidden}},
        "strategy": {"name": "fedavgm", "momentum": 0.5},
        "client": {"weight_decay": 0.01, "local_epochs": 4},
        "evaluate": {"every": 2},
    }
    found = simulate(table(tmp_path, defence, **sections), engine="sequential").continual
    assert found["bwt"] == 0.0
    assert found["forgetting"] == 0.0
    assert found["acc"] > 0.7


@pytest.mark.parametrize("defence", ["adapters", "columns"])
def test_engines_agree_on_a_model_with_parts(tmp_path: Path, defence: str) -> None:
    multi = {"continual": {"head": "multi"}}
    alone = final(simulate(table(tmp_path, defence, **multi), engine="sequential"))
    plan = {"run": {"engine_plan": "vmap", "processes": 0}}
    said: list[str] = []
    together = final(simulate(table(tmp_path, defence, **multi, **plan), announce=said.append))
    assert not said
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-3)


def test_adapters_begin_as_nothing() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    x, at = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    wanted = base(x)
    adapted = Adapted(base, 3, 2)
    torch.testing.assert_close(adapted(x, experience=at), wanted)
    with torch.no_grad():
        adapted.get_parameter("base.1.up.1").add_(1.0)
    changed = adapted(x, experience=at)
    assert torch.equal((changed != wanted).any(1), at == 1)


def test_a_column_reads_those_before_it_and_is_read_by_none_of_them() -> None:
    torch.manual_seed(0)
    columns = Columns(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), 2)
    x, at = torch.randn(4, 6), torch.tensor([0, 0, 1, 1])
    before = columns(x, experience=at)
    h = [layer[0](x) for layer in columns.columns]
    across = columns.get_submodule("laterals.1.2.0")
    wanted = columns.get_submodule("columns.1.2")(h[1].relu()) + across(h[0].relu())
    torch.testing.assert_close(before[2:], wanted[2:])
    with torch.no_grad():
        columns.get_parameter("columns.1.0.weight").add_(1.0)
    assert torch.equal(columns(x, experience=at)[:2], before[:2])
    before[2:].sum().backward()
    assert not columns.get_parameter("columns.0.0.weight").grad.any()  # type: ignore[union-attr]


def test_class_means_are_those_of_all_clients_examples(tmp_path: Path) -> None:
    """In the linear model's features, the pictures themselves, and under masks as well."""
    run = table(tmp_path, "ncm", task={"model": "logistic"})
    prepared = prepare(run)
    ground = Local(prepared, "sequential", print)
    data = ground.memory.distinct(0, None)
    rows = np.concatenate([ground.stream.met(p, 0) for p in range(3)])
    part = take(data.train, rows)
    x = torch.from_numpy(part["x"]).flatten(1)
    x = x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(features(prepared.task, prepared.module, part), x)
    masked = {"enabled": True, "accounting_only": True}
    for section in ({}, masked):
        by = resolve({**run.model_dump(), "secure_aggregation": section}) if section else run
        asked = Asked(by, ground, prepared.task, 0, 0, prepared.model(), "", None)
        found = class_means(asked, 10, x.shape[1])
        seen = np.unique(part["y"])
        assert torch.equal(found.known.nonzero().flatten(), torch.from_numpy(seen))
        for label in seen:
            mean = x[torch.from_numpy(part["y"] == label)].mean(0)
            torch.testing.assert_close(found.means[label], mean / mean.norm(), atol=1e-3, rtol=1e-3)


def test_nearest_means_tell_classes_that_the_last_layer_forgot(tmp_path: Path) -> None:
    longer = {"client": {"local_epochs": 4}}
    plain = simulate(table(tmp_path, **longer), engine="sequential").continual
    ncm = table(tmp_path, {"name": "ncm", "per_class": 5}, **longer)
    found = simulate(ncm, engine="sequential").continual
    assert found["acc"] > plain["acc"] + 0.4


@pytest.mark.parametrize(
    "defence", [{"name": "replay", "choice": "herding", "per_class": 3}, "ncm"]
)
def test_herding_goes_on_with_the_same_bits(tmp_path: Path, defence: Any) -> None:
    run = table(tmp_path, defence)
    whole = simulate(run, engine="sequential")

    def cut(record: RoundRecord, rounds: int) -> None:
        if record.round == 5:
            raise KeyboardInterrupt

    first = simulate(run, engine="sequential", on_round=cut)
    second = simulate(run, engine="sequential", resume=first.run_id)
    left, right = final(whole), final(second)
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert second.continual == whole.continual


def test_clients_that_are_behind(tmp_path: Path) -> None:
    staggered = {"continual": {"order": "staggered", "lag": 1}, "run": {"rounds": 8}}
    run = table(tmp_path, {"name": "der", "per_class": 5}, **staggered)
    ground = Local(prepare(run), "sequential", print)
    assert sorted(ground.stream.times.order.tolist()) == [[0, 0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 2]]
    (late,) = np.flatnonzero(ground.stream.times.order[:, 1] == 0)
    assert ground.stream.times.earlier(int(late), 2) == {0: 1}
    assert ground.stream.times.earlier(int(late), 1) == {}
    assert [ground.stream.times.leaves(int(late), s) for s in range(4)] == [False, True, True, True]
    found = simulate(run, engine="sequential").continual
    assert np.array(found["matrix"]).shape == (4, 3)
    assert {"acc", "bwt", "forgetting", "fwt"} <= found.keys()
    ewc = table(tmp_path, {"name": "ewc", "examples": 3}, **staggered)
    assert simulate(ewc, engine="sequential").status == "finished"


def test_intransigence_is_measured_against_all_at_once(tmp_path: Path) -> None:
    reference = {"continual": {"reference": True}, "data": {"client_holdout": 0.3}}
    found = simulate(table(tmp_path, **reference), engine="sequential").continual
    own = [found["matrix"][j][j] for j in range(3)]
    wanted = np.mean(np.array(found["joint"]) - own)
    assert found["intransigence"] == pytest.approx(wanted)
    for each in found["per_client"].values():
        assert {"fwt", "intransigence"} <= each.keys()


def test_experiences_by_a_column(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    year = generator.integers(2018, 2022, 400)
    y = generator.integers(0, 3, 400)
    x = generator.normal(size=(400, 5)) + 2 * np.eye(3, 5)[y] + (year - 2018)[:, None]
    np.savez(tmp_path / "own.npz", x=x, y=y, year=year)
    data = {"name": "npz", "path": str(tmp_path / "own.npz"), "columns": ["year"]}
    by = {"by": "column", "column": "year", "experiences": 2}
    run = table(tmp_path, data=data, continual=by)
    stream = Local(prepare(run), "sequential", print).stream
    assert (stream.of_row == (stream.data.train["year"] >= 2020)).all()
    found = simulate(run, engine="sequential").continual
    assert np.isfinite(np.array(found["matrix"], dtype=float)).all()
    with pytest.raises(InputError, match="has 4 values"):
        simulate(table(tmp_path, data=data, continual={**by, "experiences": 5}, run={"rounds": 5}))
    with pytest.raises(InputError, match="no column 'month'"):
        simulate(table(tmp_path, data=data, continual={**by, "column": "month"}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"continual": {"defence": "adapters"}}, "needs to know which experience"),
        (
            {
                "continual": {"defence": "columns", "head": "multi", "order": "staggered"},
                "run": {"rounds": 8},
            },
            "needs to know which experience",
        ),
        ({"continual": {"order": "staggered", "lag": 2}}, "do not divide evenly by 5"),
        ({"continual": {"lag": 2}}, "lag is of order"),
        ({"continual": {"by": "column"}}, "go together"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate(table(tmp_path, **sections), engine="sequential")


def test_a_check_counts_what_a_defence_adds(tmp_path: Path) -> None:
    plain = check(table(tmp_path))
    assert plain["parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    multi = {"continual": {"head": "multi"}}
    parted = check(table(tmp_path, {"name": "adapters", "rank": 2}, **multi))
    assert parted["parameters"] == plain["parameters"] + 2 * (2 * (64 + 16) + 16 * 10 + 10)
    ewc = check(table(tmp_path, "ewc"))
    assert ewc["bytes_per_client_round"] == 2 * plain["bytes_per_client_round"]
