"""The messages, in their order; frozen, with one canonical encoding each.

Every message starts with a magic word, its kind and the digest of the round's terms, so that one of
another run, round or model is recognised before anything in it is read.

    server → client    client → server
    Invitation         Advert            an ephemeral public key and a commitment
    Roster             Reveal            the secret of this draw         (sparse graphs only)
    Draw               Shares            sealed shares of two secrets
    Delivery           Masked            the masked vector, a tag and a wrapped half a neighbour
    Survivors          Consent           a tag for each neighbour under the survivor set
    Consents           Unmask            one kind of share a neighbour
                       Refusal           at any time: a reason, signed

In the complete graph there is no draw: a Roster is answered with Shares. Where an earlier round's
roster, graph and keys are kept, Again takes the place of Invitation and is answered with Shares.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from umbel.privacy.secure_aggregation.boxes import BOX_BYTES, HALF_BYTES, TAG_BYTES
from umbel.privacy.secure_aggregation.graph import NONCE_BYTES
from umbel.privacy.secure_aggregation.identities import KEY_BYTES, SIGNATURE_BYTES
from umbel.privacy.secure_aggregation.refusals import Reason, Refused
from umbel.privacy.secure_aggregation.shamir import SHARE_BYTES
from umbel.privacy.secure_aggregation.terms import MAX_MEMBERS, TERMS_BYTES
from umbel.privacy.secure_aggregation.wire import Entry, Reader, pack_entries, pack_members

MAGIC = b"UMBELS\x01"  # seven bytes: a header of 40 leaves the words of a vector aligned
DIGEST_BYTES = 32
HEADER_BYTES = len(MAGIC) + 1 + DIGEST_BYTES
ADVERT_BYTES = 4 + KEY_BYTES + NONCE_BYTES
MAX_DETAIL = 200
_REASONS = frozenset(reason.value for reason in Reason)


@dataclass(frozen=True)
class Invitation:
    """The terms, in their canonical bytes."""

    KIND: ClassVar[int] = 1
    terms: bytes

    def body(self) -> bytes:
        """The encoding without its header."""
        return self.terms

    @classmethod
    def read(cls, reader: Reader) -> Invitation:
        """Takes the body off ``reader``."""
        return cls(reader.take(TERMS_BYTES))


@dataclass(frozen=True)
class Advert:
    """A member's ephemeral key and the end of its hash chain.

    Nothing is signed: a pair's keys hold the secret of both identities as well, so that another's
    ephemeral key opens no box.
    """

    KIND: ClassVar[int] = 2
    member: int
    key: bytes
    commitment: bytes

    def body(self) -> bytes:
        """The encoding without its header; 68 bytes."""
        return struct.pack(">I", self.member) + self.key + self.commitment

    @classmethod
    def read(cls, reader: Reader) -> Advert:
        """Takes the body off ``reader``."""
        return cls(reader.number(4), reader.take(KEY_BYTES), reader.take(NONCE_BYTES))


@dataclass(frozen=True)
class Roster:
    """All who take part, the degree and the threshold.

    ``adverts`` are the bodies in ascending order of members, 68 bytes each; a client reads those
    of its neighbours and the commitments of all.
    """

    KIND: ClassVar[int] = 3
    draw: int
    neighbours: int
    threshold: int
    adverts: bytes

    def body(self) -> bytes:
        """The encoding without its header."""
        return struct.pack(">BHH", self.draw, self.neighbours, self.threshold) + self.adverts

    @classmethod
    def read(cls, reader: Reader) -> Roster:
        """Takes the body off ``reader``."""
        draw, neighbours, threshold = reader.number(1), reader.number(2), reader.number(2)
        adverts = bytes(reader.rest())
        if len(adverts) % ADVERT_BYTES or len(adverts) > ADVERT_BYTES * MAX_MEMBERS:
            raise Refused(Reason.MALFORMED, f"{len(adverts)} bytes are no list of adverts")
        return cls(draw, neighbours, threshold, adverts)

    def entry(self, position: int) -> Advert:
        """The advert at ``position``."""
        start = ADVERT_BYTES * position
        return Advert.read(Reader(self.adverts[start : start + ADVERT_BYTES]))

    def commitments(self) -> list[bytes]:
        """The commitments of all, in roster order."""
        first = 4 + KEY_BYTES
        starts = range(first, len(self.adverts), ADVERT_BYTES)
        return [self.adverts[start : start + NONCE_BYTES] for start in starts]


@dataclass(frozen=True)
class Reveal:
    """A member's secret for one draw of the graph."""

    KIND: ClassVar[int] = 4
    member: int
    draw: int
    nonce: bytes

    def body(self) -> bytes:
        """The encoding without its header."""
        return struct.pack(">IB", self.member, self.draw) + self.nonce

    @classmethod
    def read(cls, reader: Reader) -> Reveal:
        """Takes the body off ``reader``."""
        return cls(reader.number(4), reader.number(1), reader.take(NONCE_BYTES))


@dataclass(frozen=True)
class Draw:
    """The secrets of all, in roster order, 32 bytes each."""

    KIND: ClassVar[int] = 5
    nonces: bytes

    def body(self) -> bytes:
        """The encoding without its header."""
        return self.nonces

    @classmethod
    def read(cls, reader: Reader) -> Draw:
        """Takes the body off ``reader``."""
        return cls(bytes(reader.rest()))


@dataclass(frozen=True)
class Shares:
    """A sealed box for each neighbour, and digests that opened secrets are checked against."""

    KIND: ClassVar[int] = 6
    member: int
    seed_digest: bytes
    root_digest: bytes
    boxes: Sequence[Entry]

    def body(self) -> bytes:
        """The encoding without its header."""
        head = struct.pack(">I", self.member) + self.seed_digest + self.root_digest
        return head + pack_entries(self.boxes)

    @classmethod
    def read(cls, reader: Reader) -> Shares:
        """Takes the body off ``reader``."""
        member, seed, root = reader.number(4), reader.take(DIGEST_BYTES), reader.take(DIGEST_BYTES)
        return cls(member, seed, root, reader.entries(BOX_BYTES))


@dataclass(frozen=True)
class Delivery:
    """The boxes that a member's neighbours sealed for it, by sender."""

    KIND: ClassVar[int] = 7
    boxes: Sequence[Entry]

    def body(self) -> bytes:
        """The encoding without its header."""
        return pack_entries(self.boxes)

    @classmethod
    def read(cls, reader: Reader) -> Delivery:
        """Takes the body off ``reader``."""
        return cls(reader.entries(BOX_BYTES))


@dataclass(frozen=True)
class Masked:
    """The masked vector, and for each neighbour in it what belongs to the mask between them.

    An entry of ``seals`` is a tag of 16 bytes that only the neighbour can check, and the member's
    half of the mask key, 32 bytes, wrapped with the neighbour's half.
    """

    KIND: ClassVar[int] = 8
    member: int
    seals: Sequence[Entry]
    words: bytes | memoryview

    def body(self) -> bytes:
        """The encoding without its header."""
        head = struct.pack(">I", self.member) + pack_entries(self.seals)
        return b"".join((head, self.words))

    @classmethod
    def read(cls, reader: Reader) -> Masked:
        """Takes the body off ``reader``; the words are not copied."""
        return cls(reader.number(4), reader.entries(TAG_BYTES + HALF_BYTES), reader.rest())


@dataclass(frozen=True)
class Survivors:
    """Who is in the sum, who dealt shares but is not, and the tags meant for this member."""

    KIND: ClassVar[int] = 9
    active: tuple[int, ...]
    dead: tuple[int, ...]
    tags: Sequence[Entry]

    def signed(self, graph_digest: bytes) -> bytes:
        """The bytes that all consent to: the same for everybody."""
        return graph_digest + pack_members(self.active) + pack_members(self.dead)

    def body(self) -> bytes:
        """The encoding without its header."""
        return pack_members(self.active) + pack_members(self.dead) + pack_entries(self.tags)

    @classmethod
    def read(cls, reader: Reader) -> Survivors:
        """Takes the body off ``reader``."""
        return cls(reader.members(), reader.members(), reader.entries(TAG_BYTES))


@dataclass(frozen=True)
class Consent:
    """The digest of the survivor set that a member was shown, under a tag for each neighbour."""

    KIND: ClassVar[int] = 10
    member: int
    digest: bytes
    tags: Sequence[Entry]

    def body(self) -> bytes:
        """The encoding without its header."""
        return struct.pack(">I", self.member) + self.digest + pack_entries(self.tags)

    @classmethod
    def read(cls, reader: Reader) -> Consent:
        """Takes the body off ``reader``."""
        return cls(reader.number(4), reader.take(DIGEST_BYTES), reader.entries(TAG_BYTES))


@dataclass(frozen=True)
class Consents:
    """The consents of a member's neighbours: digest and tag of each."""

    KIND: ClassVar[int] = 11
    consents: Sequence[Entry]

    def body(self) -> bytes:
        """The encoding without its header."""
        return pack_entries(self.consents)

    @classmethod
    def read(cls, reader: Reader) -> Consents:
        """Takes the body off ``reader``."""
        return cls(reader.entries(DIGEST_BYTES + TAG_BYTES))


@dataclass(frozen=True)
class Unmask:
    """Shares of the seeds of neighbours in the sum, and of the roots of those who are not."""

    KIND: ClassVar[int] = 12
    member: int
    seeds: Sequence[Entry]
    roots: Sequence[Entry]

    def body(self) -> bytes:
        """The encoding without its header."""
        shares = pack_entries(self.seeds) + pack_entries(self.roots)
        return struct.pack(">I", self.member) + shares

    @classmethod
    def read(cls, reader: Reader) -> Unmask:
        """Takes the body off ``reader``."""
        return cls(reader.number(4), reader.entries(SHARE_BYTES), reader.entries(SHARE_BYTES))


@dataclass(frozen=True)
class Refusal:
    """Why a member stops, signed; it carries public values only."""

    KIND: ClassVar[int] = 13
    member: int
    reason: Reason
    detail: str
    signature: bytes

    def signed(self, terms_digest: bytes) -> bytes:
        """The bytes under the signature."""
        return terms_digest + struct.pack(">IB", self.member, self.reason) + self.detail.encode()

    def body(self) -> bytes:
        """The encoding without its header."""
        head = struct.pack(">IB", self.member, self.reason)
        return head + self.signature + self.detail.encode()

    @classmethod
    def read(cls, reader: Reader) -> Refusal:
        """Takes the body off ``reader``."""
        member, code = reader.number(4), reader.number(1)
        signature, detail = reader.take(SIGNATURE_BYTES), bytes(reader.rest())
        if len(detail) > MAX_DETAIL or not detail.isascii() or code not in _REASONS:
            raise Refused(Reason.MALFORMED, "a refusal gives no known reason in plain text")
        return cls(member, Reason(code), detail.decode("ascii"), signature)


@dataclass(frozen=True)
class Again:
    """The terms of a round among those who were in an earlier one, by the digest of its graph."""

    KIND: ClassVar[int] = 14
    terms: bytes
    setup: bytes

    def body(self) -> bytes:
        """The encoding without its header."""
        return self.terms + self.setup

    @classmethod
    def read(cls, reader: Reader) -> Again:
        """Takes the body off ``reader``."""
        return cls(reader.take(TERMS_BYTES), reader.take(DIGEST_BYTES))


Message: TypeAlias = (
    Invitation
    | Again
    | Advert
    | Roster
    | Reveal
    | Draw
    | Shares
    | Delivery
    | Masked
    | Survivors
    | Consent
    | Consents
    | Unmask
    | Refusal
)

KINDS: dict[int, type[Message]] = {
    kind.KIND: kind
    for kind in (
        Invitation,
        Again,
        Advert,
        Roster,
        Reveal,
        Draw,
        Shares,
        Delivery,
        Masked,
        Survivors,
        Consent,
        Consents,
        Unmask,
        Refusal,
    )
}


def encode(message: Message, terms_digest: bytes) -> bytes:
    """The bytes of ``message`` in the round of ``terms_digest``."""
    return b"".join((MAGIC, bytes([message.KIND]), terms_digest, message.body()))


def decode(data: bytes, terms_digest: bytes) -> Message:
    """The message in ``data``.

    Raises:
        Refused: MALFORMED or DUPLICATE_MEMBER for bytes that no member would send; REPLAY for a
            message of another round. Invitation and Again are not compared: they say what the round
            is.
    """
    if data[: len(MAGIC)] != MAGIC or len(data) < HEADER_BYTES:
        raise Refused(Reason.MALFORMED, "no message of this protocol and version")
    kind = KINDS.get(data[len(MAGIC)])
    if kind is None:
        raise Refused(Reason.MALFORMED, "a message of no known kind")
    if data[len(MAGIC) + 1 : HEADER_BYTES] != terms_digest and kind not in (Invitation, Again):
        raise Refused(Reason.REPLAY, "a message of another run, round or model")
    reader = Reader(data, HEADER_BYTES)
    message = kind.read(reader)
    reader.finish()
    return message
