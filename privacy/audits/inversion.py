"""From an update back to the examples that it was computed from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from umbel.core.trees import Tree

Gradient: TypeAlias = Callable[[Tensor], Tree]
"""Inputs (B, …) -> the gradient of their mean loss, differentiable in the inputs."""


def linear_inputs(weight: Tensor, bias: Tensor) -> Tensor:
    """What entered a linear layer, from the gradient of its weight and bias, exactly.

    For one example dL/dW_k = (dL/db_k) x, whatever comes after the layer. For a sum of examples row
    k is their mean, weighted by how much each moved output k: an output that one example alone
    moved gives that example away.

    Args:
        weight: (outputs, inputs).
        bias: (outputs,).

    Returns:
        (rows, inputs): one candidate for each output whose bias has a gradient, the most moved
        first; no row where none has.

    Source: Phong et al. 2018, section 3 (doi:10.1109/TIFS.2017.2787987).
    """
    order = bias.abs().argsort(descending=True)
    order = order[bias.abs()[order] > 1e-12 * float(bias.abs().max() if len(bias) else 0)]
    order = order[bias[order] != 0]
    return weight[order] / bias[order, None]


def matched_inputs(
    gradient: Gradient,
    target: Tree,
    shape: tuple[int, ...],
    *,
    steps: int = 300,
    lr: float = 0.05,
    smoothness: float = 1e-2,
    seed: int = 0,
) -> Tensor:
    """Inputs in [0, 1] whose gradient points where ``target`` does, (B, …).

    Minimises 1 - cosine plus total variation by Adam on the sign of the gradient, from noise.

    Args:
        gradient: of the mean loss of inputs; the labels are its business.
        target: the observed gradient, same names and shapes; of any length.
        shape: of the inputs; total variation is taken over the last two axes, where there are.
        steps: of the optimizer, at 3/8, 5/8 and 7/8 of which the rate falls to a tenth.
        lr: of the first steps, in units of the inputs.
        smoothness: weight of the total variation.
        seed: of the noise it begins with.

    Source: Geiping, Bauermeister, Droege and Moeller 2020, equation 4 (arXiv:2003.14053).
    """
    drawn = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=drawn).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    falls = [math.ceil(steps * eighths / 8) for eighths in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, gamma=0.1)
    for _ in range(steps):
        loss = _away(gradient(x), target) + smoothness * total_variation(x)
        x.grad = torch.autograd.grad(loss, x)[0].sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return x.detach()


def leaked_inputs(
    gradient: Gradient, target: Tree, shape: tuple[int, ...], *, steps: int = 60, seed: int = 0
) -> Tensor:
    """Inputs whose gradient is ``target`` itself, (B, …): squared distance, by L-BFGS.

    Labels are given here, which the paper guesses as well.

    Args:
        gradient, target, shape, seed: as for :func:`matched_inputs`; the length counts.
        steps: of L-BFGS, 20 evaluations each at the most.

    Source: Zhu, Liu and Han 2019, DLG, Algorithm 1 (arXiv:1906.08935).
    """
    drawn = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=drawn).requires_grad_()
    scale = float(torch.stack([t.square().sum() for t in target.values()]).sum()) or 1.0
    optimizer = torch.optim.LBFGS([x], line_search_fn="strong_wolfe")

    def distance() -> Tensor:
        found = gradient(x)
        gaps = [(found[name] - t).square().sum() for name, t in target.items()]
        loss = torch.stack(gaps).sum() / scale
        x.grad = torch.autograd.grad(loss, x)[0]
        return loss

    for _ in range(steps):
        loss: Tensor = optimizer.step(distance)  # type: ignore[no-untyped-call]
        if float(loss.detach()) < 1e-12:
            break
    return x.detach()


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours over the last two axes; 0 for fewer than three."""
    if x.dim() < 3:
        return x.new_zeros(())
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()


def _away(found: Tree, target: Tree) -> Tensor:
    """1 - cosine of the angle between two trees."""
    dot = torch.stack([(found[name] * t).sum() for name, t in target.items()]).sum()
    lengths = [
        torch.stack([t.square().sum() for t in tree.values()]).sum() for tree in (found, target)
    ]
    return 1 - dot / (lengths[0] * lengths[1] + 1e-30).sqrt()
