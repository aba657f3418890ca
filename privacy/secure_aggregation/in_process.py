"""A round inside one process: real keys, real masks, no network.

For simulations and for tests, which lose messages and read the wire here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from umbel.privacy.secure_aggregation.client import Client
from umbel.privacy.secure_aggregation.messages import encode
from umbel.privacy.secure_aggregation.server import Aborted, Outbox, Server, Stage, Total
from umbel.privacy.secure_aggregation.terms import Terms


def nobody(stage: Stage, member: int) -> bool:
    """Loses nobody."""
    return False


def unread(sender: int | None, data: bytes) -> None:
    """Reads no message."""


def run_round(
    server: Server,
    clients: Mapping[int, Client],
    terms: Terms,
    *,
    silent: Callable[[Stage, int], bool] = nobody,
    wire: Callable[[int | None, bytes], None] = unread,
) -> Total | Aborted:
    """Runs a round to its end.

    Args:
        clients: by member number, those that the server invites.
        silent: whether a member's answer in a stage is lost; a lost member stays lost, because
            the server does not write to it again.
        wire: sees every message; the sender is None for the server.
    """
    out: Outbox | Total | Aborted = server.invite()
    while isinstance(out, Outbox):
        for member, data in out.messages.items():
            wire(None, data)
            if silent(server.stage, member):
                continue
            answer = encode(clients[member].step(data), terms.digest)
            wire(member, answer)
            server.receive(member, answer)
        out = server.advance()
    return out
