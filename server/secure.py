"""Secure aggregation in a run: what is refused, how a round is laid out, what its sum becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.core.payloads import Failure, TrainPlan, Updates, canonical_json
from umbel.core.run_file import RunFile, SecureAggregation
from umbel.privacy.secure_aggregation.keystream import Words
from umbel.privacy.secure_aggregation.parameters import (
    Design,
    choose,
    corrupt_bound,
    is_regular,
    safe_threshold,
)
from umbel.privacy.secure_aggregation.terms import MAX_MEMBERS, Policy
from umbel.server.private_sum import PrivateSums
from umbel.server.rounds import Cohort
from umbel.server.sampling import cohort_size
from umbel.strategies.parts import Combiner
from umbel.strategies.parts.combine import Sums, weighted_mean
from umbel.strategies.parts.noisy_sum import NoisySum
from umbel.strategies.parts.secure_sum import SecureSum, Sum

WHERE = "[secure_aggregation]"


def check(run: RunFile, combiner: Combiner, clients: int) -> None:
    """Passes if ``run`` can be summed securely, or asks for nothing of the kind.

    Raises:
        InputError: with what stands against it and what to do.
    """
    section, strategy = run.secure_aggregation, run.strategy
    if not section.enabled:
        return
    if combiner.merge is None and section.groups == 1:
        raise InputError(
            f"strategy '{strategy.name}' needs single updates, and secure aggregation hides them",
            where=WHERE,
            fix="set groups = 5 or so: the strategy then sees the sums of random groups",
        )
    if strategy.over_selection:
        raise InputError(
            "over_selection asks reserves whose updates could not be left out of a sum again",
            where="[strategy] over_selection",
            fix="remove it; dropout_fraction says how many may vanish",
        )
    if strategy.weights == "examples" and strategy.max_weight is None:
        raise InputError(
            "weights = 'examples' has no bound: under secure aggregation nobody sees the counts, "
            "so none can be computed from them",
            where="[strategy]",
            fix="set max_weight (no client then weighs more), or weights = 'uniform'",
        )
    if run.evaluate.per_client:
        raise InputError(
            "per_client = true shows each client's figures, which secure aggregation hides",
            where="[evaluate] per_client",
            fix="remove it",
        )
    cohort = cohort_size(strategy, clients)
    smallest = cohort // section.groups
    if smallest < section.min_cohort:
        raise InputError(
            f"{cohort} client(s) in {section.groups} group(s): a sum of {smallest} is below "
            f"min_cohort = {section.min_cohort}",
            where=WHERE,
            fix="take a larger cohort, or fewer groups",
        )
    largest = -(-cohort // section.groups)
    if largest > MAX_MEMBERS:
        raise InputError(
            f"{largest} clients in one sum, at most {MAX_MEMBERS}", where=WHERE, fix="set groups"
        )
    for size in {smallest, largest}:
        design(section)(size)


def policy(run: RunFile, clients: int) -> Policy:
    """What a member of this run demands of each round."""
    section = run.secure_aggregation
    most = cohort_size(run.strategy, clients) if run.privacy.distributed else MAX_MEMBERS
    return Policy(section.min_cohort, section.corrupt_fraction, max_cohort=most)


def design(section: SecureAggregation) -> Callable[[int], Design]:
    """The graph and threshold for as many as take part: chosen, or as the run file states them."""

    def of(n: int) -> Design:
        k = section.neighbours
        if k is None and section.threshold is None:
            return choose(n, section.corrupt_fraction, section.dropout_fraction, section.min_cohort)
        degree = n - 1 if k is None or k >= n - 1 else k - (k * n % 2)
        if n < section.min_cohort or not is_regular(n, degree):
            raise InputError(
                f"no graph of {degree} neighbours each on {n} clients",
                where=WHERE,
                fix="take a larger cohort, or leave neighbours out",
            )
        x = corrupt_bound(n, degree, section.corrupt_fraction)
        least = max(safe_threshold(degree, x), section.min_cohort - 1)
        t = least if section.threshold is None else section.threshold
        if k is not None and degree < k:  # fewer answered than the threshold was stated for
            t = min(t, max(least, t * degree // k))
        if not least <= t <= degree:
            raise InputError(
                f"threshold = {t} with {degree} neighbours, {x} of whom may be corrupt: need "
                f"{least} to {degree}",
                where=WHERE,
                fix="leave threshold out, or state a smaller corrupt_fraction",
            )
        return Design(degree, t, x)

    return of


def deal(plan: TrainPlan, seed: int, groups: int) -> list[list[str]]:
    """The plan's clients in random groups of almost equal size, each in the plan's order."""
    order = randomness.permutation(
        randomness.key(seed, "secure groups", plan.round), len(plan.clients)
    )
    return [[plan.clients[i] for i in sorted(order[g::groups].tolist())] for g in range(groups)]


def cap_of(run: RunFile) -> float:
    """The most that a client weighs; 1 where all weigh the same."""
    if run.strategy.weights == "uniform":
        return 1.0
    assert run.strategy.max_weight is not None  # checked before a run begins
    return run.strategy.max_weight


def opened(sums: SecureSum | NoisySum, words: Words, clients: int, metrics: Sequence[str]) -> Sum:
    """What the summed vector of ``clients`` says."""
    if isinstance(sums, SecureSum):
        return sums.decode(words, clients, metrics)
    # How many were clipped is under the noise as well.
    return Sum(PrivateSums(Sums(sums.decode(words), float(clients), clients), 0, clients), {})


def model_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """The hash of a model, 32 bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def cohort(
    parts: Sequence[tuple[Sequence[str], Sum]], combiner: Combiner, plan: TrainPlan
) -> Cohort:
    """What the round loop gets: the groups' sums as one part of the cohort.

    A strategy that needs single updates is given one a group, its weighted mean.

    Args:
        parts: for each group that has a sum, the survivors and the sum.
        combiner: of the strategy.
        plan: of the round.
    """
    tensors = plan.expected()
    whole = Cohort(combiner.zero(tensors))
    means = weighted_mean()
    for survivors, (accumulator, totals) in parts:
        if combiner.merge is not None:
            whole.sums = combiner.merge(whole.sums, accumulator)
        else:
            mean = means.finish(accumulator)
            group = Updates(
                plan.round,
                [survivors[0]],
                {n: _cast(t, tensors[n])[None] for n, t in mean.delta.items()},
                torch.tensor([mean.weight], dtype=torch.float64),
            )
            whole.sums = combiner.add(whole.sums, group)
        whole.participants.extend(survivors)
        for name, (total, weight) in totals.items():
            mine = whole.totals.setdefault(name, [0.0, 0.0])
            mine[0] += total
            mine[1] += weight
    whole.arrange(plan.clients)
    return whole


def aborted(clients: Sequence[str], lost: Mapping[str, str], why: str) -> list[Failure]:
    """The failures of a group whose round has no sum."""
    return [
        Failure(client, lost.get(client, f"secure aggregation ended without a sum: {why}"))
        for client in clients
    ]


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    if like.dtype.is_floating_point:
        return tensor.to(like.dtype)
    return tensor.round().to(like.dtype)
