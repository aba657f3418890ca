"""Who was in the training data: scores of members and others, their ROC, and what it proves."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.privacy.audits.binomial import clopper_pearson

F64: TypeAlias = npt.NDArray[np.float64]
Members: TypeAlias = npt.NDArray[np.bool_]

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""False-positive rates at which epsilon is bounded; the confidence is shared by all of them."""


class Roc(NamedTuple):
    """True- against false-positive counts, for every threshold from the strictest on.

    Args:
        false: how many non-members are called members, ascending from 0.
        true: how many members are.
        others: non-members in all.
        members: members in all.
    """

    false: npt.NDArray[np.int64]
    true: npt.NDArray[np.int64]
    others: int
    members: int

    @property
    def auc(self) -> float:
        """The area under the curve: 0.5 is a coin."""
        return float(np.trapezoid(self.true / self.members, self.false / self.others))


class Point(NamedTuple):
    """The true-positive rate at a false-positive rate, with its Clopper-Pearson interval."""

    false_rate: float
    rate: float
    low: float
    high: float


def roc(scores: F64, members: Members) -> Roc:
    """The ROC of scores that are higher for members; equal scores are one threshold.

    Raises:
        InputError: no member, no other, or a score that is not a number.
    """
    inside, total = int(members.sum()), len(members)
    if not 0 < inside < total or bool(np.isnan(scores).any()):
        raise InputError(
            f"{inside} of {total} are members",
            where="membership audit",
            fix="give members and others, and each a score that is a number",
        )
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), total - 1)  # the last of equal scores
    true = np.cumsum(members[order])[ends]
    zero = np.zeros(1, dtype=np.int64)
    return Roc(
        np.concatenate([zero, ends + 1 - true]),
        np.concatenate([zero, true]),
        total - inside,
        inside,
    )


def true_rate(curve: Roc, false_rate: float, confidence: float = 0.95) -> Point:
    """How many members are found where at most ``false_rate`` of the others are accused."""
    place = int(np.searchsorted(curve.false, false_rate * curve.others + 1e-9, side="right")) - 1
    found = int(curve.true[place])
    low, high = clopper_pearson(found, curve.members, confidence)
    return Point(false_rate, found / curve.members, low, high)


def bound(curve: Roc, delta: float, confidence: float = 0.95) -> float:
    """The epsilon that the curve refutes: any smaller one would have kept it out of reach.

    True rates are at most e^epsilon times the false rate, plus delta; both rates are taken from the
    wrong end of their Clopper-Pearson intervals, over all of :data:`RATES` and both kinds of error
    together. 0 where nothing is proven.

    The thresholds are chosen on the scores that are counted. That is exact for a fixed threshold
    and for independent examples, and an approximation otherwise: a bound to be believed is that of
    :mod:`umbel.privacy.audits.one_run`.

    Source: Kairouz, Oh and Viswanath 2015, Theorem 2.1 (arXiv:1311.0776); Nasr et al. 2021
    (arXiv:2101.04535).
    """
    each = 1 - (1 - confidence) / (2 * len(RATES))
    best = 0.0
    for rate in RATES:
        place = int(np.searchsorted(curve.false, rate * curve.others + 1e-9, side="right")) - 1
        pairs = (
            (curve.true[place], curve.members, curve.false[place], curve.others),
            # The same from the other end: non-members found, members missed.
            *_mirrored(curve, rate),
        )
        for hit, of, wrong, among in pairs:
            low = clopper_pearson(int(hit), of, each)[0] - delta
            high = clopper_pearson(int(wrong), among, each)[1]
            if low > 0:
                best = max(best, math.log(low / high))
    return best


def _mirrored(curve: Roc, rate: float) -> list[tuple[int, int, int, int]]:
    missed, spared = curve.members - curve.true, curve.others - curve.false
    places = np.flatnonzero(missed <= rate * curve.members + 1e-9)
    place = int(places[0])
    return [(int(spared[place]), curve.others, int(missed[place]), curve.members)]


def rmia(
    target: F64, shadows: F64, population: F64, population_shadows: F64, gamma: float = 1.0
) -> F64:
    """How often an example's likelihood ratio beats that of examples of the population, (n,).

    ``p(x | model) / p(x)`` against the same for each z of the population, where p(x) is the mean
    over shadow models, of which half were trained on x.

    Args:
        target: (n,), probability that the target model gives the label of each candidate.
        shadows: (models, n), that of the shadow models.
        population: (z,), that of the target for examples that it was not trained on.
        population_shadows: (models, z).
        gamma: by how much the ratio has to be larger.

    Source: Zarifzadeh, Liu and Shokri 2024, RMIA, equations 2 to 4 (arXiv:2312.03262).
    """
    ratio = target / np.maximum(shadows.mean(0), 1e-30)
    others = np.sort(population / np.maximum(population_shadows.mean(0), 1e-30))
    beaten = np.searchsorted(others, ratio / gamma, side="right")
    # Ties of the share are broken by the ratio itself, which is what the share is of.
    fine: F64 = beaten / len(others) + 1e-9 * np.tanh(np.log(np.maximum(ratio, 1e-30)))
    return fine
