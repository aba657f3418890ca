"""A member's seat at secure aggregation: who it is, whom it knows, and what it keeps in between.

Between two messages of a round its secrets lie in one document, which whoever runs the client keeps
in memory that belongs to the client alone and gives back with the next message; after the last
answer there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.core import signing
from umbel.core.errors import InputError
from umbel.core.run_file import SecureAggregation
from umbel.privacy.secure_aggregation.client import Client
from umbel.privacy.secure_aggregation.freezing import freeze, freeze_setup, thaw, thaw_setup
from umbel.privacy.secure_aggregation.identities import Directory, Identity, simulated
from umbel.privacy.secure_aggregation.keystream import Words
from umbel.privacy.secure_aggregation.messages import Again, Invitation, decode, encode
from umbel.privacy.secure_aggregation.refusals import Reason, Refused
from umbel.privacy.secure_aggregation.terms import MAX_MEMBERS, TERMS_BYTES, Policy, Terms


class Seat(NamedTuple):
    """A member among those that were pinned.

    Args:
        member: its number. identity: its key.
        directory: everybody's keys, in the order of their names.
        min_cohort: the fewest members of a sum that the site itself agrees to.
    """

    member: int
    identity: Identity
    directory: Directory
    min_cohort: int


class Demands(NamedTuple):
    """What a run demands of its rounds; the site may demand more, never less.

    Args:
        section: of the run file.
        modular: whether the vector's numbers fill the ring, as distributed noise has it.
        max_cohort: clients in a round, at the most.
    """

    section: SecureAggregation
    modular: bool = False
    max_cohort: int = MAX_MEMBERS


class Round(NamedTuple):
    """What the server announces beside the protocol's own messages.

    Args:
        run: 16 bytes. number: 1 … rounds.
        context: as :func:`~umbel.privacy.secure_aggregation.context.context_of` makes it here.
    """

    run: bytes
    number: int
    context: bytes


class Answered(NamedTuple):
    """What a step came to: the answer, what to keep until the next one, and for later rounds."""

    answer: bytes
    kept: bytes | None
    setup: bytes | None = None


def seat_at(
    name: str, identity: Ed25519PrivateKey, peers: Mapping[str, bytes], min_cohort: int = 3
) -> Seat:
    """The seat of a site with its own key and the pinned keys of all, its own among them.

    Raises:
        InputError: the site is not among them, or its key is another.
    """
    names = sorted(peers)
    own = Identity(identity.private_bytes_raw())
    if peers.get(name) != own.public_key:
        raise InputError(
            f"'{name}' is not pinned with its own identity key",
            where="secure aggregation",
            fix="join again: the kit holds the keys of all sites",
        )
    directory = Directory([peers[peer] for peer in names])
    return Seat(names.index(name), own, directory, max(3, min_cohort))


def seat_from_files(name: str, identity: Path, peers: Path) -> Seat:
    """The same from a key file, and a JSON object: site -> key in hexadecimal digits."""
    table = json.loads(peers.read_text(encoding="utf-8"))
    keys = {str(peer): bytes.fromhex(key) for peer, key in table.items()}
    return seat_at(name, signing.read_key(identity), keys)


def simulated_seat(name: str, names: Sequence[str], seed: int) -> Seat:
    """A seat in a simulation, where all keys follow from the seed."""
    listed = sorted(names)
    identities = [simulated(seed, peer) for peer in listed]
    member = listed.index(name)
    directory = Directory([identity.public_key for identity in identities])
    return Seat(member, identities[member], directory, 3)


def step(
    kept: bytes | None,
    data: bytes,
    seat: Seat,
    announced: Round,
    demands: Demands,
    payload: Callable[[Terms], Words],
    setup: bytes | None = None,
) -> Answered:
    """One message in, one out.

    Args:
        kept: what the step before came to; ``None`` at the start of a round.
        data: the server's message.
        seat: the member's.
        announced: the round that the site's own manifest is about.
        demands: what the run demands.
        payload: gives the member's vector; it refuses terms that do not fit it.
        setup: of an earlier round, for one that begins; a refusal lets go of it.
    """
    terms = _terms(kept, data, seat, announced, demands.modular)
    section = demands.section
    least = max(section.min_cohort, seat.min_cohort)
    policy = Policy(least, section.corrupt_fraction, max_cohort=demands.max_cohort)
    client = Client(
        seat.member,
        seat.identity,
        seat.directory,
        terms,
        policy,
        lambda: payload(terms),
        section.keep_setup,
        None if setup is None else thaw_setup(setup),
    )
    if kept is not None:
        thaw(_split(kept)[1], client)
    answer = encode(client.step(data), terms.digest)
    keeps = client.setup is not None and client.state.over in (None, Reason.ALREADY_UNMASKED)
    lasting = freeze_setup(client.setup) if keeps and client.setup is not None else None
    return Answered(answer, None if client.finished else terms.encode() + freeze(client), lasting)


def _split(kept: bytes) -> tuple[Terms, bytes]:
    return Terms.decode(kept[:TERMS_BYTES]), kept[TERMS_BYTES:]


def _terms(kept: bytes | None, data: bytes, seat: Seat, announced: Round, modular: bool) -> Terms:
    """The terms that the member holds the server to.

    Size and bits are the server's until the payload is made, which refuses others; all else is the
    member's own.
    """
    size, ring_bits, value_bits = 1, 32, 32 if modular else 1
    if kept is not None:
        own = _split(kept)[0]
        size, ring_bits, value_bits = own.size, own.ring_bits, own.value_bits
    else:
        try:
            message = decode(data, bytes(32))
            if isinstance(message, Invitation | Again):
                theirs = Terms.decode(message.terms)
                if theirs.modular == modular:
                    size, ring_bits, value_bits = theirs.size, theirs.ring_bits, theirs.value_bits
        except (Refused, InputError):
            pass  # the client's own step says what is wrong
    return Terms(
        announced.run,
        announced.number,
        announced.context,
        seat.directory.digest,
        size,
        ring_bits,
        value_bits,
        modular,
    )
