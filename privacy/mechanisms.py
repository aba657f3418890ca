"""What is released, as data: each mechanism is frozen and turns into a ``dp_accounting`` event.

The unit of privacy is whose presence is hidden: one *example* of a site, or one *client* with all
that it holds. The neighbouring relation is what "presence" means: the unit is added or removed,
replaced by another, or its contribution zeroed out (Kairouz et al. 2021, Definition 1.1,
arXiv:2103.00039). A noise multiplier is always std / clip_norm, where clip_norm bounds what ONE
unit adds to the sum; the relation turns it into std / sensitivity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from umbel.core.errors import InputError

if TYPE_CHECKING:  # it takes a second to load, and a client that clips needs none of it
    import dp_accounting

Unit: TypeAlias = Literal["example", "client"]
Relation: TypeAlias = Literal["add-or-remove-one", "replace-one", "zero-out"]
Sampler: TypeAlias = Literal["poisson", "none"]
Factorisation: TypeAlias = Literal["tree", "banded"]


def _one_of(name: str, value: str, options: Any) -> None:
    if value not in get_args(options):
        raise InputError(
            f"{name} '{value}' is unknown",
            where="mechanism",
            fix=f"one of: {', '.join(get_args(options))}",
        )


@dataclass(frozen=True)
class Sampling:
    """How units come to take part in one release.

    Sampling amplifies privacy only where each unit is drawn by an independent coin (Poisson) AND
    the adversary does not see the outcome. A site's own batches satisfy both. A server that asks
    clients by name knows who took part: against it q counts as 1, unless the run says why the
    adversary is somebody else.

    Args:
        sampler: ``poisson``: each unit with probability ``rate``, by itself; ``none``: anything
            else, fixed-size batches and shuffled epochs included.
        rate: q, the probability that a unit takes part; in [0, 1].
        hidden_because: why the adversary does not see who took part; empty: it does.

    Raises:
        InputError: ``rate`` is not a probability, or ``sampler`` is unknown.
    """

    sampler: Sampler = "none"
    rate: float = 1.0
    hidden_because: str = ""

    def __post_init__(self) -> None:
        _one_of("sampler", self.sampler, Sampler)
        if not 0 <= self.rate <= 1:
            raise InputError(
                f"sampling rate {self.rate} is not in [0, 1]",
                where="sampling",
                fix="give the probability with which a unit takes part in one step",
            )

    @property
    def accounted_rate(self) -> float:
        """The q that the accountant may use."""
        return self.rate if self.sampler == "poisson" and self.hidden_because else 1.0


EVERYONE = Sampling()
INSIDE_THE_SITE = "drawn inside the site, never sent"


def batches(rate: float) -> Sampling:
    """A site's own Poisson batches, of which nobody else learns the members."""
    return Sampling("poisson", rate, INSIDE_THE_SITE)


@dataclass(frozen=True)
class Gaussian:
    """One release of a sum of clipped contributions plus N(0, (noise_multiplier clip_norm)^2 I).

    Args:
        noise_multiplier: std / clip_norm; 0 is no privacy at all (infinite epsilon).
        sampling: how units come to contribute.
        relation: add-or-remove-one and zero-out have sensitivity clip_norm, replace-one twice that.

    Raises:
        InputError: the multiplier is negative or not finite, the relation unknown, or amplification
            is asked for under replace-one, for which no tight bound is implemented.
    """

    noise_multiplier: float
    sampling: Sampling = EVERYONE
    relation: Relation = "add-or-remove-one"

    def __post_init__(self) -> None:
        _one_of("relation", self.relation, Relation)
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise InputError(
                f"noise multiplier {self.noise_multiplier} is not a finite number of at least 0",
                where="Gaussian mechanism",
                fix="give std / clip_norm",
            )
        if self.relation == "replace-one" and self.sampling.accounted_rate < 1:
            raise InputError(
                "sampling is not amplified under 'replace-one'",
                where="Gaussian mechanism",
                fix="use 'add-or-remove-one', or sampling that counts as q = 1",
            )

    def event(self) -> dp_accounting.DpEvent:
        """The event of one release, for accountants of add-or-remove-one."""
        return _gaussian(
            self.noise_multiplier / factor(self.relation), self.sampling.accounted_rate
        )

    def table(self) -> dict[str, Any]:
        """Plain values, from which :func:`parse` makes the same mechanism."""
        return {
            "kind": "gaussian",
            "noise_multiplier": self.noise_multiplier,
            "sampler": self.sampling.sampler,
            "sampling_rate": self.sampling.rate,
            "hidden_because": self.sampling.hidden_because,
            "relation": self.relation,
        }


@dataclass(frozen=True)
class Factorised:
    """ONE release of all rounds of a run, whose noise is correlated: each round's sum in turn.

    It is a Gaussian release of what a factorisation makes of the rounds' clipped sums
    (:mod:`umbel.privacy.correlated_noise`). Sampling amplifies nothing.

    Args:
        kind: of the factorisation.
        noise_multiplier: std of a draw over how far one unit can move what it is added to, for
            add-or-remove-one; 0 is no privacy at all.
        rounds: of the run; there may be fewer.
        separation: who took part sits out the next separation - 1 rounds, at least.
        most: rounds that a unit takes part in, at most.
        relation: as in :class:`Gaussian`.

    Raises:
        InputError: as :class:`Gaussian`.
    """

    kind: Factorisation
    noise_multiplier: float
    rounds: int
    separation: int
    most: int
    relation: Relation = "add-or-remove-one"

    def __post_init__(self) -> None:
        _one_of("factorisation", self.kind, Factorisation)
        self._gaussian()

    @property
    def sampling(self) -> Sampling:
        """That of nobody in particular."""
        return EVERYONE

    def _gaussian(self) -> Gaussian:
        return Gaussian(self.noise_multiplier, EVERYONE, self.relation)

    def event(self) -> dp_accounting.DpEvent:
        """The event of the one release."""
        return self._gaussian().event()

    def table(self) -> dict[str, Any]:
        """Plain values, from which :func:`parse` makes the same mechanism."""
        return asdict(self)


@dataclass(frozen=True)
class Concentrated:
    """One release that satisfies rho-zCDP, such as a sum of discrete Gaussians.

    Args:
        rho: > 0; ``inf`` is no privacy at all. Already under the ledger's neighbouring relation.
        name: what it is, for people.

    Source: Bun and Steinke 2016, Definition 1.1 (arXiv:1605.02065).
    """

    rho: float
    name: str = "zCDP"

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise InputError(
                f"rho = {self.rho} is not positive", where=self.name, fix="give the zCDP parameter"
            )

    @property
    def sampling(self) -> Sampling:
        """Everybody takes part."""
        return EVERYONE

    def event(self) -> dp_accounting.DpEvent:
        """The event of one release."""
        import dp_accounting

        if math.isinf(self.rho):
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.ZCDpEvent(self.rho)

    def table(self) -> dict[str, Any]:
        """Plain values, from which :func:`parse` makes the same mechanism."""
        rho = None if math.isinf(self.rho) else self.rho
        return {"kind": "concentrated", "rho": rho, "name": self.name}


@dataclass(frozen=True)
class SkellamSum:
    """One release of a sum of integer vectors plus symmetric Skellam noise in every coordinate.

    Known by its Renyi divergences alone, at integer orders: RDP accounts for it, PLD does not.

    Args:
        variance: mu, of the noise in a coordinate of the sum; 0 is no privacy at all.
        l2: how far one unit can move the sum in L2, under the ledger's neighbouring relation.
        l1: the same in L1.

    Source: Agarwal, Kairouz and Liu 2021, Corollary 3.6 (arXiv:2110.04995).
    """

    variance: float
    l2: float
    l1: float

    def __post_init__(self) -> None:
        if not (self.variance >= 0 and self.l2 >= 0 and self.l1 >= self.l2):
            raise InputError(
                f"variance {self.variance}, L2 {self.l2}, L1 {self.l1}",
                where="Skellam mechanism",
                fix="give numbers of at least 0; an L1 norm is never below the L2 norm",
            )

    @property
    def sampling(self) -> Sampling:
        """Everybody takes part."""
        return EVERYONE

    def divergence(self, order: float) -> float:
        """The Renyi divergence of ``order`` > 1, at most: it grows with the order, so that one
        between two integers is bounded by that of the upper one."""
        if not self.l2:
            return 0.0
        if not self.variance:
            return math.inf
        alpha, mu = math.ceil(order), self.variance
        excess = ((2 * alpha - 1) * self.l2**2 + 6 * self.l1) / (4 * mu**2)
        return alpha * self.l2**2 / (2 * mu) + min(excess, 3 * self.l1 / (2 * mu))

    def event(self) -> dp_accounting.DpEvent:
        """Of this no accountant of ``dp_accounting`` knows; see :meth:`divergence`."""
        import dp_accounting

        if not self.variance and self.l2:
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.UnsupportedDpEvent()

    def table(self) -> dict[str, Any]:
        """Plain values, from which :func:`parse` makes the same mechanism."""
        return {"kind": "skellam", "variance": self.variance, "l2": self.l2, "l1": self.l1}


Mechanism: TypeAlias = Gaussian | Factorised | Concentrated | SkellamSum


def factor(relation: Relation) -> float:
    """Sensitivity of a clipped sum in units of clip_norm: 2 where a unit is swapped for another."""
    return 2.0 if relation == "replace-one" else 1.0


@lru_cache(maxsize=65536)
def dump(mechanism: Mechanism) -> str:
    """Canonical text: equal mechanisms, equal texts."""
    return json.dumps(mechanism.table(), sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=65536)
def parse(text: str) -> Mechanism:
    """The inverse of :func:`dump`.

    Raises:
        InputError: not the text of a mechanism.
    """
    try:
        table: Mapping[str, Any] = json.loads(text)
        if table["kind"] == "gaussian":
            sampling = Sampling(table["sampler"], table["sampling_rate"], table["hidden_because"])
            return Gaussian(table["noise_multiplier"], sampling, table["relation"])
        if table["kind"] in get_args(Factorisation):
            return Factorised(**table)
        if table["kind"] == "concentrated":
            rho = table["rho"]
            return Concentrated(math.inf if rho is None else rho, table["name"])
        if table["kind"] == "skellam":
            return SkellamSum(table["variance"], table["l2"], table["l1"])
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"'{text}' is not a mechanism", where="ledger", fix="was it written by a newer Umbel?"
    )


def _gaussian(noise_multiplier: float, rate: float) -> dp_accounting.DpEvent:
    import dp_accounting

    if rate == 0:
        return dp_accounting.NoOpDpEvent()
    if noise_multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    return event if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, event)
