"""Finds out which kernel computes a model's clipped sums, by those of one example after another."""

from __future__ import annotations

import torch
from torch import Tensor

from umbel.client import devices
from umbel.client.private import Clip
from umbel.core.errors import UmbelError
from umbel.core.trees import norm, subtract
from umbel.privacy.per_example.clipped import Bounds, Unsupported
from umbel.privacy.per_example.functional import OneByOne
from umbel.simulations.kernels.kernel import Obstacle, Subject
from umbel.simulations.kernels.private import Private
from umbel.simulations.residents import reason
from umbel.simulations.trial import Examination

KERNELS = {"grouped": True, "stacked": False}
"""In the order in which they are tried, and whether they are for images."""

TRIED = 3
"""Examples that a kernel is compared on."""

TOLERANCE = 1e-5
"""Relative difference of two sums in float64; their factors are single precision."""

WIDE = 1e6
"""A bound that no gradient reaches."""


def make(name: str, subject: Subject, examination: Examination) -> Private:
    """The private kernel of this name, if it computes the right sums.

    Two pretended clients get the examples: one as they are, the other with the last as padding.

    Raises:
        Obstacle: it cannot train this model.
    """
    if name not in KERNELS:
        raise Obstacle("it computes no per-example gradients")
    if examination.obstacle is not None:
        raise Obstacle(examination.obstacle)
    if examination.changed:
        raise Obstacle(f"its buffer '{min(examination.changed)}' changes in training")
    tried = subject._replace(module=examination.module)
    why = Obstacle("")
    for by_layer in (None, False):
        try:
            kernel = Private(tried, KERNELS[name], by_layer)
            _compare(kernel, tried, examination)
            return Private(subject, KERNELS[name], kernel.by_layer)
        except UmbelError:
            raise
        except (Obstacle, Unsupported) as found:
            why = Obstacle(str(found))
        except Exception as error:  # whatever torch does not like about the model
            why = Obstacle(reason(error))
    raise why


def _compare(kernel: Private, subject: Subject, examination: Examination) -> None:
    runtime = subject.runtime
    batch = {name: column[:TRIED] for name, column in examination.batch.items()}
    size = len(next(iter(batch.values())))
    params = {n: p.detach() for n, p in subject.module.named_parameters() if p.requires_grad}
    own = Clip(runtime.run.privacy, list(params), 1.0).bounds
    counts = [size, max(size - 1, 1)]
    tolerance = max(TOLERANCE, examination.tolerance)
    module = subject.module.eval()  # what is drawn in training would differ
    truth = OneByOne(module, runtime.task.losses)
    try:
        for bounds in (own, own._replace(clip_norm=WIDE, layers=None)):
            with devices.autocast(runtime.device, runtime.run.client):
                found, short = kernel.clipped(
                    {n: torch.stack([p, p]) for n, p in params.items()},
                    {n: torch.stack([c, c]) for n, c in batch.items()},
                    torch.tensor(counts, device=runtime.device),
                    Bounds(torch.full((2, 1), float(bounds.clip_norm)), bounds.layers),
                    _nothing_dropped if subject.draws else None,
                )
                plain = [truth({n: c[:k] for n, c in batch.items()}, bounds) for k in counts]
            for row, expected in enumerate(plain):
                total = {n: t[row] for n, t in found.items()}
                gap = norm(subtract(total, expected.total))
                if not gap <= tolerance * (norm(expected.total) + 1e-3):
                    raise Obstacle("it computes another sum of clipped gradients")
                if int(short[row]) != expected.short:
                    raise Obstacle("it clips other gradients")
    finally:
        module.train()


def _nothing_dropped(rows: Tensor, probability: float, examples: int = 1) -> Tensor:
    """As if each were kept, and scaled by what it will be divided by."""
    return torch.full_like(rows, probability)
