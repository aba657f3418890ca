"""Which examples each step of local training sees: a shuffled pass over the data an epoch.

A function of (seed, round, client) alone, in two forms that agree: the obvious one for one client,
and one that deals the batches of a whole cohort in a few array operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from umbel.core import randomness
from umbel.datasets.episodes import Classes, Episodes

Index: TypeAlias = npt.NDArray[np.int64]
BatchSize: TypeAlias = int | Literal["full"]


def schedule(
    seed: int,
    round_number: int,
    client: str,
    n: int,
    batch_size: BatchSize,
    epochs: int | None,
    steps: int | None,
) -> list[Index]:
    """The batches of one client in one round, as a dataloader that shuffles would give them.

    The last batch of an epoch may be short and is kept. Every epoch has its own permutation.

    Args:
        seed: of the run.
        round_number: 1 … rounds.
        client: its name.
        n: how many examples it has; at least one.
        batch_size: examples a step, or ``"full"``: all of them.
        epochs: passes over the data; or ``None``, and
        steps: how many batches, from as many passes as that takes.

    Returns:
        one array of positions 0 … n-1 a step.
    """
    size = n if batch_size == "full" else batch_size
    stream = randomness.key(seed, "batches", round_number, client)
    total = steps_of(n, batch_size, epochs, steps)
    batches: list[Index] = []
    epoch = 0
    while len(batches) < total:
        order = randomness.permutation(np.uint64(randomness.mix(stream, epoch)), n)
        batches += [order[start : start + size] for start in range(0, n, size)]
        epoch += 1
    return batches[:total]


def episodic(
    seed: int,
    round_number: int,
    client: str,
    labels: npt.NDArray[np.int64],
    episodes: Episodes,
    epochs: int | None,
    steps: int | None,
) -> list[Index]:
    """As :func:`schedule`, where each batch is an episode; an epoch is as many as the data fill.

    Raises:
        InputError: the client has too few classes with enough examples.
    """
    classes = Classes.of(labels, episodes, f"client '{client}'")
    stream = randomness.key(seed, "episodes", round_number, client)
    total = steps or (epochs or 1) * max(1, len(labels) // episodes.size)
    draws = randomness.mix(stream, np.arange(total, dtype=np.uint64))
    return [episodes.draw(draw, classes) for draw in draws]


def steps_of(n: Any, batch_size: BatchSize, epochs: int | None, steps: int | None) -> Any:
    """How many steps a client of ``n`` examples takes in a round; ``n`` may be an array."""
    if steps is not None:
        return n * 0 + steps
    assert epochs is not None
    return n * 0 + epochs if batch_size == "full" else epochs * -(-n // batch_size)


def counts_of(sizes: Index, batch_size: BatchSize, epochs: int | None, steps: int | None) -> Index:
    """(steps, C): how many examples each batch of each client holds; 0 past its last step."""
    width = sizes if batch_size == "full" else np.minimum(sizes, batch_size)
    total = np.asarray(steps_of(sizes, batch_size, epochs, steps))
    step = np.arange(total.max(initial=0))[:, None]
    left = sizes - (step % -(-sizes // width)) * width
    counted: Index = np.where(step < total, np.minimum(width, left), 0)
    return counted


class Padded(NamedTuple):
    """The batches of C clients as rectangles.

    Args:
        rows: (steps, C, B) int64, positions in each client's own examples. Past the count of a
            batch it repeats the batch's first example; past the steps of a client it is 0.
        counts: (steps, C) int64, how many of the B are the client's batch; 0 past its last step.
    """

    rows: Index
    counts: Index


def stacked(schedules: Sequence[Sequence[Index]]) -> Padded:
    """The batches of C clients, all of one size, as rectangles."""
    width, steps = len(schedules[0][0]), max(map(len, schedules))
    rows = np.zeros((steps, len(schedules), width), np.int64)
    counts = np.zeros((steps, len(schedules)), np.int64)
    for client, batches in enumerate(schedules):
        rows[: len(batches), client] = batches
        counts[: len(batches), client] = width
    return Padded(rows, counts)


def schedules(
    seed: int,
    round_number: int,
    clients: Sequence[str],
    sizes: Index,
    batch_size: BatchSize,
    epochs: int | None,
    steps: int | None,
) -> Padded:
    """:func:`schedule` of every client at once; same arguments, ``sizes`` (C,)."""
    width = sizes if batch_size == "full" else np.minimum(sizes, batch_size)
    a_pass = -(-sizes // width)
    total = np.asarray(steps_of(sizes, batch_size, epochs, steps))
    passes = -(-total // a_pass)

    if len(sizes) and np.ptp(sizes) == 0 and total[0] * width[0] <= sizes[0]:
        return _even(seed, round_number, clients, sizes, int(total[0]), int(width[0]))

    # One permutation for each pass of each client, clients one after another.
    owner = np.repeat(np.arange(len(sizes)), passes)
    first = np.cumsum(passes) - passes
    keys = randomness.client_keys(seed, "batches", round_number, clients)
    epoch = (np.arange(len(owner)) - first[owner]).astype(np.uint64)
    orders = randomness.permutations(randomness.mix(keys[owner], epoch), sizes[owner])

    step = np.arange(total.max(initial=0))[:, None]
    running = step < total
    row = np.where(running, first + step // a_pass, 0)
    start = (step % a_pass) * width
    counts = np.where(running, np.minimum(width, sizes - start), 0)
    place = np.arange(width.max(initial=0))
    inside = place < counts[:, :, None]
    column = start[:, :, None] + np.where(inside, place, 0)
    index = orders[row[:, :, None], np.where(running[:, :, None], column, 0)]
    return Padded(np.where(running[:, :, None], index, 0), counts)


def _even(
    seed: int, round_number: int, clients: Sequence[str], sizes: Index, steps: int, width: int
) -> Padded:
    """:func:`schedules` of clients of one size, for no more full batches than a pass has."""
    keys = randomness.client_keys(seed, "batches", round_number, clients)
    orders = randomness.permutations(randomness.mix(keys, 0), sizes)[:, : steps * width]
    rows = orders.reshape(len(clients), steps, width).swapaxes(0, 1)
    return Padded(np.ascontiguousarray(rows), np.full((steps, len(clients)), width))
