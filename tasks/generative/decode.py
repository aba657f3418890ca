"""From a few numbers back to an example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from umbel.core import settings
from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.datasets.federated import Info
from umbel.tasks.models.build import builder
from umbel.tasks.self_supervised.worth import linear_probe, nearest
from umbel.tasks.task import Batch


def decoder(given: str | dict[str, Any], info: Info, latent: int) -> Callable[[], nn.Module]:
    """What builds (B, latent) -> (B, numbers of an example): a model of the list, or one's own.

    Args:
        given: a name, or a table of a name and the model's own keys.
        info: of the data.
        latent: numbers that it is given.

    Raises:
        InputError: no such model, or one that takes images.
    """
    part = given if isinstance(given, str) else settings.parse(Part, given, "[task] decoder")
    return builder(part, Info(info.name, (latent,)), prod(info.input_shape))


def require_numbers(info: Info, kind: str) -> None:
    """Refuses data that hold symbols.

    Raises:
        InputError: they do.
    """
    if info.vocabulary is not None:
        raise InputError(
            f"'{kind}' is of numbers; data set '{info.name}' holds symbols",
            where="[task] kind",
            fix='kind = "language-model"',
        )


def worth(h: Tensor, batch: Batch, info: Info) -> Mapping[str, Tensor]:
    """What a classifier makes of codes (B, d), where there are labels: ``probe`` and ``knn``."""
    if info.classes is None:
        return {}
    y = batch["y"]
    return {"probe": linear_probe(h, y, info.classes), "knn": nearest(h, y, info.classes)}


def discrepancy(real: Tensor, made: Tensor) -> Tensor:
    """How far samples are from examples: an unbiased squared MMD, the same (B,) times.

    Around 0 where both are of one distribution, and then below 0 as often as above. The kernel is
    ``exp(-|a - b|^2 / (2 s^2))``, s^2 the mean of half the squared distance of two examples.

    Args:
        real: (B, …), at least two.
        made: (B, …).

    Source: Gretton et al. 2012, Lemma 6 (JMLR 13).
    """
    a, b = real.flatten(1).double(), made.flatten(1).double()
    n = len(a)
    if n < 2:
        return real.new_zeros(n)
    apart = torch.cdist(torch.cat([a, b]), torch.cat([a, b])).square()
    wide = (apart[:n, :n].sum() / (n * (n - 1)) / 2).clamp(min=1e-12)
    k = (-apart / (2 * wide)).exp()
    within = (k[:n, :n].sum() - n + k[n:, n:].sum() - n) / (n * (n - 1))
    between = k[:n, n:]
    cross = 2 * (between.sum() - between.diagonal().sum()) / (n * (n - 1))
    return (within - cross).to(real.dtype).expand(n)
