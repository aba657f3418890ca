"""What a run asks of each unit of privacy: how often it contributes, to what, and what that costs.

Server, client and accountant read it from the same functions, so that what is debited is what is
done.
"""

from __future__ import annotations

from typing import NamedTuple

from umbel.core.errors import InputError
from umbel.core.run_file import Privacy, RunFile
from umbel.privacy.correlated_noise import Correlated
from umbel.privacy.matrix_factorisation import Participation
from umbel.privacy.mechanisms import EVERYONE, Factorised, Gaussian, Sampling, batches


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

    mechanism: Gaussian | Factorised
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
