"""Sums of small tensors in one operation are those of a loop, to the bit, however grouped."""

from __future__ import annotations

import pytest
import torch

from umbel.core.payloads import Updates
from umbel.core.trees import Tree
from umbel.strategies.parts.combine import weighted_mean

CLIENTS = 37
SHAPES = [(), (1,), (2,), (3,), (7, 1), (1, 9), (4, 5, 3, 2), (1024,)]


def looped(stack: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(stack.shape[1:], dtype=torch.float64)
    for row, weight in zip(stack, weights, strict=True):
        total = total + row.double() * weight
    return total


def summed(model: Tree, stack: torch.Tensor, weights: torch.Tensor, size: int) -> torch.Tensor:
    combiner = weighted_mean()
    sums = combiner.zero(model)
    for begin in range(0, CLIENTS, size):
        part = slice(begin, begin + size)
        clients = [f"c{i}" for i in range(CLIENTS)][part]
        sums = combiner.add(sums, Updates(1, clients, {"w": stack[part]}, weights[part]))
    assert sums.weight == pytest.approx(float(weights.sum()))
    return sums.delta["w"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_one_operation_is_the_loop(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(len(shape))
    stack = (torch.randn(CLIENTS, *shape, generator=draws) * 100).to(dtype)
    weights = torch.rand(CLIENTS, generator=draws, dtype=torch.float64) + 0.1
    model = {"w": torch.zeros(shape)}
    expected = looped(stack, weights)
    for size in (CLIENTS, 5, 1):
        assert torch.equal(summed(model, stack, weights, size), expected)


def test_a_channels_last_model_is_summed_where_it_stands() -> None:
    stack = torch.randn(CLIENTS, 2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    weights = torch.ones(CLIENTS, dtype=torch.float64)
    model = {"w": torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)}
    found = summed(model, stack, weights, 7)
    assert torch.equal(found, looped(stack, weights))
