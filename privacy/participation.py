"""What a run asks of each unit of privacy: how often it contributes, to what, and what that costs.

Server, client and accountant read it from the same functions, so that what is debited is what is
done.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from umbel.core.errors import InputError
from umbel.core.run_file import Privacy, RunFile
from umbel.privacy.correlated_noise import Correlated
from umbel.privacy.distributed import Noise, as_private_as
from umbel.privacy.matrix_factorisation import Participation
from umbel.privacy.mechanisms import (
    EVERYONE,
    Concentrated,
    Factorised,
    Gaussian,
    Sampling,
    SkellamSum,
    batches,
)


class Plan(NamedTuple):
    """How a client takes part in one round of DP-SGD.

    Args:
        parts: an example is in a batch with probability 1 / parts: so many batches are one
            expected pass, and the expected batch is at most ``batch_size``.
        steps: batches in a round, empty ones included.
    """

    parts: int
    steps: int


def plan(run: RunFile, n: int) -> Plan:
    """The plan of a client that holds ``n`` examples: a function of the run file and ``n``."""
    size = run.client.batch_size
    parts = 1 if size == "full" else -(-n // size)
    epochs, steps = run.round_length
    return Plan(parts, (epochs or 1) * parts if steps is None else steps)


class Release(NamedTuple):
    """What one round costs a client that is asked in it; with correlated noise, what all rounds do.

    Args:
        mechanism: one release.
        steps: how many.
    """

    mechanism: Gaussian | Factorised | Concentrated | SkellamSum
    steps: int


def release(run: RunFile, noise_multiplier: float, n: int, cohort_rate: float) -> Release:
    """What one round costs under ``[privacy]``.

    Args:
        run: the run file.
        noise_multiplier: std over clip norm.
        n: examples of the client.
        cohort_rate: the probability with which a client is drawn, where that is by independent
            coins that the adversary does not see; else it is not looked at.
    """
    section = run.privacy
    relation = section.neighbouring
    if section.correlated:
        return Release(correlated(run, noise_multiplier).mechanism(relation), 1)
    if section.distributed:
        noise = noise_of(section)
        return Release(as_private_as(noise_multiplier, noise, shares(run), relation), 1)
    if section.unit == "client":
        return Release(Gaussian(noise_multiplier, _cohort(section, cohort_rate), relation), 1)
    parts, steps = plan(run, n)
    # Amplification under replace-one has no tight bound here: it counts as none.
    sampling = EVERYONE if relation == "replace-one" else batches(1 / parts)
    return Release(Gaussian(noise_multiplier, sampling, relation), steps)


def _cohort(section: Privacy, rate: float) -> Sampling:
    if section.adversary == "server":
        return EVERYONE
    return Sampling("poisson", rate, section.adversary_because)


def noise_of(section: Privacy) -> Noise:
    """Whose shares clients add."""
    return "skellam" if section.mechanism == "distributed-skellam" else "discrete-gaussian"


def shares(run: RunFile) -> int:
    """Distributed noise: how many shares of it are in every sum, those of corrupt clients, who
    know their own, not counted.

    Raises:
        InputError: the run does not say how many clients take part, or too few of them are honest.
    """
    section, cohort = run.secure_aggregation, run.strategy.cohort
    if not isinstance(cohort, int):
        raise InputError(
            "the cohort of this run was not counted",
            where="[strategy] cohort",
            fix="whoever conducts a run sets it before it starts",
        )
    corrupt = math.floor(section.corrupt_fraction * cohort)
    if section.min_cohort <= corrupt:
        raise InputError(
            f"min_cohort = {section.min_cohort} and {corrupt} of {cohort} clients may be corrupt: "
            "nobody's noise is sure to be in a sum",
            where="[secure_aggregation]",
            fix="raise min_cohort, or state a smaller corrupt_fraction",
        )
    return section.min_cohort - corrupt


def correlated(run: RunFile, noise_multiplier: float) -> Correlated:
    """The plan of the noise of all rounds of ``run``.

    Raises:
        InputError: the run does not say how soon a client may come back.
    """
    section = run.privacy
    assert section.mechanism == "tree" or section.mechanism == "banded"
    if section.separation is None:
        raise InputError(
            "the separation of this run was not found out",
            where="[privacy]",
            fix="whoever conducts a run sets separation before it starts",
        )
    who = Participation(run.run.rounds, section.separation)
    return Correlated(section.mechanism, who, section.clip_norm, noise_multiplier, section.band)
