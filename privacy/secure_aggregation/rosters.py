"""What a client checks in a roster before it does anything with it."""

from __future__ import annotations

import numpy as np

from umbel.privacy.secure_aggregation.messages import ADVERT_BYTES, Advert, Roster
from umbel.privacy.secure_aggregation.parameters import (
    MAX_DRAWS,
    corrupt_bound,
    is_regular,
    safe_threshold,
)
from umbel.privacy.secure_aggregation.refusals import Reason, Refused
from umbel.privacy.secure_aggregation.terms import Policy, Terms


def accept_roster(
    roster: Roster,
    *,
    previous: Roster | None,
    own: Advert,
    known: int,
    terms: Terms,
    policy: Policy,
) -> tuple[int, ...]:
    """The members of ``roster``, ascending, if a client may take part in it.

    Signatures are left to when the neighbours are known: an entry that is not a neighbour's gives
    its commitment alone, and a forged one counts as a corrupt client's.

    Args:
        previous: the roster of the draw before, of which this one must be a part.
        own: the advert that this client sent.
        known: members in the pinned directory.
    Raises:
        Refused: with what is wrong.
    """
    members = _members(roster.adverts)
    n, k, t = len(members), roster.neighbours, roster.threshold
    if members and members[-1] >= known:
        raise Refused(Reason.UNKNOWN_MEMBER, f"member {members[-1]} is not pinned")
    if own.member not in members:
        raise Refused(Reason.NOT_IN_ROSTER, "this client advertised and is left out")
    if roster.entry(members.index(own.member)) != own:
        raise Refused(Reason.REPLACED_KEY, "this client's own advert was changed")
    _check_draw(roster, previous)
    if n < policy.min_cohort:
        raise Refused(Reason.COHORT_TOO_SMALL, f"{n} members, policy asks for {policy.min_cohort}")
    if n > policy.max_cohort:
        raise Refused(
            Reason.RING_OVERFLOW, f"{n} members, and noise and ring are for {policy.max_cohort}"
        )
    if not is_regular(n, k) or not 1 <= t <= k:
        raise Refused(Reason.NO_SUCH_GRAPH, f"no {k} neighbours, {t} to agree, among {n}")
    x = corrupt_bound(n, k, policy.corrupt_fraction, policy.sigma)
    if t < safe_threshold(k, x):
        raise Refused(
            Reason.THRESHOLD_TOO_LOW,
            f"threshold {t}, need {safe_threshold(k, x)} with {k} neighbours, {x} of them corrupt",
        )
    if t + 1 < policy.min_cohort:
        raise Refused(
            Reason.COHORT_TOO_SMALL,
            f"threshold {t} allows sums of {t + 1}, policy asks for {policy.min_cohort}",
        )
    if terms.overflows(n):
        raise Refused(
            Reason.RING_OVERFLOW,
            f"{n} values of {terms.value_bits} bits do not fit {terms.ring_bits} bits",
        )
    return members


def _members(adverts: bytes) -> tuple[int, ...]:
    table = np.frombuffer(adverts, dtype=[("member", ">u4"), ("rest", f"V{ADVERT_BYTES - 4}")])
    numbers = table["member"].astype(np.int64)
    if (np.diff(numbers) <= 0).any():
        raise Refused(Reason.DUPLICATE_MEMBER, "a member is listed twice or out of order")
    return tuple(numbers.tolist())


def _check_draw(roster: Roster, previous: Roster | None) -> None:
    if roster.draw >= MAX_DRAWS:
        raise Refused(Reason.DRAWS_EXHAUSTED, f"a round draws at most {MAX_DRAWS} graphs")
    if previous is None:
        if roster.draw != 0:
            raise Refused(Reason.OUT_OF_TURN, f"draw {roster.draw} before draw 0")
        return
    # Each draw opens another link of the chain; a second answer to one draw would be a replay.
    if roster.draw != previous.draw + 1:
        raise Refused(Reason.OUT_OF_TURN, f"draw {roster.draw} after draw {previous.draw}")
    before = {
        previous.adverts[start : start + ADVERT_BYTES]
        for start in range(0, len(previous.adverts), ADVERT_BYTES)
    }
    for start in range(0, len(roster.adverts), ADVERT_BYTES):
        if roster.adverts[start : start + ADVERT_BYTES] not in before:
            raise Refused(Reason.ROSTER_GREW, "a later draw may only leave members out")
