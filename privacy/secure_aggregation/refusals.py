"""Why a client stops: one reason a refusal, carried by one exception inside the package.

Whatever arrives, a client answers with its next message or with a refusal; nothing else leaves it.
The numbers are on the wire and are never reused.
"""

from __future__ import annotations

from enum import IntEnum


class Reason(IntEnum):
    """What a client, or a parser, found wrong."""

    MALFORMED = 1
    OUT_OF_TURN = 2
    REPLAY = 3
    OTHER_MODEL = 4
    OTHER_TERMS = 5
    COHORT_TOO_SMALL = 6
    THRESHOLD_TOO_LOW = 7
    NO_SUCH_GRAPH = 8
    RING_OVERFLOW = 9
    UNKNOWN_MEMBER = 10
    DUPLICATE_MEMBER = 11
    NOT_IN_ROSTER = 12
    REPLACED_KEY = 13
    ROSTER_GREW = 14
    DRAWS_EXHAUSTED = 15
    WRONG_REVEAL = 16
    NOT_A_NEIGHBOUR = 17
    TOO_FEW_SHARES = 18
    TAMPERED_SHARES = 19
    BAD_INPUT = 20
    ACTIVE_AND_DEAD = 21
    DECLARED_DEAD = 22
    UNACCOUNTED_NEIGHBOUR = 23
    UNCONFIRMED_EDGE = 24
    TOO_FEW_SURVIVORS = 25
    SPLIT_VIEWS = 26
    TOO_FEW_CONSENTS = 27
    ALREADY_UNMASKED = 28
    DEAD = 29
    NO_SETUP = 30


class Refused(Exception):
    """Stops a step; the state machine turns it into a signed refusal.

    Args:
        reason: the code that travels.
        detail: a short sentence on public values only: counts, member numbers, bounds.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
