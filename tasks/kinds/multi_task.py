"""Several targets for each example, learned together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Len
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.core.settings import Count, Natural, NonNegative
from umbel.datasets.federated import Info
from umbel.tasks.models.build import builder
from umbel.tasks.task import Batch, Forward, Task


class Shared(nn.Module):
    """One trunk, and a head for each part; with ``film``, a scale and a shift before each.

    Source: Caruana 1997, Machine Learning 28 (hard sharing); Perez et al. 2018, equation 1
    (arXiv:1709.07871), the scale written as ``1 + gamma``.
    """

    def __init__(self, trunk: nn.Module, embedding: int, widths: Sequence[int], film: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(embedding, width) for width in widths)
        shape = (len(widths), embedding)
        self.gamma = nn.Parameter(torch.zeros(shape)) if film else None
        self.beta = nn.Parameter(torch.zeros(shape)) if film else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> (B, outputs of all parts side by side)."""
        z = self.trunk(x)
        found = []
        for part, head in enumerate(self.heads):
            own = z
            if self.gamma is not None and self.beta is not None:
                own = z * (1 + self.gamma[part]) + self.beta[part]
            found.append(head(F.relu(own)))
        return torch.cat(found, 1)


class Tied(nn.Module):
    """A trunk and a head for each part; the last output is how far the trunks are apart.

    Source: Duong et al. 2015, section 3 (ACL): soft sharing by the squared distance of parameters,
    here to their mean.
    """

    def __init__(self, trunks: Sequence[nn.Module], embedding: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.trunks = nn.ModuleList(trunks)
        self.heads = nn.ModuleList(nn.Linear(embedding, width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> (B, outputs of all parts side by side, and the distance)."""
        pairs = zip(self.heads, self.trunks, strict=True)
        found = [head(F.relu(trunk(x))) for head, trunk in pairs]
        apart = []
        for same in zip(*(trunk.parameters() for trunk in self.trunks), strict=True):
            stack = torch.stack(same)
            apart.append((stack - stack.mean(0)).square().sum())
        return torch.cat([*found, torch.stack(apart).sum().expand(len(x), 1)], 1)


def multi_task(
    info: Info,
    model: Part | str | None,
    *,
    parts: Annotated[list[Natural], Len(1)],
    sharing: Literal["hard", "soft", "film"] = "hard",
    embedding: Count = 64,
    weights: list[NonNegative] | None = None,
    tie: NonNegative = 1e-3,
) -> Task:
    """Several targets an example: ``y`` of an ``npz`` with shape (rows, parts), real numbers.

    The loss is the weighted sum of cross-entropies and squared errors. Strategies ``pcgrad`` and
    ``gradnorm`` see the parts' losses apart. Metrics are ``accuracy_K`` or ``error_K`` for part K
    from 0, and the mean accuracy.

    Args:
        info: of the data.
        model: gives the embedding that parts share.
        parts: for each column of ``y``, how many classes it has; 0 for a real number.
        sharing: ``hard``: one trunk; ``film``: one trunk whose features each part scales and
            shifts; ``soft``: a trunk each, drawn towards each other by ``tie``.
        embedding: numbers that the trunk gives.
        weights: of the parts; ``None``: 1 each.
        tie: ``soft``: weight of the squared distance of the trunks from their mean.
    """
    if info.classes is not None or info.targets != len(parts):
        given = f"{info.targets} real" if info.classes is None else "one column of class"
        raise InputError(
            f"parts names {len(parts)} target(s); data set '{info.name}' has {given} target(s)",
            where="[task] parts",
            fix="give y as real numbers of shape (rows, parts), class numbers too",
        )
    if weights is not None and len(weights) != len(parts):
        raise InputError(
            f"{len(weights)} weights for {len(parts)} parts",
            where="[task] weights",
            fix="give one each",
        )
    widths = [classes or 1 for classes in parts]
    trunk = builder(model, info, embedding, head="features")
    importance = torch.tensor(weights or [1.0] * len(parts))

    def build() -> nn.Module:
        if sharing == "soft":
            return Tied([trunk() for _ in parts], embedding, widths)
        return Shared(trunk(), embedding, widths, sharing == "film")

    def each(forward: Forward, batch: Batch) -> tuple[list[Tensor], Tensor]:
        out = forward(batch["x"])
        return list(torch.split(out[:, : sum(widths)], widths, 1)), out

    def columns(batch: Batch) -> Tensor:
        return batch["y"] if batch["y"].dim() == 2 else batch["y"][:, None]

    def apart(forward: Forward, batch: Batch) -> Tensor:
        found, _ = each(forward, batch)
        return torch.stack([_loss(o, y) for o, y in zip(found, columns(batch).T, strict=True)], 1)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        found, out = each(forward, batch)
        costs = [_loss(o, y) for o, y in zip(found, columns(batch).T, strict=True)]
        total = torch.stack(costs, 1) @ importance.to(out)
        return total + tie * out[:, -1] if sharing == "soft" else total

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        found, _ = each(forward, batch)
        named: dict[str, Tensor] = {}
        right = []
        for k, (o, y) in enumerate(zip(found, columns(batch).T, strict=True)):
            if o.shape[1] == 1:
                named[f"error_{k}"] = _loss(o, y)
            else:
                named[f"accuracy_{k}"] = (o.argmax(1) == y).to(o.dtype)
                right.append(named[f"accuracy_{k}"])
        return {**named, **({"accuracy": torch.stack(right).mean(0)} if right else {})}

    return Task(build, losses, metrics, parts=apart)


def _loss(out: Tensor, target: Tensor) -> Tensor:
    """(B, classes or 1) and (B,) -> (B,)."""
    if out.shape[1] == 1:
        return (out[:, 0] - target).square()
    return F.cross_entropy(out, target.long(), reduction="none")
