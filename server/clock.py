"""Who starts when, and who is back when, in virtual time: what an asynchronous run is made of.

Nothing here depends on what clients learn. So the whole course of a run is known before it: a
resumed run finds it again, and clients that are given the same model can be trained together.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from umbel.core import randomness
from umbel.server.sampling import distinct
from umbel.strategies.parts.asynchronous import Asynchronous


class Arrival(NamedTuple):
    """A client that is back.

    Args:
        client: by name.
        version: server steps before it was given its model.
        time: when it is back.
    """

    client: str
    version: int
    time: float


class Period(NamedTuple):
    """What happens between two server steps.

    Args:
        version: server steps before.
        starts: who is given this version.
        arrivals: who is back in time for the next step, in order.
    """

    version: int
    starts: Sequence[str]
    arrivals: Sequence[Arrival]


def course(
    clients: Sequence[str], rule: Asynchronous, concurrency: int, seed: int
) -> Iterator[Period]:
    """The periods of a run, without end.

    As many clients as ``concurrency`` are in training; who is back is replaced at once by another
    one, drawn uniformly. Nobody is given the same version twice: its batches would be the same.

    Args:
        clients: all.
        rule: buffer and speeds.
        concurrency: at least the buffer, at most all.
        seed: of the run.
    """
    waiting: list[tuple[float, int, str, int]] = []  # (back, order, client, version)
    away: set[str] = set()
    begun = itertools.count()
    now = 0.0
    for version in itertools.count():
        line = candidates(clients, concurrency, seed, version)
        starts: list[str] = []
        arrivals: list[Arrival] = []
        while len(arrivals) < rule.buffer:
            # Who is back at the same moment is back together, before anybody starts anew.
            if not arrivals or waiting[0][0] > now:
                room = concurrency - len(away)
                fresh = sorted(itertools.islice((c for c in line if c not in away), room))
                for client in fresh:
                    back = now + duration(client, version, rule, seed)
                    heapq.heappush(waiting, (back, next(begun), client, version))
                away.update(fresh)
                starts += fresh
            now, _, client, given = heapq.heappop(waiting)
            away.remove(client)
            arrivals.append(Arrival(client, given, now))
        yield Period(version, starts, arrivals)


def candidates(clients: Sequence[str], concurrency: int, seed: int, version: int) -> Iterator[str]:
    """All clients in the order in which they are asked, each once; the first are a round's cohort.

    The cohort is that of the synchronous round of this number, to the name.
    """
    n = len(clients)
    orders = (
        lambda: distinct(randomness.key(seed, "cohort", version + 1), concurrency, n),
        lambda: distinct(randomness.key(seed, "more", version), min(n, 4 * concurrency), n),
        lambda: randomness.permutation(randomness.key(seed, "rest", version), n).tolist(),
    )
    seen: set[int] = set()
    for order in orders:
        for place in order():
            if place not in seen:
                seen.add(place)
                yield clients[place]


def duration(client: str, version: int, rule: Asynchronous, seed: int) -> float:
    """How long a client trains, in units of the usual client's time."""
    if rule.speed == "equal":
        return 1.0
    if rule.speed == "lognormal":
        return math.exp(rule.spread * NormalDist().inv_cdf(_uniform(seed, "speed", client)))
    return -math.log(_uniform(seed, "duration", version, client))


def _uniform(seed: int, purpose: str, *coordinates: int | str) -> float:
    """Strictly between 0 and 1."""
    return (int(randomness.key(seed, purpose, *coordinates)) + 0.5) / float(np.iinfo(np.uint64).max)
