"""Update rules that torch does not have: elementwise and in place, on lists of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def lion(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: Sequence[Sequence[Tensor]],
    step: int,
    lr: float,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of Lion; ``state`` is (momentum,) of each parameter, zeros before the first.

    Source: Chen et al. 2023, Algorithm 2 (arXiv:2302.06675).
    """
    beta1, beta2, _ = betas
    for p, g, (m,) in zip(params, gradients, state, strict=True):
        direction = (beta1 * m + (1 - beta1) * g).sign()
        p.mul_(1 - lr * weight_decay).sub_(lr * direction)
        m.mul_(beta2).add_(g, alpha=1 - beta2)


def adan(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: Sequence[Sequence[Tensor]],
    step: int,
    lr: float,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of Adan; ``state`` is (mean, mean difference, mean square, last gradient) of each.

    ``step`` counts from 1; betas are the shares that are kept, one minus the paper's; moments are
    corrected for their start from zero, as in the authors' code.

    Source: Xie et al. 2022, Algorithm 1 (arXiv:2208.06677).
    """
    beta1, beta2, beta3 = betas
    for p, g, (m, v, n, last) in zip(params, gradients, state, strict=True):
        change = g - last if step > 1 else torch.zeros_like(g)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(change, alpha=1 - beta2)
        n.mul_(beta3).add_((g + beta2 * change).square(), alpha=1 - beta3)
        last.copy_(g)
        scale = lr / ((n / (1 - beta3**step)).sqrt() + eps)
        p.sub_(scale * (m / (1 - beta1**step) + beta2 * v / (1 - beta2**step)))
        p.div_(1 + lr * weight_decay)


RULES: dict[str, tuple[Callable[..., None], int]] = {"lion": (lion, 1), "adan": (adan, 4)}
"""Name -> the rule, and how many tensors it keeps for each parameter."""


class Elementwise(torch.optim.Optimizer):
    """One of ``RULES`` as an optimizer object of torch."""

    def __init__(
        self,
        params: Iterable[Tensor],
        rule: str,
        lr: float,
        betas: tuple[float, float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self._rule = rule
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        rule, slots = RULES[self._rule]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            settings: dict[str, Any] = {k: v for k, v in group.items() if k != "params"}
            for p in params:
                if not self.state[p]:
                    self.state[p]["kept"] = [torch.zeros_like(p) for _ in range(slots)]
            group["step"] = settings.pop("step", 0) + 1
            kept = [self.state[p]["kept"] for p in params]
            rule(params, [p.grad for p in params], kept, group["step"], **settings)
