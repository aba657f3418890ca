"""Progressive columns: each experience a network of its own, which reads those before it."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.strategies.defences.adapters import of
from umbel.strategies.parts.by_experience import parted
from umbel.strategies.parts.defence import Defence

PART = re.compile(r"(?:^|\.)(?:columns|laterals)\.(\d+)")


def columns() -> Defence:
    """Progressive networks. Rusu et al. 2016, equation 1 (arXiv:1606.04671).

    ``h_i^(k) = f(W_i^(k) h_{i-1}^(k) + sum_{j<k} U_i^(k:j) h_{i-1}^(j))``: the columns of earlier
    experiences are read and never changed, so that nothing is forgotten, and the experience of an
    example must be known. All columns are made, and travel, from the first round on: parameters
    grow with the square of the number of experiences. For models that are a chain of layers.
    """

    def trained_in(name: str) -> int:
        part = PART.search(name)
        return int(part[1]) if part else 0

    return parted(Columns, trained_in)


class Columns(nn.Module):
    """The columns; told the experience of each example, it gives that column's output.

    Raises:
        InputError: the model is not a chain of layers.
    """

    def __init__(self, base: nn.Module, count: int) -> None:
        super().__init__()
        if not isinstance(base, nn.Sequential):
            raise InputError(
                f"columns are of models that are a chain of layers, not of a {type(base).__name__}",
                where="[continual] defence",
                fix="model = 'mlp' or 'cnn', or defence = 'adapters'",
            )
        self.columns = nn.ModuleList(base if k == 0 else _fresh(base) for k in range(count))
        # Before its first layer with parameters, a column has nothing that the input has not.
        weighted = [str(i) for i, layer in enumerate(base) if _linear(layer)][1:]
        self.laterals = nn.ModuleList(
            nn.ModuleDict(
                {i: nn.ModuleList(_lateral(base[int(i)]) for _ in range(k)) for i in weighted}
            )
            for k in range(count)
        )

    def forward(self, x: Tensor, *, experience: Tensor) -> Tensor:
        """The output of each example's column; ``experience`` (B,)."""
        given: list[list[Tensor]] = []  # column -> what each of its layers was given
        total: list[Tensor] = []
        for k, column in enumerate(self.columns):
            assert isinstance(column, nn.Sequential)
            laterals = self.laterals[k]
            assert isinstance(laterals, nn.ModuleDict)
            h, inputs = x, []
            for i, layer in enumerate(column):
                inputs.append(h)
                h = layer(h)
                if str(i) in laterals:
                    across = laterals[str(i)]
                    assert isinstance(across, nn.ModuleList)
                    for j, lateral in enumerate(across):
                        h = h + lateral(given[j][i])
            given.append([g.detach() for g in inputs])
            total.append(of(experience, k, h) * h)
        return torch.stack(total).sum(0)


def _linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)


def _fresh(module: nn.Module) -> nn.Module:
    """A copy with parameters of its own draw."""
    made = copy.deepcopy(module)
    for layer in made.modules():
        if _linear(layer):
            layer.reset_parameters()  # type: ignore[operator]
    return made


def _lateral(layer: nn.Module) -> nn.Module:
    made = _fresh(layer)
    made.bias = None  # type: ignore[assignment]
    return made
