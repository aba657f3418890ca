from __future__ import annotations

import math

import pytest
import torch

from umbel.core.payloads import Updates
from umbel.server.gate import Gate, weight_cap

MODEL = {
    "fc.weight": torch.zeros(10, 4),
    "fc.bias": torch.zeros(10),
    "count": torch.zeros((), dtype=torch.int64),
}


def honest(clients: list[str], round_number: int = 4) -> Updates:
    count = len(clients)
    delta = {n: torch.ones(count, *t.shape, dtype=t.dtype) for n, t in MODEL.items()}
    return Updates(round_number, clients, delta, torch.full((count,), 7.0, dtype=torch.float64))


def gate(cap: float = math.inf) -> Gate:
    return Gate(4, ["a", "b", "c"], MODEL, cap)


def test_honest_updates_pass_untouched() -> None:
    update = honest(["a", "b", "c"])
    passed = gate().check(update)
    assert passed.updates is update
    assert not passed.failures
    assert not passed.capped


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["fc.weight", "fc.bias"])
def test_one_client_that_is_not_finite_is_named_and_the_others_stay(
    name: str, value: float
) -> None:
    update = honest(["a", "b", "c"])
    update.delta[name][1].view(-1)[3] = value
    passed = gate().check(update)
    assert passed.updates.clients == ["a", "c"]
    assert passed.updates.delta[name].shape[0] == 2
    [failure] = passed.failures
    assert failure.client == "b"
    assert failure.reason == f"delta '{name}' has 1 value(s) NaN or infinite"


def test_values_whose_sum_overflows_are_finite() -> None:
    update = honest(["a"])
    update.delta["fc.bias"].fill_(3e38)
    assert gate().check(update).updates.clients == ["a"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fc.bias": None}, "delta lacks 'fc.bias'"),
        ({"extra": torch.zeros(1, 2)}, "delta has unknown 'extra'"),
        ({"fc.bias": torch.zeros(1, 62)}, "delta 'fc.bias' has shape (62,), expected (10,)"),
        ({"fc.bias": torch.zeros(1, 1)}, "delta 'fc.bias' has shape (1,), expected (10,)"),
        ({"fc.bias": torch.zeros(1)}, "delta 'fc.bias' has shape (), expected (10,)"),
        ({"fc.bias": torch.zeros(10)}, "delta 'fc.bias' has shape (), expected (10,)"),
        ({"fc.bias": torch.zeros(1, 10).double()}, "delta 'fc.bias' is float64, expected float32"),
        ({"count": torch.zeros(1)}, "delta 'count' is float32, expected int64"),
    ],
)
def test_wrong_structure_is_refused(change: dict[str, torch.Tensor | None], reason: str) -> None:
    update = honest(["a"])
    delta = {n: t for n, t in {**update.delta, **change}.items() if t is not None}
    passed = gate().check(Updates(4, ["a"], delta, update.weights))
    assert not passed.updates.clients
    assert passed.failures[0].reason.startswith(reason)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (math.nan, "weight nan is not finite"),
        (math.inf, "weight inf is not finite"),
        (0.0, "weight 0 is not positive"),
        (-791.0, "weight -791 is not positive"),
    ],
)
def test_weights_are_finite_and_positive(weight: float, reason: str) -> None:
    update = honest(["a", "b"])
    update.weights[0] = weight
    passed = gate().check(update)
    assert passed.updates.clients == ["b"]
    assert passed.failures[0].reason == reason


def test_a_weight_above_the_cap_is_lowered_and_named() -> None:
    update = honest(["a", "b"])
    update.weights[0] = 1e12
    passed = gate(cap=70).check(update)
    assert passed.updates.weights.tolist() == [70, 7]
    assert passed.capped == ["a"]
    assert update.weights[0] == 1e12


def test_weights_of_another_shape_are_refused() -> None:
    update = honest(["a", "b"])
    passed = gate().check(Updates(4, ["a", "b"], update.delta, torch.ones(3).double()))
    assert [f.client for f in passed.failures] == ["a", "b"]


def test_each_client_counts_once_and_only_when_asked_and_in_its_round() -> None:
    one = gate()
    assert one.check(honest(["a"])).updates.clients == ["a"]
    again = one.check(honest(["a", "b"]))
    assert again.updates.clients == ["b"]
    assert again.failures[0].reason == "answered twice; the first answer stands"
    stranger = one.check(honest(["z"]))
    assert stranger.failures[0].reason == "was not asked in this round"
    late = one.check(honest(["c"], round_number=3))
    assert late.failures[0].reason == "answers round 3, this is round 4"
    assert one.check(honest(["c"])).updates.clients == ["c"]


def test_cap_is_ten_times_the_median_unless_stated() -> None:
    assert weight_cap([10, 20, 1000], None) == 200
    assert weight_cap([10, 20, 1000], 5000.0) == 5000
