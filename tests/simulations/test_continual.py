"""Runs over experiences: limits, engines, resuming, and what clients measure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from umbel.cli import main
from umbel.core.errors import InputError, RefusedError
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model
from umbel.datasets.federated import take
from umbel.server.continual import name
from umbel.server.course_asking import Asked, importance
from umbel.server.records import RoundRecord
from umbel.server.serve import serve
from umbel.simulations.continual import Local
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import Outcome, simulate
from umbel.strategies.defences import agem
from umbel.strategies.parts.defence import Measure


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def run(store: Path, defence: Any = "naive", engine: str = "sequential", **sections: Any) -> Any:
    said: list[str] = []
    outcome = simulate(table(store, defence, **sections), engine=engine, announce=said.append)
    assert not said
    assert not any(record.failures for record in outcome.history)
    return final(outcome)


@pytest.fixture(scope="module")
def naive(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("naive"))


def same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> bool:
    return all(torch.allclose(left[n], right[n], rtol=0, atol=tolerance) for n in left)


@pytest.mark.parametrize(
    ("defence", "tolerance"),
    [
        ({"name": "ewc", "strength": 0.0, "examples": 3}, 0.0),
        ({"name": "mas", "strength": 0.0, "examples": 3}, 0.0),
        ({"name": "lwf", "strength": 0.0}, 0.0),
        ({"name": "si", "strength": 0.0}, 0.0),
        ({"name": "replay", "examples": 0}, 0.0),
        ({"name": "der", "examples": 0}, 1e-5),
        ({"name": "agem", "examples": 0}, 1e-4),
    ],
)
def test_a_defence_of_strength_nought_is_naive(
    tmp_path: Path, naive: dict[str, Tensor], defence: dict[str, Any], tolerance: float
) -> None:
    assert same(run(tmp_path, defence), naive, tolerance)


@pytest.mark.parametrize(
    "defence",
    [
        {"name": "ewc", "strength": 500.0, "examples": 10},
        {"name": "si", "strength": 1.0},
        {"name": "lwf", "strength": 1.0},
        {"name": "der", "per_class": 5},
        {"name": "agem", "per_class": 5},
    ],
)
def test_engines_agree(tmp_path: Path, naive: dict[str, Tensor], defence: dict[str, Any]) -> None:
    together = run(tmp_path, defence, "vectorised", run={"engine_plan": "vmap", "processes": 0})
    alone = run(tmp_path, defence)
    assert same(together, alone, 1e-3)
    assert not same(alone, naive, 1e-2)


@pytest.mark.parametrize("stop", [4, 5])
@pytest.mark.parametrize("defence", ["der", {"name": "ewc", "strength": 50.0, "examples": 5}])
def test_a_run_that_is_cut_off_ends_with_the_same_bits(
    tmp_path: Path, defence: Any, stop: int
) -> None:
    whole = simulate(table(tmp_path, defence), engine="sequential")

    def cut(record: RoundRecord, rounds: int) -> None:
        if record.round == stop:  # 4: the end of an experience; 5: within the third
            raise KeyboardInterrupt

    first = simulate(table(tmp_path, defence), engine="sequential", on_round=cut)
    assert (first.status, first.rounds) == ("interrupted", stop)
    second = simulate(table(tmp_path, defence), engine="sequential", resume=first.run_id)
    left, right = final(whole), final(second)
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert second.continual == whole.continual


def test_replay_without_a_bound_is_joint_training(tmp_path: Path) -> None:
    prepared = prepare(table(tmp_path, {"name": "replay", "examples": 10**6, "repeat": False}))
    ground = Local(prepared, "sequential", print)
    for stage in range(3):
        data = ground.memory.data(stage, None)
        for place in range(3):
            held = prepared.data.train_holdings.of_client(place)
            seen = held[ground.stream.of_row[held] <= stage]
            assert sorted(data.train_holdings.of_client(place)) == sorted(seen)


def test_replay_remembers_and_naive_forgets(tmp_path: Path) -> None:
    longer = {"client": {"local_epochs": 4}}
    plain = simulate(table(tmp_path, **longer), engine="sequential").continual
    replay = simulate(table(tmp_path, "replay", **longer), engine="sequential").continual
    assert plain["matrix"][2][0] < 0.1 < 0.6 < replay["matrix"][2][0]
    assert replay["acc"] > plain["acc"] + 0.3
    assert plain["forgetting"] > 0.5
    assert len(plain["before"]) == 3


def test_heads(tmp_path: Path) -> None:
    """A head for each experience is right more often; one that grows gives no class unseen."""
    multi = simulate(table(tmp_path, continual={"head": "multi"}), engine="sequential")
    single = simulate(table(tmp_path), engine="sequential")
    assert multi.continual["acc"] > single.continual["acc"]
    growing = simulate(table(tmp_path, continual={"head": "growing"}), engine="sequential")
    assert np.triu(growing.continual["matrix"], 1).max() == 0.0
    assert "experience-1/share" not in growing.metrics
    assert name(0) in growing.metrics


def test_each_client_has_a_matrix(tmp_path: Path) -> None:
    run = table(tmp_path, data={"holdout": 0.0, "client_holdout": 0.4})
    found = simulate(run, engine="sequential").continual
    assert len(found["per_client"]) == 3
    for each in found["per_client"].values():
        assert np.array(each["matrix"]).shape == (3, 3)
    clients = np.array([c["matrix"] for c in found["per_client"].values()], dtype=float)
    assert clients.min() <= np.array(found["matrix"]).mean() <= clients.max()


def test_orders_of_their_own(tmp_path: Path) -> None:
    shuffled = table(tmp_path, continual={"experiences": 3, "order": "shuffled"})
    ground = Local(prepare(shuffled), "sequential", print)
    assert len({tuple(row) for row in ground.stream.times.order.tolist()}) > 1
    assert simulate(shuffled, engine="sequential").status == "finished"


def measured(tmp_path: Path, measure: Measure) -> tuple[Model, dict[str, Tensor], Any]:
    """The importance for a linear model, over the examples of the first experience."""
    run = table(
        tmp_path,
        task={"model": "logistic"},
        data={"holdout": 0.9, "split": {"kind": "iid", "clients": 3}},
    )
    prepared = prepare(run)
    ground = Local(prepared, "sequential", print)
    model = prepared.model()
    asked = Asked(run, ground, prepared.task, 0, 2, model, "", None)
    return model, dict(importance(asked, measure)), ground


def logits(model: Model, x: Tensor) -> Tensor:
    weight, bias = model.params.values()
    return x @ weight.T + bias


def test_the_fisher_information_of_a_linear_model_is_that_of_the_formula(tmp_path: Path) -> None:
    # So many steps that each client passes over its examples a whole number of times.
    prepared = prepare(table(tmp_path, data={"holdout": 0.9}))
    sizes = [len(Local(prepared, "sequential", print).stream.met(place, 0)) for place in range(3)]
    model, found, ground = measured(tmp_path, Measure(torch.square, int(np.lcm.reduce(sizes))))
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.params.items()}
    count = 0
    for place in range(3):
        rows = ground.stream.met(place, 0)
        part = take(ground.stream.data.train, rows)
        x, y = torch.from_numpy(part["x"]).flatten(1), torch.from_numpy(part["y"])
        off = (logits(model, x).softmax(1) - torch.nn.functional.one_hot(y, 10)).double()
        weight, bias = total
        total[weight] += torch.einsum("bi,bj->ij", off**2, x.double() ** 2)
        total[bias] += (off**2).sum(0)
        count += len(rows)
    for tensor, wanted in total.items():
        torch.testing.assert_close(found[tensor].double(), wanted / count, rtol=1e-4, atol=1e-8)


def test_a_run_over_experiences_goes_with_strategies_and_secure_sums(tmp_path: Path) -> None:
    ewc = {"name": "ewc", "strength": 50.0, "examples": 5}
    sgd = {"optimizer": "sgd", "lr": 0.05}
    even = {"weights": "uniform"}
    plain = run(tmp_path, ewc, strategy=even, client=sgd)
    masked = {"enabled": True, "accounting_only": True}
    summed = run(tmp_path, ewc, strategy=even, client=sgd, secure_aggregation=masked)
    assert same(plain, summed, 1e-4)
    for strategy in ({"name": "scaffold"}, {"name": "moon", "mu": 0.1}):
        outcome = simulate(
            table(tmp_path, "lwf", strategy=strategy, client=sgd), engine="sequential"
        )
        assert outcome.status == "finished"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"run": {"rounds": 7}}, "do not divide evenly"),
        ({"privacy": {"unit": "client", "noise_multiplier": 1.0}}, "not accounted"),
        ({"attack": {"kind": "sign-flip", "count": 1}}, "no attack knows"),
        ({"evaluate": {"early_stopping": {"patience": 1}}}, "misses experiences"),
        ({"strategy": {"name": "fedbuff"}}, "steps by itself"),
        ({"run": {"rounds": 11}, "continual": {"experiences": 11}}, "10 classes"),
        ({"continual": {"experiences": 3, "defence": "ewk"}}, "unknown defence"),
    ],
)
def test_what_experiences_do_not_go_with(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        simulate(table(tmp_path, **sections), engine="sequential")


def test_clients_that_know_no_experiences_are_not_asked(tmp_path: Path) -> None:
    run = table(tmp_path)
    prepared = prepare(run)
    task, rule = prepared.task, prepared.strategy.client
    with pytest.raises(RefusedError, match="know none"):
        serve(
            run,
            sequential(run, prepared.data, task, rule),
            prepared.data.info,
            engine="flower",
            on_start=print,
            on_round=print,
        )


def test_keys_without_experiences_are_refused() -> None:
    whole = {"data": {"name": "digits"}, "task": {"kind": "classification"}}
    with pytest.raises(InputError, match="single experience"):
        resolve({**whole, "continual": {"defence": "ewc"}})
    again = RunFile.model_validate_json(resolve(whole).model_dump_json())
    assert again == resolve(whole)


def test_the_matrix_is_drawn_from_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = simulate(table(tmp_path), engine="sequential")
    assert outcome.as_json()["continual"]["matrix"] == outcome.continual["matrix"]
    picture = tmp_path / "matrix.png"
    command = ["plot", "--matrix", outcome.run_id, str(picture), "--store", str(tmp_path)]
    assert main.run([*command, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["matrix"] == outcome.continual["matrix"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_clients_without_an_experience_are_not_asked(tmp_path: Path) -> None:
    shards = {"kind": "shards", "clients": 5, "shards_per_client": 1}
    run = table(tmp_path, "replay", data={"split": shards}, strategy={"cohort": 5})
    ground = Local(prepare(run), "sequential", print)
    asked = [
        sum(len(ground.stream.met(place, stage)) > 0 for place in range(5)) for stage in range(3)
    ]
    history = simulate(run, engine="sequential").history
    assert min(asked) < 5
    assert [len(r.participants) for r in history] == [n for n in asked for _ in range(2)]


def test_agem_takes_out_what_goes_against_earlier_examples() -> None:
    g, r = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.0, -4.0])}
    assert agem.projected(g, r)["w"].tolist() == [1.0, 0.0]
    assert agem.projected(g, {"w": -r["w"]})["w"].tolist() == [1.0, 2.0]
    assert agem.projected(g, {"w": torch.zeros(2)})["w"].tolist() == [1.0, 2.0]


def test_agem_forgets_less(tmp_path: Path) -> None:
    longer = {"client": {"local_epochs": 4}, "continual": {"head": "multi"}}
    plain = simulate(table(tmp_path, **longer), engine="sequential").continual
    held = simulate(table(tmp_path, "agem", **longer), engine="sequential").continual
    assert held["bwt"] > plain["bwt"]
