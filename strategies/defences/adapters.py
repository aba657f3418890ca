"""Adapters: the first experience trains the model, each later one a low-rank change of its own."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from umbel.core.settings import Count
from umbel.strategies.parts.by_experience import parted
from umbel.strategies.parts.defence import Defence

PART = re.compile(r"(?:^|\.)(?:down|up|heads)\.(\d+)")


def adapters(*, rank: Count = 4) -> Defence:
    """A LoRA (Hu et al. 2021, arXiv:2106.09685) and a head for each experience.

    After the first, the model's own parameters stay as they are; a later experience has a change
    ``B A`` of its own in each linear layer, which begins as nothing, and a last layer of its own.
    So nothing is forgotten, and the experience of an example must be known. Layers that are not
    linear stay as the first experience left them.

    Args:
        rank: of the change; the smaller side of a layer bounds it.
    """

    def trained_in(name: str) -> int:
        part = PART.search(name)
        return int(part[1]) if part else 0

    return parted(lambda module, count: Adapted(module, count, rank), trained_in)


class Adapted(nn.Module):
    """The module, which is told the experience of each example."""

    def __init__(self, base: nn.Module, count: int, rank: int) -> None:
        super().__init__()
        self.base = base
        # Of the pass under way, for layers that are given nothing but their input.
        self.at: list[Tensor] = []
        linear = [n for n, m in base.named_modules() if isinstance(m, nn.Linear)]
        for name in linear:
            layer = base.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            put: nn.Module = (
                Heads(layer, count, self.at)
                if name == linear[-1]
                else Changed(layer, count, rank, self.at)
            )
            if name:
                base.set_submodule(name, put)
            else:
                self.base = put

    def forward(self, *inputs: Any, experience: Tensor) -> Tensor:
        """The model's output; ``experience`` (B,)."""
        self.at[:] = [experience]
        try:
            output: Tensor = self.base(*inputs)
        finally:
            self.at.clear()
        return output


class Changed(nn.Module):
    """``W x + B_e A_e x``, e above 0 the experience of the example."""

    def __init__(self, layer: nn.Linear, count: int, rank: int, at: list[Tensor]) -> None:
        super().__init__()
        self.layer, self.at = layer, at
        rank = min(rank, layer.in_features, layer.out_features)
        later = [str(e) for e in range(1, count)]
        self.down = nn.ParameterDict({e: torch.empty(rank, layer.in_features) for e in later})
        self.up = nn.ParameterDict({e: torch.zeros(layer.out_features, rank) for e in later})
        for a in self.down.values():
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, in) -> (B, …, out)."""
        output: Tensor = self.layer(x)
        for e, a in self.down.items():
            mine = of(self.at[0], int(e), output)
            output = output + mine * (x @ a.T @ self.up[e].T)
        return output


class Heads(nn.Module):
    """As many copies of a layer, of which each example has its experience's."""

    def __init__(self, layer: nn.Linear, count: int, at: list[Tensor]) -> None:
        super().__init__()
        self.at = at
        self.heads = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, in) -> (B, …, out)."""
        found = [head(x) for head in self.heads]
        parts = [of(self.at[0], e, y) * y for e, y in enumerate(found)]
        return torch.stack(parts).sum(0)


def of(experience: Tensor, number: int, like: Tensor) -> Tensor:
    """1 for examples of that experience, 0 for others, (B, 1, …) of the type of ``like``."""
    mine = (experience == number).to(like.dtype)
    return mine.reshape(-1, *[1] * (like.dim() - 1))
