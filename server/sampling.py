"""Who takes part in a round: a function of (seed, round), the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.core.run_file import Strategy

WHERE = "[strategy]"


def cohort_size(section: Strategy, clients: int, fewest: int = 1) -> int:
    """How many clients a round wants.

    Args:
        section: the strategy.
        clients: how many there are.
        fewest: updates without which the strategy has no result.

    Raises:
        InputError: more than there are, a quorum above the cohort, or a cohort below ``fewest``.
    """
    wanted = section.cohort
    if wanted is None:
        size = clients
    elif isinstance(wanted, int):
        size = wanted
    else:
        size = max(1, round(wanted * clients))
    if size > clients:
        raise InputError(
            f"cohort = {wanted} is more than the {clients} clients",
            where=WHERE,
            fix=f"set cohort to {clients} or less, or split the data over more clients",
        )
    if section.quorum is not None and section.quorum > size:
        raise InputError(
            f"quorum = {section.quorum} is more than the cohort of {size}",
            where=WHERE,
            fix=f"set quorum to {size} or less",
        )
    if size < fewest:
        raise InputError(
            f"{section.name} with these parameters needs {fewest} or more updates a round, and the "
            f"cohort is {size}",
            where=WHERE,
            fix=f"set cohort to {fewest} or more, or lower f",
        )
    return size


def sample(clients: Sequence[str], section: Strategy, seed: int, round_number: int) -> list[str]:
    """The cohort of a round, in lexicographic order, then the reserves, in the same.

    Uniform without replacement. Costs time and memory of the order of the cohort, not of the
    federation, unless the cohort is a large part of it.
    """
    size, total = cohort_size(section, len(clients)), asked_at_most(section, len(clients))
    if size == len(clients):
        return list(clients)
    places = distinct(randomness.key(seed, "cohort", round_number), total, len(clients))
    return [clients[i] for part in (places[:size], places[size:]) for i in sorted(part)]


def separated(
    clients: Sequence[str], section: Strategy, seed: int, round_number: int, separation: int
) -> list[str]:
    """As :func:`sample`, but who was asked is not asked again in the next separation - 1 rounds.

    Clients are dealt to ``separation`` groups by the seed, and rounds go to the groups in turn: so
    it is whatever round a server goes on from, with no memory of the rounds before.

    Args:
        clients: the federation's, at least separation times those asked in a round.
        section: the strategy.
        seed: of the run.
        round_number: 1 …
        separation: b >= 1.

    Source: Choquette-Choo et al. 2023, section 4.1, fixed groups (arXiv:2306.08153).
    """
    total = asked_at_most(section, len(clients))
    group = _dealt(seed, len(clients))[(round_number - 1) % separation :: separation]
    drawn = distinct(randomness.key(seed, "cohort", round_number), total, len(group))
    size = cohort_size(section, len(clients))
    places = group[drawn].tolist()
    return [clients[i] for part in (places[:size], places[size:]) for i in sorted(part)]


def asked_at_most(section: Strategy, clients: int) -> int:
    """How many clients a round asks, reserves included."""
    size = cohort_size(section, clients)
    return min(clients, size + math.ceil(section.over_selection * size))


@lru_cache(maxsize=4)
def _dealt(seed: int, n: int) -> npt.NDArray[np.int64]:
    return randomness.permutation(randomness.key(seed, "groups"), n)


def distinct(stream: np.uint64, count: int, n: int) -> list[int]:
    """``count`` distinct places of 0 … n-1, uniform, in random order."""
    if 2 * count > n:
        return list(randomness.permutation(stream, n)[:count].tolist())
    # The first `count` distinct draws with replacement are a uniform draw without. The bias of the
    # modulus is below n / 2**64.
    draws = randomness.mix(stream, np.arange(4 * count + 64, dtype=np.uint64)) % np.uint64(n)
    distinct = list(dict.fromkeys(draws.tolist()))
    if len(distinct) < count:  # practically never; then the slow way
        return list(randomness.permutation(stream, n)[:count].tolist())
    return distinct[:count]
