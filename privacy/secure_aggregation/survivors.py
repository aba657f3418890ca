"""What a client checks in a survivor set before it signs it."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from umbel.privacy.secure_aggregation import boxes
from umbel.privacy.secure_aggregation.messages import Survivors
from umbel.privacy.secure_aggregation.refusals import Reason, Refused


def accept_survivors(
    message: Survivors,
    *,
    me: int,
    members: tuple[int, ...],
    neighbours: tuple[int, ...],
    confirmations: Mapping[int, bytes],
    threshold: int,
    min_cohort: int,
    graph_digest: bytes,
) -> None:
    """Passes if ``me`` may consent to ``message``.

    Args:
        members: the roster. neighbours: those of ``me`` in the graph.
        confirmations: the key of each neighbour whose mask is in this client's vector.
        threshold: neighbours in the sum, at the least. min_cohort: members in it.
    Raises:
        Refused: with what is wrong.
    """
    active, dead = set(message.active), set(message.dead)
    if both := active & dead:
        raise Refused(Reason.ACTIVE_AND_DEAD, f"member {min(both)} is active and dead")
    if me not in active:
        raise Refused(Reason.DECLARED_DEAD, "this client is alive and not in the sum")
    if strangers := (active | dead) - set(members):
        raise Refused(Reason.UNKNOWN_MEMBER, f"member {min(strangers)} is not in the roster")
    if len(active) < min_cohort:
        raise Refused(
            Reason.TOO_FEW_SURVIVORS, f"{len(active)} in the sum, policy asks for {min_cohort}"
        )
    # Whoever is in the sum or dealt shares has its mask in this client's vector, and no other.
    if odd := ((active | dead) & set(neighbours)) ^ confirmations.keys():
        raise Refused(
            Reason.UNACCOUNTED_NEIGHBOUR,
            f"neighbour {min(odd)} shares a mask and is left out, or the reverse",
        )
    alive = active & confirmations.keys()
    if len(alive) < threshold:
        raise Refused(
            Reason.TOO_FEW_SURVIVORS, f"{len(alive)} neighbours in the sum, need {threshold}"
        )
    tags = dict(message.tags)
    for them in alive:
        expected = boxes.confirm(confirmations[them], graph_digest, them, me)
        if not hmac.compare_digest(tags.pop(them, b""), expected):
            raise Refused(
                Reason.UNCONFIRMED_EDGE, f"neighbour {them} did not confirm the mask with it"
            )
    if tags:
        raise Refused(Reason.NOT_A_NEIGHBOUR, f"a tag from {min(tags)}, unasked for")
