"""Picks how a model's per-example gradients are computed: the fastest way that is right.

Book-keeping where every trained layer has a rule: it was the faster one for every model measured
(``umbel bench private_gradients``). Else ``vmap``; else one example after another. Each is first
compared with the last, on real examples.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import nn

from umbel.core.errors import UmbelError
from umbel.core.trees import norm, subtract
from umbel.privacy.per_example.book_keeping import BookKeeping
from umbel.privacy.per_example.clipped import Batch, Bounds, Losses, Method, Unsupported
from umbel.privacy.per_example.functional import OneByOne, Vmapped

Name: TypeAlias = Literal["book-keeping", "vmap", "one-by-one"]

METHODS: dict[Name, type[BookKeeping] | type[Vmapped]] = {
    "book-keeping": BookKeeping,
    "vmap": Vmapped,
}
"""In the order in which they are tried."""

TRIED = 3
"""Examples that a method is compared on."""

TOLERANCE = 1e-3
"""Relative difference of two sums in float32 beyond which they are not the same computation."""


def choose(
    module: nn.Module, losses: Losses, batch: Batch, bounds: Bounds
) -> tuple[Name, Method, dict[str, str]]:
    """The method, and why those before it were not taken.

    Args:
        module: in training mode; left so.
        losses: of a batch.
        batch: real examples, at least one.
        bounds: of one example's gradient.
    """
    few = {name: column[:TRIED] for name, column in batch.items()}
    refused: dict[str, str] = {}
    was = module.training
    module.eval()  # what is drawn in training would differ
    try:
        for name, method in METHODS.items():
            if (why := _differs(method, module, losses, few, bounds)) is None:
                return name, method(module, losses), refused
            refused[name] = why
    finally:
        module.train(was)
    return "one-by-one", OneByOne(module, losses), refused


def _differs(
    method: type[BookKeeping] | type[Vmapped],
    module: nn.Module,
    losses: Losses,
    batch: Batch,
    bounds: Bounds,
) -> str | None:
    """Why a method is not right for a model; ``None`` where it is."""
    try:
        for own in (bounds, bounds._replace(clip_norm=1e6, layers=None)):
            found = method(module, losses)(batch, own).total
            truth = OneByOne(module, losses)(batch, own).total
            if not norm(subtract(found, truth)) <= TOLERANCE * (norm(truth) + 1e-6):
                return "it computes another gradient"
    except UmbelError:
        raise
    except Unsupported as why:
        return str(why)
    except Exception as error:  # whatever torch.func does not like about the model
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None
