"""What a run will cost each client, before it starts; and the noise that a budget asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.privacy.accounting import Accountant, Epsilon, History, epsilon, rdp_epsilon
from umbel.privacy.calibration import noise_multiplier
from umbel.privacy.mechanisms import Factorised, Mechanism
from umbel.privacy.participation import Release, release, shares
from umbel.privacy.sources import Sources
from umbel.server import secure
from umbel.server.sampling import asked_at_most, cohort_size, sample, separated

Sizes = Sequence[int] | npt.NDArray[np.int64]


class Load(NamedTuple):
    """Clients that pay the same in a round, and the most rounds that one of them is asked in.

    Args:
        n: examples of one of them.
        rounds: planned.
    """

    n: int
    rounds: int


class Planned(NamedTuple):
    """The plan of the clients that will have spent the most.

    Args:
        epsilon: theirs, when all planned rounds are done; an upper bound.
        release: what a round costs them.
        rounds: that they take part in.
    """

    epsilon: Epsilon
    release: Release
    rounds: int


def cohort_rate(run: RunFile, clients: int) -> float:
    """The probability with which a client is asked in a round."""
    return cohort_size(run.strategy, clients) / clients


def asked(run: RunFile, clients: Sequence[str], number: int, sources: Sources) -> list[str]:
    """Who is asked in a round, in lexicographic order.

    Where the adversary is an outsider each client is drawn by its own coin, and there may be
    nobody; else as in every other run.
    """
    if run.privacy.correlated:
        apart = run.privacy.separation
        assert apart is not None
        return separated(clients, run.strategy, run.run.seed, number, apart)
    if run.privacy.adversary == "server":
        return sample(clients, run.strategy, run.run.seed, number)
    rate = cohort_rate(run, len(clients))
    drawn = sources(number, "cohort").stream.words(len(clients)) < np.uint64(
        min(int(rate * 2.0**64), 2**64 - 1)
    )
    return [clients[place] for place in np.flatnonzero(drawn).tolist()]


def loads(run: RunFile, sizes: Sizes) -> list[Load]:
    """Who pays how much over the planned rounds; one for each number of parts."""
    if run.privacy.correlated:
        return [Load(1, 1)]  # one release, of all rounds
    counted = np.asarray(sizes, dtype=np.int64)
    rounds = _rounds(run, len(counted))
    if run.privacy.unit == "client":
        return [Load(1, int(rounds.max()))]
    size = run.client.batch_size
    parts = np.ones_like(counted) if size == "full" else -(-counted // size)
    found = []
    for part in np.unique(parts).tolist():
        here = parts == part
        found.append(Load(int(counted[here][0]), int(rounds[here].max())))
    return found


def _rounds(run: RunFile, clients: int) -> npt.NDArray[np.int64]:
    """How many rounds each client is asked in, reserves included, (clients,)."""
    section, planned = run.strategy, run.run.rounds
    if run.privacy.adversary == "outsider":
        return np.full(clients, planned)
    count = np.zeros(clients, dtype=np.int64)
    if asked_at_most(section, clients) == clients:
        return count + planned
    places: Any = range(clients)
    for number in range(1, planned + 1):
        drawn: Any = sample(places, section, run.run.seed, number)
        count[drawn] += 1
    return count


def planned(run: RunFile, sizes: Sizes, z: float) -> Planned:
    """What the planned rounds cost, for the clients that pay the most."""
    return _planned(_key(run, sizes), z)


class _Key(NamedTuple):
    """What a plan depends on."""

    loads: tuple[Load, ...]
    rate: float
    run: str


def _key(run: RunFile, sizes: Sizes) -> _Key:
    return _Key(tuple(loads(run, sizes)), cohort_rate(run, len(sizes)), run.model_dump_json())


@lru_cache(maxsize=32)
def _planned(key: _Key, z: float) -> Planned:
    run = RunFile.model_validate_json(key.run)
    section = run.privacy
    costs = []
    for load in key.loads:
        found = release(run, z, load.n, key.rate)
        history: History = {found.mechanism: found.steps * load.rounds}
        costs.append((rdp_epsilon(history, section.delta), history, found, load.rounds))
    costs.sort(key=lambda cost: -cost[0])
    best: Planned | None = None
    for online, history, found, rounds in costs:
        # PLD's answer is never above RDP's: who is behind by RDP cannot get ahead.
        if best is not None and online <= best.epsilon.epsilon:
            break
        tight = epsilon(history, section.delta, section.accountant)
        if best is None or tight.epsilon > best.epsilon.epsilon:
            best = Planned(tight, found, rounds)
    assert best is not None
    return best


def calibrated(run: RunFile, sizes: Sizes) -> RunFile:
    """The run with the noise multiplier that its budget asks for, unless it states one; and with
    the separation that correlated noise is made for, or the cohort and the fewest survivors that
    distributed noise is sized for.

    Over the rounds that each client is really asked in: the cohorts of all rounds are known. No
    client passes the budget; the one that comes nearest just keeps it.

    Raises:
        InputError: the budget cannot be kept with any sensible noise.
    """
    run = _counted(_apart(run, len(sizes)), len(sizes))
    section = run.privacy
    if section.unit == "none" or section.noise_multiplier is not None:
        return run
    assert section.epsilon is not None
    z = 0.0
    key = _key(run, sizes)
    by_cost = sorted(key.loads, key=lambda load: -_online(run, load, key.rate))
    for load in by_cost:
        found = release(run, max(z, 1.0), load.n, key.rate)
        if z and _fits(run, load, key.rate, z, section.accountant):
            continue
        z = noise_multiplier(
            section.epsilon,
            section.delta,
            found.steps * load.rounds,
            found.mechanism.sampling,
            section.neighbouring,
            accountant=section.accountant,
            mechanism=_maker(run) if section.distributed else None,
        )
    return with_noise(run, z)


def _maker(run: RunFile) -> Callable[[float], Mechanism]:
    return lambda z: release(run, z, 1, 1.0).mechanism


def _counted(run: RunFile, clients: int) -> RunFile:
    """The run of distributed noise with its cohort as a number, and with the fewest survivors that
    its protocol leaves as ``min_cohort``, which each client insists on: the noise is sized for
    them."""
    if not run.privacy.distributed:
        return run
    check_shares(run)
    section, cohort = run.secure_aggregation, cohort_size(run.strategy, clients)
    fewest = max(section.min_cohort, secure.design(section)(cohort).threshold + 1)
    counted = run.model_copy(
        update={
            "strategy": run.strategy.model_copy(update={"cohort": cohort}),
            "secure_aggregation": section.model_copy(update={"min_cohort": fewest}),
        }
    )
    shares(counted)  # refuses a run in which nobody's noise is sure to be in the sum
    return counted


def check_shares(run: RunFile) -> None:
    """Refuses distributed noise where no secure sum hides single shares of it.

    Raises:
        InputError: naming the key.
    """
    section = run.secure_aggregation
    if not section.enabled:
        raise InputError(
            f"mechanism = '{run.privacy.mechanism}' adds a share of the noise at each client, and "
            "the server would see each",
            where="[secure_aggregation] enabled",
            fix="set enabled = true, or mechanism = 'gaussian'",
        )
    if section.groups > 1:
        raise InputError(
            f"the sums of {section.groups} groups would each have the noise of a few clients only",
            where="[secure_aggregation] groups",
            fix="remove it",
        )


def _apart(run: RunFile, clients: int) -> RunFile:
    if not run.privacy.correlated or run.privacy.separation is not None:
        return run
    apart = max(1, clients // asked_at_most(run.strategy, clients))
    return run.model_copy(update={"privacy": run.privacy.model_copy(update={"separation": apart})})


def with_noise(run: RunFile, z: float) -> RunFile:
    """The run with this noise multiplier."""
    return run.model_copy(
        update={"privacy": run.privacy.model_copy(update={"noise_multiplier": z})}
    )


def _online(run: RunFile, load: Load, rate: float, z: float = 1.0) -> float:
    found = release(run, z, load.n, rate)
    return rdp_epsilon({found.mechanism: found.steps * load.rounds}, run.privacy.delta)


def _fits(run: RunFile, load: Load, rate: float, z: float, accountant: Accountant) -> bool:
    target = run.privacy.epsilon
    assert target is not None
    if _online(run, load, rate, z) <= target:
        return True
    found = release(run, z, load.n, rate)
    history: History = {found.mechanism: found.steps * load.rounds}
    return epsilon(history, run.privacy.delta, accountant).epsilon <= target


def describe(run: RunFile, sizes: Sizes, generator: str) -> dict[str, Any] | None:
    """The plan as plain values; ``None`` without ``[privacy]``.

    Args:
        run: calibrated.
        sizes: examples of each client.
        generator: of the noise.
    """
    section = run.privacy
    if section.unit == "none":
        return None
    z = section.noise_multiplier
    assert z is not None
    most = planned(run, sizes, z)
    mechanism = most.release.mechanism
    rounds, apart = most.rounds, {}
    if isinstance(mechanism, Factorised):  # one release, of all rounds
        rounds, apart = mechanism.most, {"separation": mechanism.separation}
    if section.distributed:
        apart = {"shares": shares(run)}
    return {
        **apart,
        "unit": section.unit,
        "epsilon": finite(most.epsilon.epsilon),
        "delta": section.delta,
        "noise_multiplier": z,
        "clip_norm": section.clip_norm,
        "clipping": section.clipping,
        "sampling_rate": mechanism.sampling.rate,
        "accounted_rate": mechanism.sampling.accounted_rate,
        "steps": most.release.steps * most.rounds,
        "rounds": rounds,
        "accountant": most.epsilon.accountant,
        "neighbouring": section.neighbouring,
        "mechanism": section.mechanism,
        "place": "client" if section.unit == "example" else section.place,
        "budget": section.epsilon,
        "generator": generator,
    }


def finite(value: float) -> float | None:
    """The value; ``None`` for infinity, which JSON has no word for: no guarantee at all."""
    return value if math.isfinite(value) else None


def check(run: RunFile, clients: int) -> None:
    """Refuses what ``[privacy]`` cannot be combined with, whatever the model is.

    Raises:
        InputError: naming the key.
    """
    section, strategy = run.privacy, run.strategy
    if section.unit == "none":
        return
    if section.unit == "client" and strategy.weights == "examples" and strategy.max_weight is None:
        raise InputError(
            "weights = 'examples' without max_weight: no bound on what one client contributes",
            where="[strategy] weights",
            fix='set weights = "uniform", or max_weight to a number of examples',
        )
    if section.adversary == "outsider" and (strategy.quorum or strategy.over_selection):
        raise InputError(
            "quorum and over_selection show who takes part, which adversary = 'outsider' hides",
            where="[strategy]",
            fix="remove them",
        )
    if section.distributed:
        check_shares(run)
    apart, together = section.separation or 1, asked_at_most(strategy, clients)
    if apart * together > clients:
        raise InputError(
            f"separation = {apart} rounds of {together} clients, and there are {clients}",
            where="[privacy] separation",
            fix=f"set it to {max(1, clients // together)} or less, or take a smaller cohort",
        )
    if clients < 1:
        raise InputError("there is no client", where="[data]", fix="give it one")
