"""Which clients are trained together, and how many: bounded by memory, uneven sizes kept apart."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Places = npt.NDArray[np.int64]


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


def chunks(
    sizes: Places, batch_size: int | None, footprint: Footprint, memory: int, largest: int | None
) -> list[Places]:
    """Deals the clients of a span to chunks that are trained one after another.

    Clients go by falling number of examples, which is also by falling number of steps. A chunk ends
    where memory does, or where the batches become less than half as large as its first, since all
    batches of a chunk are padded to the largest.

    Args:
        sizes: (clients,) examples of each.
        batch_size: ``None`` for full batches.
        footprint: of one client.
        memory: bytes for the clients of one chunk; one client is always taken.
        largest: the most clients in a chunk, or ``None``.

    Returns:
        places of clients, a chunk an array.
    """
    order = np.argsort(-sizes, kind="stable")
    widths = sizes if batch_size is None else np.minimum(sizes, batch_size)
    dealt: list[Places] = []
    start = 0
    while start < len(order):
        width = int(widths[order[start]])
        room = max(1, memory // footprint.client(width))
        end = start + (room if largest is None else min(room, largest))
        chunk = order[start:end]
        chunk = chunk[widths[chunk] * 2 >= width]
        dealt.append(chunk)
        start += len(chunk)
    return dealt


def memory_bound(device: torch.device) -> int:
    """Bytes that a chunk may take: a quarter of a GPU's memory; 128 MiB on a CPU, for its caches.

    Not of what is free: a run that is resumed must form the same chunks, since a sum over another
    shape may differ in its last bit. On a CPU, 100 small CNNs took 1.4 times as long in one chunk
    of 460 MB as in chunks of 90 MB.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory // 4)
    return 128 << 20
