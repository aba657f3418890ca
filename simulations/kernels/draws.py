"""Random numbers of many clients at once, each client's from a generator of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Draw(Protocol):
    """(activations (n, B, …), probability) -> which of them are kept, bool of the same shape."""

    def __call__(self, rows: Tensor, probability: float, examples: int = 1) -> Tensor:
        """The masks; the axis of examples is where a client alone has them in memory."""


class Draws:
    """The draws of the clients of a chunk, in the order in which a client alone would take them.

    Guarantees: on a CPU, the very masks that ``torch.nn.functional.dropout`` draws after
    ``torch.manual_seed`` of the client's seed, for the examples that are the client's own.

    Args:
        seeds: of each client.
        device: where its activations are.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def only(self, clients: Sequence[int]) -> Draws:
        """Those of some clients, in this order; what they draw, the whole has drawn."""
        some = Draws((), torch.device("cpu"))
        some._generators = [self._generators[client] for client in clients]
        return some

    def of_batch(self, counts: Tensor | None) -> Draw:
        """The draws for one batch, of whose examples the first ``counts`` (n,) are a client's."""
        own = None if counts is None else counts.tolist()

        def draw(rows: Tensor, probability: float, examples: int = 1) -> Tensor:
            kept = torch.ones(rows.shape, dtype=torch.bool, device=rows.device)
            for client, generator in enumerate(self._generators[: len(kept)]):
                mask = kept[client]
                if own is not None:
                    mask = mask.narrow(examples - 1, 0, own[client])
                mask.bernoulli_(probability, generator=generator)
            return kept

        return draw
