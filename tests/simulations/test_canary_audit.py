from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.privacy import clipping, sources
from umbel.privacy.per_example.clipped import Bounds
from umbel.server import private
from umbel.simulations.audits.canary import Audit, audit
from umbel.simulations.audits.canary_parts import coins

UNITS = ("example", "client")
PROMISED = {"example": 1.0, "client": 2.0}


def run(unit: str, **privacy: Any) -> RunFile:
    tables: dict[str, Any] = {
        "run": {"rounds": 1, "seed": 3, "processes": 0, "engine_plan": "lean"},
        "data": {"name": "digits", "split": {"kind": "iid", "clients": 10}},
        "task": {"kind": "classification"},
        "client": {"lr": 0.1, "batch_size": "full", "local_steps": 1},
        "privacy": {
            k: v
            for k, v in {"unit": unit, "epsilon": PROMISED[unit], **privacy}.items()
            if v is not None
        },
    }
    return resolve(tables)


def found(unit: str, **privacy: Any) -> Audit:
    # Examples by the client that real sites have; clients many at once, to be quick.
    engine = "sequential" if unit == "example" else "vectorised"
    return audit(run(unit, **privacy), canaries=1000, confidence=0.99, engine=engine)


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_right_passes(unit: str) -> None:
    result = found(unit)
    assert result.theory == pytest.approx(PROMISED[unit], abs=1e-3)
    assert not result.violated
    assert result.bound.epsilon < PROMISED[unit]
    # mu is 0.27 or 0.5, and its standard error 0.063.
    assert 0.3 < result.estimate.epsilon / PROMISED[unit] < 1.7
    # Canaries that took part are where the model went.
    assert result.scores[result.included].mean() > result.scores[~result.included].mean()


def no_bounds(self: Bounds, squares: Any) -> Any:
    first = next(iter(squares.values()))
    return dict.fromkeys(squares, torch.ones_like(first)), torch.ones_like(first, dtype=torch.bool)


def plant(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add = sources._seeded

    def with_less(factor: float) -> Callable[..., Any]:
        return lambda tree, std, generator: add(tree, std * factor, generator)

    if bug == "noise / 4":
        monkeypatch.setattr(sources, "_seeded", with_less(0.25))
    elif bug == "no noise":
        monkeypatch.setattr(sources, "_seeded", with_less(0.0))
    else:
        monkeypatch.setattr(Bounds, "factors", no_bounds)
        monkeypatch.setattr(
            private, "zeroing", lambda *given: clipping.FlatClip(1e9, not_finite="zero")
        )


@pytest.mark.parametrize("bug", ["noise / 4", "clipping off", "no noise"])
@pytest.mark.parametrize("unit", UNITS)
def test_planted_bugs_are_caught(unit: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(bug, monkeypatch)
    result = found(unit)
    assert result.theory == pytest.approx(
        PROMISED[unit], abs=1e-3
    )  # the ledger knows nothing of the bug
    assert result.violated
    assert result.bound.epsilon > 1.2 * PROMISED[unit]
    assert result.estimate.epsilon > 2.5 * PROMISED[unit]


@pytest.mark.parametrize("clip", ["per-layer", "adaptive"])
def test_other_clips_pass(clip: str) -> None:
    assert not found("example", clipping=clip).violated


def test_sampled_batches_and_many_steps_pass() -> None:
    given = run("example", epsilon=None, noise_multiplier=1.0, accountant="rdp")
    tables = given.model_dump(exclude_none=True)
    tables["client"] = {"lr": 0.1, "batch_size": 100, "local_epochs": 1}
    result = audit(resolve(tables), canaries=600, engine="sequential")
    assert not result.violated
    assert result.bound.epsilon < result.theory < 10


def test_no_promise_nothing_to_audit() -> None:
    with pytest.raises(InputError, match="nothing is promised"):
        audit(resolve({"data": {"name": "digits"}, "task": {"kind": "classification"}}))


def test_without_a_guarantee_nothing_is_broken() -> None:
    result = found("example", epsilon=None, noise_multiplier=0.0)
    assert result.theory == float("inf")
    assert not result.violated
    assert result.bound.epsilon > 3


def test_coins_are_fair_and_repeat() -> None:
    drawn = coins(5, 20_000)
    assert abs(int(drawn.sum()) - 10_000) < 5 * 71
    assert np.array_equal(drawn[:100], coins(5, 100))
    assert not np.array_equal(drawn, coins(6, 20_000))


def test_findings_are_plain_values() -> None:
    result = found("example")
    assert result.as_json()["canaries"] == 1000
    worse = dataclasses.replace(result, theory=0.0, bound=result.bound._replace(epsilon=0.1))
    assert worse.as_json()["violated"]
