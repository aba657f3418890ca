"""Clients with adapters of different ranks in one run: what is merged is their exact mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from umbel.core.errors import InputError
from umbel.core.payloads import TrainPlan, Updates
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model, flatten
from umbel.server.rounds import step
from umbel.server.store import RunStore
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import simulate
from umbel.strategies.parts.low_rank import pairs
from umbel.strategies.parts.ranks import rank_of

RANKS = {"anne": 2, "brutus": 4}
LARGEST = 8
"""Of the adapter, and so of cassius, who is not named."""

SPEECH = "To be, or not to be, that is the question. "


@pytest.fixture(scope="module")
def plays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plays")
    for shift, name in enumerate(("anne", "brutus", "cassius")):
        (folder / f"{name}.txt").write_text(SPEECH[7 * shift :] + SPEECH * (shift + 2))
    return folder


def make(plays: Path, store: Path, name: str, ranks: Any = RANKS, **more: Any) -> RunFile:
    return resolve(
        {
            "run": {"rounds": 2, "store": str(store), "processes": 0},
            "data": {"name": "text", "path": str(plays), "window": 8, "client_holdout": 0.2},
            "task": {
                "kind": "language-model",
                "model": {"name": "gpt", "layers": 1, "width": 16, "heads": 2},
                "adapter": {"kind": "lora", "rank": LARGEST, "residual": name == "flora"},
            },
            "client": {
                "optimizer": "adamw",
                "weight_decay": 0.1,
                "lr": 0.02,
                "local_steps": 3,
                "batch_size": 8,
            },
            "strategy": {"name": name, "ranks": ranks},
            "evaluate": {"per_client": False},
            **more,
        }
    )


def model(run: RunFile, store: Path, engine: str) -> Model:
    last = RunStore(store).latest(simulate(run, engine=engine).run_id)
    assert last is not None
    return last.model


@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_ranks_of_two_four_and_eight_in_one_run(plays: Path, tmp_path: Path, name: str) -> None:
    run = make(plays, tmp_path, name)
    prepared = prepare(run)
    strategy, start = prepared.strategy, model(run, tmp_path, "vectorised")
    federation = sequential(run, prepared.data, prepared.task, strategy.client)
    shared = flatten({})
    plan = TrainPlan(1, list(prepared.data.names), start, 3, shared=shared, uploads=shared)
    combined, total, weight = strategy.combine.zero(start.tensors()), {}, 0.0
    for item in federation.train(plan):
        assert isinstance(item, Updates)
        combined = strategy.combine.add(combined, item)
        rank = RANKS.get(item.clients[0], LARGEST)
        for pair in pairs(start.params):
            b = start.params[pair.b].double() + item.delta[pair.b][0].double()
            a = start.params[pair.a].double() + item.delta[pair.a][0].double()
            assert not b[:, rank:].any()
            assert int(torch.linalg.matrix_rank(b @ a)) == rank
            total[pair.layer] = total.get(pair.layer, 0) + float(item.weights[0]) * (b @ a)
        weight += float(item.weights[0])
    after, _ = step(strategy, start, strategy.init(start.params), strategy.combine.finish(combined))
    for pair in pairs(start.params):
        mean = total[pair.layer] / weight
        found = after.params[pair.b].double() @ after.params[pair.a].double()
        if name == "flora":
            found += (after.buffers[pair.residual] - start.buffers[pair.residual]).double()
            assert float((found - mean).norm() / mean.norm()) < 1e-6
        else:
            beyond = torch.linalg.svdvals(mean)[LARGEST:].norm()
            assert float((found - mean).norm()) == pytest.approx(float(beyond), rel=1e-3)


@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_engines_agree(plays: Path, tmp_path: Path, name: str) -> None:
    run = make(plays, tmp_path, name)
    expected, found = (model(run, tmp_path, engine) for engine in ("sequential", "vectorised"))
    for key, tensor in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[key], tensor, atol=1e-5, rtol=1e-3)


def test_noise_moves_no_rank_that_a_client_has_not(plays: Path, tmp_path: Path) -> None:
    privacy = {"unit": "example", "noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 1e-3}
    run = make(plays, tmp_path, "flora", dict.fromkeys(("anne", "brutus", "cassius"), 2))
    prepared = prepare(run.model_copy(update={"privacy": type(run.privacy)(**privacy)}))
    start = prepared.model()
    federation = sequential(prepared.run, prepared.data, prepared.task, prepared.strategy.client)
    for item in federation.train(TrainPlan(1, list(prepared.data.names), start, 3)):
        assert isinstance(item, Updates)
        for pair in pairs(start.params):
            assert item.delta[pair.b][0, :, :2].any()
            assert not item.delta[pair.b][0, :, 2:].any()


def test_a_list_gives_each_client_one_by_its_name() -> None:
    dealt = [rank_of((2, 4, 8), f"client{i}") for i in range(300)]
    assert dealt == [rank_of((2, 4, 8), f"client{i}") for i in range(300)]
    assert min(dealt.count(rank) for rank in (2, 4, 8)) > 60


def test_a_rank_that_the_adapter_has_not_is_refused(plays: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a client of rank 16, and adapters of rank 8"):
        simulate(make(plays, tmp_path, "flora", [4, 16]))


def test_a_name_that_no_client_has_is_refused(plays: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no client is called 'ann'; did you mean 'anne'"):
        simulate(make(plays, tmp_path, "flexlora", {"ann": 2, "brutus": 4}))
