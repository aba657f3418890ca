"""Strategies whose clients keep or send more than deltas, under differential privacy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from umbel.client.private import PARAMETERS_ALONE
from umbel.client.training import ClientRuntime
from umbel.core import run_file
from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.run_file import RunFile
from umbel.core.trees import norm, subtract
from umbel.privacy.clipping import zeroing
from umbel.privacy.sources import seeded_sources
from umbel.server.private_sum import Parts, private_sum
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import check, simulate
from umbel.strategies.build import build_strategy
from umbel.strategies.parts import ClientRule


def made(
    folder: Path, strategy: dict[str, Any], privacy: dict[str, Any], clients: int = 3
) -> RunFile:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 5)).astype(np.float32)
    path = folder / "data.npz"
    np.savez(path, x=x, y=(x[:, 0] > 0).astype(np.int64), client=np.arange(60) % clients)
    return run_file.resolve(
        {
            "run": {"rounds": 3, "store": str(folder / "runs"), "processes": 0},
            "data": {"name": "npz", "path": str(path), "split": {"kind": "natural"}},
            "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [4]}},
            "client": {"batch_size": "full", "lr": 0.3, "local_epochs": 2},
            "strategy": {"weights": "uniform", **strategy},
            "privacy": privacy,
            "evaluate": {"every": 0},
        }
    )


def tensors(run: RunFile) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    outcome = simulate(run, engine="sequential")
    assert outcome.model is not None
    return load_file(outcome.model)


STATEFUL = [
    {"name": "scaffold"},
    {"name": "feddyn"},
    {"name": "fednova"},
    {"name": "fedper"},
    {"name": "lgfedavg", "head": 1},
]
OPEN = {"noise_multiplier": 0.0, "clip_norm": 1e9}


@pytest.mark.parametrize("strategy", STATEFUL[1:4], ids=lambda s: str(s["name"]))
def test_without_noise_and_clipping_it_is_the_strategy_itself(
    tmp_path: Path, strategy: dict[str, Any]
) -> None:
    plain = tensors(made(tmp_path, strategy, {}))
    found = tensors(made(tmp_path, strategy, {"unit": "example", **OPEN}))
    for name, value in plain.items():
        assert torch.allclose(value, found[name], atol=1e-5), name


def test_scaffold_without_noise_and_clipping_is_itself_for_either_unit(tmp_path: Path) -> None:
    plain = tensors(made(tmp_path, {"name": "scaffold"}, {}))
    for unit in ("example", "client"):
        found = tensors(made(tmp_path, {"name": "scaffold"}, {"unit": unit, **OPEN}))
        for name, value in plain.items():
            assert torch.allclose(value, found[name], atol=1e-5), (unit, name)


@pytest.mark.parametrize("strategy", STATEFUL, ids=lambda s: str(s["name"]))
def test_what_a_client_keeps_and_sends_is_made_of_the_noised_gradients_alone(
    tmp_path: Path, strategy: dict[str, Any]
) -> None:
    """Where clipping leaves nothing of an example, its examples leave no trace in anything."""
    run = made(
        tmp_path, strategy, {"unit": "example", "noise_multiplier": 1e12, "clip_norm": 1e-12}
    )
    prepared = prepare(run)
    rule = prepared.strategy.client
    state = prepared.strategy.init(prepared.model().params)
    broadcast = prepared.strategy.broadcast
    left = []
    for turned in (1.0, -1.0):  # other data, of as many examples
        runtime = ClientRuntime(prepared.run, prepared.task, rule, seeded_sources(7))
        examples = prepared.data.train_part(0)
        examples = {**examples, "x": turned * examples["x"]}
        model = prepared.strategy.travelling(prepared.model())
        shared = {} if broadcast is None else broadcast(model.params, state)
        kept = None
        for number in (1, 2):
            learned = runtime.learn(number, "a", examples, model, shared, kept)
            kept = learned.kept or None
        assert learned.updates.metrics == {}
        left.append({**learned.updates.delta, **{f"kept/{n}": t for n, t in learned.kept.items()}})
    one, other = left
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert bool(value.isfinite().all()), name
        assert torch.allclose(value, other[name], rtol=1e-4, atol=1e-6), name
    moved = [float(t.abs().max()) for t in one.values() if t.dtype.is_floating_point]
    assert max(moved) > 1e-3  # the noise is there


def test_a_clients_own_tensors_stay_its_own(tmp_path: Path) -> None:
    run = made(tmp_path, {"name": "fedper"}, {"unit": "example", "noise_multiplier": 1.0})
    prepared = prepare(run)
    rule = prepared.strategy.client
    runtime = ClientRuntime(prepared.run, prepared.task, rule, seeded_sources(7))
    fresh = ClientRuntime(prepared.run, prepared.task, rule, seeded_sources(7))
    model = prepared.strategy.travelling(prepared.model())
    examples = prepared.data.train_part(0)
    runtime.learn(1, "b", prepared.data.train_part(1), model)  # leaves its head in the module
    after_another = runtime.learn(1, "a", examples, model)
    alone = fresh.learn(1, "a", examples, model)
    assert alone.kept.keys() == after_another.kept.keys() != set()
    assert all(torch.equal(t, after_another.kept[n]) for n, t in alone.kept.items())


def test_all_that_a_client_sends_moves_the_sum_by_the_clip_norm_at_most() -> None:
    model = {"w": torch.zeros(3), "b": torch.zeros(2)}
    strategy = build_strategy(run_file.Strategy(name="scaffold"))
    shape = {**model, **strategy.upload_template(model)}
    combiner = private_sum(Parts(zeroing(0.5, list(shape), False), frozenset(), 1.0))

    def summed(rows: list[tuple[float, float]]) -> dict[str, Tensor]:
        delta = {
            n: torch.stack([torch.full(t.shape, row["/" in n]) for row in rows])
            for n, t in shape.items()
        }
        updates = Updates(1, [f"c{i}" for i in range(len(rows))], delta, torch.ones(len(rows)))
        return combiner.add(combiner.zero(shape), updates).sums.delta  # type: ignore[no-any-return]

    honest = [(0.1, 3.0), (-2.0, 0.01)]
    base = summed(honest)
    for value in (0.0, 0.3, 1e30, math.inf, math.nan):
        for upload in (0.0, -0.2, 1e30, -math.inf, math.nan):
            moved = subtract(summed([*honest, (value, upload)]), base)
            assert float(norm(moved)) <= 0.5 * (1 + 1e-12)


@pytest.mark.parametrize(
    ("strategy", "unit", "message"),
    [
        ({"name": "qfedavg"}, "example", "initial_loss"),
        ({"name": "moon"}, "example", "objective"),
        ({"name": "ditto"}, "example", "objective"),
        ({"name": "fednova"}, "client", "would share one clip norm"),
        ({"name": "qfedavg"}, "client", "would share one clip norm"),
    ],
)
def test_refusals(tmp_path: Path, strategy: dict[str, Any], unit: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(made(tmp_path, strategy, {"unit": unit, "noise_multiplier": 1.0}))


def test_parts_that_may_see_examples_are_not_among_the_harmless() -> None:
    """A new part of a rule is refused until somebody has argued that it is harmless."""
    assert set(ClientRule._fields) - PARAMETERS_ALONE >= {"objective", "joint", "initial_loss"}
    assert set(ClientRule._fields) >= PARAMETERS_ALONE
