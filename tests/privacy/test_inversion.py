from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from umbel.core.trees import Tree
from umbel.privacy.audits.inversion import (
    leaked_inputs,
    linear_inputs,
    matched_inputs,
    total_variation,
)


def victim(batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 5))
    picture = torch.zeros(batch, 1, 6, 6)
    for i in range(batch):
        picture[i, 0, 1 + i : 4 + i, 2] = 1.0
    return module, picture, torch.arange(batch) % 5


def gradient_of(module: nn.Module, y: Tensor, x: Tensor) -> Tree:
    params = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
    loss = F.cross_entropy(functional_call(module, params, (x,)), y)
    found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    return dict(zip(params, found, strict=True))


def test_a_linear_layer_gives_its_input_away() -> None:
    module, x, y = victim(1)
    gradient = gradient_of(module, y, x)
    read = linear_inputs(gradient["1.weight"].detach(), gradient["1.bias"].detach())
    assert len(read) == 24
    torch.testing.assert_close(read, x.flatten(1).expand(24, -1), atol=1e-4, rtol=0)


def test_of_a_sum_it_gives_weighted_means() -> None:
    module, x, y = victim(2)
    each = [gradient_of(module, y[i : i + 1], x[i : i + 1]) for i in range(2)]
    total = gradient_of(module, y, x)
    read = linear_inputs(total["1.weight"].detach(), total["1.bias"].detach())
    order = total["1.bias"].detach().abs().argsort(descending=True)
    share = (each[0]["1.bias"] / (each[0]["1.bias"] + each[1]["1.bias"])).detach()[order, None]
    flat = x.flatten(1)
    torch.testing.assert_close(read, share * flat[0] + (1 - share) * flat[1], atol=1e-3, rtol=1e-3)


def test_outputs_that_nothing_moved_say_nothing() -> None:
    assert linear_inputs(torch.zeros(3, 4), torch.zeros(3)).shape == (0, 4)
    weight = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    assert linear_inputs(weight, torch.tensor([0.0, 2.0])).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("batch", [1, 2])
def test_dlg_finds_the_inputs_of_a_gradient(batch: int) -> None:
    module, x, y = victim(batch)
    target = {n: g.detach() for n, g in gradient_of(module, y, x).items()}
    found = leaked_inputs(lambda z: gradient_of(module, y, z), target, tuple(x.shape))
    assert float((found - x).abs().max()) < 0.05


def test_matching_finds_the_picture_whatever_the_length_of_the_gradient() -> None:
    module, x, y = victim(1)
    target = {n: 7 * g.detach() for n, g in gradient_of(module, y, x).items()}
    found = matched_inputs(
        lambda z: gradient_of(module, y, z), target, tuple(x.shape), steps=200, smoothness=1e-4
    )
    error = float((found - x).square().mean())
    assert error < 0.01
    assert error < 0.1 * float((torch.rand(x.shape) - x).square().mean())
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_total_variation_by_hand() -> None:
    assert float(total_variation(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))) == 1.0
    assert float(total_variation(torch.ones(4, 7))) == 0.0
