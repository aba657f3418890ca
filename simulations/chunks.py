"""Which clients are trained together, and how many: bounded by memory, uneven sizes kept apart."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from umbel.client import batches

Places = npt.NDArray[np.int64]

PADDING = 1.2
"""Examples that a chunk computes, padding included, are at most so many times its real ones."""


class Footprint(NamedTuple):
    """What one client in training occupies, in bytes.

    Args:
        model: one copy of the tensors that travel.
        copies: how many copies of the parameters live at once: the client's own, its gradient, the
            optimizer's state, and temporaries.
        example: what one example of a batch adds: itself, and the activations that are kept for
            the backward pass, twice, for the gradients with respect to them.
    """

    model: int
    copies: int
    example: int

    def client(self, width: int) -> int:
        """Bytes of one client whose batches hold ``width`` examples."""
        return self.model * self.copies + self.example * width


def spans(clients: int, footprint: Footprint, memory: int) -> list[slice]:
    """Consecutive clients whose deltas may be held together before they are passed on."""
    length = max(1, memory // max(footprint.model, 1))
    return [slice(start, min(start + length, clients)) for start in range(0, clients, length)]


class Length(NamedTuple):
    """How long clients train in a round.

    Args:
        batch_size: examples a step, or ``"full"``: all of a client's.
        epochs: passes over a client's examples; or ``None``, and
        steps: how many steps.
    """

    batch_size: batches.BatchSize
    epochs: int | None
    steps: int | None


def chunks(
    sizes: Places,
    length: Length,
    footprint: Footprint,
    memory: int,
    largest: int | None,
    even: bool = False,
    padding: float = PADDING,
) -> list[Places]:
    """Deals the clients of a span to chunks that are trained one after another.

    Clients go by falling number of examples, which is also by falling number of steps. A chunk ends
    where memory does, or where more padding than :data:`PADDING` allows would come with it, since
    all batches of a step are padded to the largest.

    Args:
        sizes: (clients,) examples of each.
        length: of their training.
        footprint: of one client.
        memory: bytes for the clients of one chunk; one client is always taken.
        largest: the most clients in a chunk, or ``None``.
        even: whether nothing may be padded at all. Clients without a short batch, who can all go
            together, are then dealt before the others.
        padding: how many times its real examples a chunk may compute.

    Returns:
        places of clients, a chunk an array.
    """
    order = np.argsort(-sizes, kind="stable")
    if not even or length.batch_size == "full":
        return _dealt(order, sizes, length, footprint, memory, largest, 1.0 if even else padding)
    short = sizes[order] % length.batch_size > 0
    return [
        chunk
        for part in (order[~short], order[short])
        for chunk in _dealt(part, sizes, length, footprint, memory, largest, 1.0)
    ]


def _dealt(
    order: Places,
    sizes: Places,
    length: Length,
    footprint: Footprint,
    memory: int,
    largest: int | None,
    padding: float,
) -> list[Places]:
    dealt: list[Places] = []
    start = 0
    while start < len(order):
        most = int(sizes[order[start]])
        width = most if length.batch_size == "full" else min(most, length.batch_size)
        room = max(1, memory // footprint.client(width))
        chunk = order[start : start + (room if largest is None else min(room, largest))]
        chunk = chunk[: _fitting(sizes[chunk], length, padding)]
        dealt.append(chunk)
        start += len(chunk)
    return dealt


def _fitting(sizes: Places, length: Length, padding: float) -> int:
    """How many of these clients, the largest first, go together without too much padding."""
    if sizes[0] == sizes[-1]:
        return len(sizes)
    counts = batches.counts_of(sizes, *length)
    computed = np.maximum.accumulate(counts, 1) * np.cumsum(counts > 0, 1)
    good = computed.sum(0) <= padding * np.cumsum(counts.sum(0))
    return int(np.flatnonzero(good)[-1]) + 1


def memory_bound(device: torch.device) -> int:
    """Bytes that a chunk may take: a quarter of a GPU's memory; 128 MiB on a CPU, for its caches.

    Not of what is free: a run that is resumed must form the same chunks, since a sum over another
    shape may differ in its last bit. On a CPU, 100 small CNNs took 1.4 times as long in one chunk
    of 460 MB as in chunks of 90 MB.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory // 4)
    return 128 << 20
