"""How many neighbours, and how many of them must agree: k and t from exact tail sums.

n clients, at most C = ⌊γn⌋ of them in league with the server, at most D = ⌊δn⌋ lost. In a graph on
a uniform permutation the neighbours of a client are a uniform k-subset of the other n−1, so the
number X of its corrupt neighbours and the number Z of its lost ones are hypergeometric.

* x is the least number with n · draws · P[X > x] ≤ 2^-σ, over all clients and all draws of the
  graph that a round may make. Against a server that answers at will, an honest neighbour gives one
  kind of share only, so both secrets of one client need 2t ≤ k + x: hence t = ⌊(k + x)/2⌋ + 1.
* the round ends where n · P[k − Z < t] ≤ 2^-σ: too few neighbours left for some client.
* every sum that the server can learn then has at least t − x + 1 honest clients in it
  (docs/secure-aggregation.md), t + 1 clients in all.

In the complete graph X = min(C, n−1) and Z = min(D, n−1) are no longer random.

Source: Bell, Bonawitz, Gascón, Lepoint and Raykova 2020 (ePrint 2020/704), section 3, with
Bonawitz et al. 2017's threshold against an active server; all sums are exact integers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from umbel.core.errors import InputError

SIGMA = 40
KEPT_ROUNDS = 100  # that one set-up serves at the most, the first included
MAX_DRAWS = 4  # graphs that one round may draw; counted in the bound
COMPLETE_UP_TO = 32  # below this many clients a sparse graph saves nothing


class Design(NamedTuple):
    """A graph and a threshold.

    neighbours: k, the degree of every client. threshold: t, shares that open a secret.
    corrupt_neighbours: x, not exceeded but with probability 2^-σ.
    """

    neighbours: int
    threshold: int
    corrupt_neighbours: int

    @property
    def hidden_among(self) -> int:
        """Honest clients, at the least, in any sum that a hostile server can learn."""
        return self.threshold - self.corrupt_neighbours + 1


def count_of(fraction: float, n: int) -> int:
    """⌊fraction · n⌋, with 0.07 · 100 giving 7."""
    return math.floor(fraction * n + 1e-9)


@lru_cache(maxsize=4096)
def largest_hit(others: int, marked: int, k: int, events: int, sigma: int = SIGMA) -> int:
    """The least x with events · P[X > x] ≤ 2^-sigma, X ~ hypergeometric(others, marked, k).

    Args:
        others: size of the population, n − 1.
        marked: members of it that count (corrupt, or lost), ≤ others.
        k: draws without replacement, ≤ others.
        events: size of the union bound.
        sigma: negative binary logarithm of the accepted probability.
    """
    x = min(marked, k)
    # The terms C(marked, i) · C(others − marked, k − i), from the top; each exact.
    term = math.comb(marked, x) * math.comb(others - marked, k - x)
    whole = math.comb(others, k)
    tail = 0
    while x > 0:
        tail += term
        if (tail * events) << sigma > whole:
            return x
        rest = (marked - x + 1) * (k - x + 1)
        term = term * x * (others - marked - k + x) // rest
        x -= 1
    return 0


def corrupt_bound(n: int, k: int, corrupt_fraction: float, sigma: int = SIGMA) -> int:
    """x: corrupt neighbours of any honest client, not exceeded but with probability 2^-sigma."""
    corrupt = min(count_of(corrupt_fraction, n), n - 1)
    return largest_hit(n - 1, corrupt, k, n * MAX_DRAWS, sigma)


def safe_threshold(k: int, corrupt_neighbours: int) -> int:
    """The least t with 2t > k + x."""
    return (k + corrupt_neighbours) // 2 + 1


def is_regular(n: int, k: int) -> bool:
    """Whether n clients can have k neighbours each."""
    return 1 <= k <= n - 1 and (n * k) % 2 == 0


@lru_cache(maxsize=1024)
def choose(
    n: int,
    corrupt_fraction: float,
    dropout_fraction: float,
    min_cohort: int = 3,
    sigma: int = SIGMA,
) -> Design:
    """The sparsest design for n clients that is safe at γ and lives through δ.

    Args:
        n: clients in the round, from 3.
        corrupt_fraction: γ, clients in league with the server, 0 ≤ γ < 1.
        dropout_fraction: δ, clients lost after the shares were dealt, 0 ≤ δ < 1.
        min_cohort: clients in any sum that the server can learn, t + 1 of them at the least.
        sigma: both failures have probability at most 2^-sigma.
    Raises:
        InputError: no graph does it, not even the complete one.
    """
    for name, value in (("corrupt", corrupt_fraction), ("drop-out", dropout_fraction)):
        if not 0 <= value < 1:
            raise InputError(
                f"the {name} fraction is {value}, expected at least 0 and less than 1",
                where="[secure_aggregation]",
                fix="state the share of the cohort, as in 0.1",
            )
    if n < max(min_cohort, 3):
        raise InputError(
            f"{n} client(s) cannot hide in a sum of at least {max(min_cohort, 3)}",
            where="[secure_aggregation]",
            fix="take a larger cohort",
        )
    lost = min(count_of(dropout_fraction, n), n - 1)
    # A client holds no share of its own secrets: n − 1 is the complete graph.
    degrees = [n - 1] if n <= COMPLETE_UP_TO else [*range(2, n - 1), n - 1]
    for k in degrees:
        if not is_regular(n, k):
            continue
        x = corrupt_bound(n, k, corrupt_fraction, sigma)
        t = max(safe_threshold(k, x), min_cohort - 1)
        if t <= k - largest_hit(n - 1, lost, k, n, sigma):
            return Design(k, t, x)
    x = corrupt_bound(n, n - 1, corrupt_fraction, sigma)
    t = max(safe_threshold(n - 1, x), min_cohort - 1)
    raise InputError(
        f"no graph on {n} clients is safe with {count_of(corrupt_fraction, n)} corrupt and lives "
        f"through {lost} lost: even in the complete graph {t} of {n - 1} must stay",
        where="[secure_aggregation]",
        fix="take a larger cohort, or smaller fractions with γ + 2δ < 1",
    )
