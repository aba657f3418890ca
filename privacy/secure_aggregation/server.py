"""The server: collects, goes on without the lost, and unmasks the sum of those who stayed.

Pure: messages in by ``receive``, messages out by ``advance``, which closes a stage with whoever
answered in time. It holds the running sum of masked vectors and never a single one. Whenever too
few are left for anybody's secrets to be rebuilt, the round ends and nothing is released; no other
way leads to a total than every seed and every lost key rebuilt and checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np

from umbel.core.errors import InputError
from umbel.privacy.secure_aggregation import graph
from umbel.privacy.secure_aggregation.agreement import RoundKeys
from umbel.privacy.secure_aggregation.boxes import BOX_BYTES, HALF_BYTES, TAG_BYTES
from umbel.privacy.secure_aggregation.edges import Edges
from umbel.privacy.secure_aggregation.identities import Directory
from umbel.privacy.secure_aggregation.keystream import Words
from umbel.privacy.secure_aggregation.messages import (
    DIGEST_BYTES,
    Advert,
    Again,
    Consent,
    Consents,
    Delivery,
    Draw,
    Invitation,
    Masked,
    Message,
    Refusal,
    Reveal,
    Roster,
    Shares,
    Survivors,
    Unmask,
    decode,
    encode,
)
from umbel.privacy.secure_aggregation.parameters import MAX_DRAWS, Design
from umbel.privacy.secure_aggregation.refusals import Reason, Refused
from umbel.privacy.secure_aggregation.shamir import SHARE_BYTES
from umbel.privacy.secure_aggregation.statements import SIGN_REFUSAL
from umbel.privacy.secure_aggregation.terms import Terms
from umbel.privacy.secure_aggregation.unmasking import Cannot, unmask
from umbel.privacy.secure_aggregation.wire import Entries
from umbel.privacy.secure_aggregation.words import unpack_words


class Stage(Enum):
    """What the server waits for."""

    ADVERTS = Advert
    REVEALS = Reveal
    SHARES = Shares
    MASKED = Masked
    CONSENTS = Consent
    UNMASK = Unmask
    OVER = None


@dataclass(frozen=True)
class Outbox:
    """Messages to send, by member."""

    messages: Mapping[int, bytes]


@dataclass(frozen=True)
class Total:
    """The sum modulo 2**ring_bits, shape (size,), of the vectors of ``survivors``, exact."""

    words: Words
    survivors: tuple[int, ...]


@dataclass(frozen=True)
class Aborted:
    """The round ended without a sum, and why."""

    why: str


class Setup(NamedTuple):
    """What a server may keep of a round, to ask the same members again without new keys.

    Args:
        roster: as it was sent. digest: of roster and graph. edges: the graph.
    """

    roster: Roster
    digest: bytes
    edges: Edges


class Server:
    """One round.

    Args:
        terms: the round.
        directory: the pinned public keys of all members.
        members: numbers of those invited.
        design: the graph and threshold for as many as answered; ``parameters.choose`` bound to
            the stated fractions.
        min_cohort: the fewest members of a sum.
        setup: of an earlier round of the same members; they are asked for shares at once.
    """

    def __init__(
        self,
        terms: Terms,
        directory: Directory,
        members: Iterable[int],
        design: Callable[[int], Design],
        min_cohort: int = 3,
        setup: Setup | None = None,
    ) -> None:
        self._terms = terms
        self._digest = terms.digest
        self._directory = directory
        self._invited = tuple(sorted(members))
        self._design = design
        self._min_cohort = min_cohort
        self._stage = Stage.ADVERTS
        self._expected: type[Message] | None = Advert
        self._waiting = set(self._invited)
        self.lost: dict[int, str] = {}  # member -> stage it was last waited for in, or its reason
        self.turned_away: list[tuple[int, str]] = []  # messages that were not used, and why
        self._adverts: dict[int, Advert] = {}
        self._roster = Roster(0, 0, 0, b"")
        self._draw = 0
        self._nonces: dict[int, bytes] = {}
        self._edges = Edges((), ())
        self._graph_digest = b""
        self.setup = setup
        self._sum = np.zeros(terms.size, dtype="<u4")
        self._neighbours: Mapping[int, tuple[int, ...]] = {}
        self._digests: dict[int, tuple[bytes, bytes]] = {}
        self._boxes: dict[int, Entries] = {}
        # Edges with a mask: both ends dealt. Of them, those that lead to somebody in the sum.
        self._held = self._live = self._edges.between(self._edges.nobody())
        self._partners: Mapping[int, tuple[int, ...]] = {}
        self._survivors: tuple[int, ...] = ()
        self._dead: tuple[int, ...] = ()
        self._alive: Mapping[int, tuple[int, ...]] = {}
        self._lost_partners: Mapping[int, tuple[int, ...]] = {}
        self._seals: dict[int, Entries] = {}
        self._consents: dict[int, Consent] = {}
        self._seeds: dict[int, Entries] = {}
        self._roots: dict[int, Entries] = {}

    @property
    def stage(self) -> Stage:
        """The stage that is open."""
        return self._stage

    @property
    def waiting(self) -> frozenset[int]:
        """The members whose answer is missing in this stage."""
        return frozenset(self._waiting)

    @property
    def dealt(self) -> int:
        """How many members' shares came."""
        return len(self._digests)

    def invite(self) -> Outbox:
        """The first messages."""
        if self.setup is not None:
            self._roster = self.setup.roster
            self._lay_edges(self.setup.edges)
            self._graph_digest = graph.kept_digest(self._digest, self.setup.digest)
            self._open(Stage.SHARES, self._invited)
            again = Again(self._terms.encode(), self.setup.digest)
            return self._send(dict.fromkeys(self._invited, again))
        return self._send({m: Invitation(self._terms.encode()) for m in self._invited})

    def receive(self, member: int, data: bytes) -> None:
        """Takes a message that the transport says is ``member``'s; a bad or late one is set aside.

        A refusal takes its sender out of the round.
        """
        try:
            message = decode(data, self._digest)
            if isinstance(message, Refusal):
                self._take_refusal(member, message)
            elif type(message) is not self._expected:
                self.turned_away.append((member, f"late or early {type(message).__name__}"))
            elif member not in self._waiting or getattr(message, "member", None) != member:
                self.turned_away.append((member, f"{type(message).__name__} not waited for"))
            else:
                self._take(message)
                self._waiting.discard(member)
        except Refused as refused:
            self.turned_away.append((member, refused.detail))

    def _take_refusal(self, member: int, refusal: Refusal) -> None:
        signed = refusal.signed(self._digest)
        if refusal.member != member or not self._directory.verify(
            member, SIGN_REFUSAL, signed, refusal.signature
        ):
            self.turned_away.append((member, "a refusal that it did not sign"))
        elif member in self._waiting:
            self._waiting.discard(member)
            self.lost[member] = f"refused: {refusal.reason.name.lower()}: {refusal.detail}"

    def _take(self, message: Message) -> None:
        match message:
            case Advert(member=member):
                self._adverts[member] = message
            case Reveal(member=member):
                commitment = self._adverts[member].commitment
                if message.draw != self._draw or not graph.opens(
                    commitment, self._draw, message.nonce
                ):
                    raise _unused("a secret that it did not promise")
                self._nonces[member] = message.nonce
            case Shares(member=member):
                boxes = Entries.of(message.boxes, BOX_BYTES)
                if boxes.members != self._neighbours[member]:
                    raise _unused("shares for others than its neighbours")
                self._digests[member] = message.seed_digest, message.root_digest
                self._boxes[member] = boxes
            case Masked(member=member):
                seals = Entries.of(message.seals, TAG_BYTES + HALF_BYTES)
                if seals.members != self._partners[member]:
                    raise _unused("a vector with other masks than those dealt")
                words = unpack_words(message.words, self._terms)
                np.add(self._sum, words, out=self._sum)
                self._seals[member] = seals
            case Consent(member=member):
                if Entries.of(message.tags, TAG_BYTES).members != self._alive[member]:
                    raise _unused("a consent for others than its live neighbours")
                self._consents[member] = message
            case Unmask(member=member):
                seeds = Entries.of(message.seeds, SHARE_BYTES)
                roots = Entries.of(message.roots, SHARE_BYTES)
                if (seeds.members, roots.members) != (
                    self._alive[member],
                    self._lost_partners[member],
                ):
                    raise _unused("other shares than those asked for")
                self._seeds[member], self._roots[member] = seeds, roots

    def advance(self) -> Outbox | Total | Aborted:
        """Closes the stage: who has not answered is lost; the next messages, or the end."""
        for member in self._waiting:
            self.lost.setdefault(member, f"silent: {self._stage.name.lower()}")
        steps: dict[Stage, Callable[[], Outbox | Total | Aborted]] = {
            Stage.ADVERTS: self._close_adverts,
            Stage.REVEALS: self._close_reveals,
            Stage.SHARES: self._close_shares,
            Stage.MASKED: self._close_masked,
            Stage.CONSENTS: self._close_consents,
            Stage.UNMASK: self._close_unmask,
        }
        if self._stage not in steps:
            return Aborted("the round is over")
        try:
            return steps[self._stage]()
        except Cannot as cannot:
            self._end()
            return Aborted(str(cannot))

    def _end(self) -> None:
        self._stage, self._expected = Stage.OVER, None
        self._waiting = set()
        self._sum = np.zeros(0, dtype="<u4")
        for kept in (self._boxes, self._seals, self._seeds, self._roots):
            kept.clear()

    def _send(self, messages: Mapping[int, Message]) -> Outbox:
        # What goes to all is encoded, and held, once.
        encoded = {id(message): b"" for message in messages.values()}
        for message in messages.values():
            encoded[id(message)] = encoded[id(message)] or encode(message, self._digest)
        return Outbox({m: encoded[id(message)] for m, message in messages.items()})

    def _open(self, stage: Stage, members: Iterable[int]) -> None:
        self._stage, self._expected = stage, stage.value
        self._waiting = set(members)

    def _close_adverts(self) -> Outbox:
        return self._call(sorted(self._adverts))

    def _call(self, members: list[int]) -> Outbox:
        """Sends the roster of ``members``."""
        if len(members) < self._min_cohort:
            raise Cannot(f"{len(members)} members, need {self._min_cohort}")
        if self._terms.overflows(len(members)):
            raise Cannot(f"the values of {len(members)} members do not fit the ring")
        try:
            k, t, _ = self._design(len(members))
        except InputError as error:  # too few answered for any graph
            raise Cannot(error.message) from None
        body = b"".join(self._adverts[m].body() for m in members)
        self._roster = Roster(self._draw, k, t, body)
        self._adverts = {m: self._adverts[m] for m in members}
        if k == len(members) - 1:
            self._lay_out(bytes(32), np.arange(len(members)))
        else:
            self._open(Stage.REVEALS, members)
        return self._send(dict.fromkeys(members, self._roster))

    def _close_reveals(self) -> Outbox:
        members = list(self._adverts)
        if missing := [m for m in members if m not in self._nonces]:
            # The last to open knows the graph; without all, another is drawn from new secrets.
            self._draw += 1
            if self._draw == MAX_DRAWS:
                raise Cannot(f"{MAX_DRAWS} draws of the graph, and {len(missing)} silent again")
            stayed = sorted(self._nonces)
            self._nonces = {}
            return self._call(stayed)
        nonces = b"".join(self._nonces[m] for m in members)
        seed = graph.seed_of(self._roster_digest(), nonces)
        self._lay_out(seed, graph.ring(seed, len(members)))
        return self._send(dict.fromkeys(members, Draw(nonces)))

    def _roster_digest(self) -> bytes:
        r = self._roster
        return graph.roster_digest_of(self._digest, r.draw, r.neighbours, r.threshold, r.adverts)

    def _lay_out(self, seed: bytes, order: graph.Order) -> None:
        members = tuple(self._adverts)
        self._graph_digest = graph.digest_of(self._roster_digest(), seed)
        self._lay_edges(Edges(members, graph.neighbours_on(order, self._roster.neighbours)))
        self.setup = Setup(self._roster, self._graph_digest, self._edges)
        self._open(Stage.SHARES, members)

    def _lay_edges(self, edges: Edges) -> None:
        self._edges = edges
        self._neighbours = edges.neighbours(np.ones_like(edges.rows, dtype=np.bool_))

    def _close_shares(self) -> Outbox:
        edges, dealt = self._edges, self._edges.flags(self._boxes)
        # Who has too few partners could not be unmasked; leaving it out may leave others with few.
        while True:
            self._held = edges.between(dealt)
            lonely = edges.listed(dealt & (self._held.sum(axis=1) < self._roster.threshold))
            if not lonely:
                break
            for member in lonely:
                self.lost[member] = "too few neighbours dealt shares"
                del self._boxes[member]
            dealt = edges.flags(self._boxes)
        self._at_least(len(self._boxes))
        self._partners = edges.neighbours(self._held)
        every = np.ones_like(self._held)
        inbound = edges.inbound(edges.outbound(self._boxes, every, BOX_BYTES), self._held)
        there = edges.listed(dealt)
        self._boxes.clear()
        self._open(Stage.MASKED, there)
        return self._send({m: Delivery(inbound[m]) for m in there})

    def _close_masked(self) -> Outbox:
        edges, masked = self._edges, self._edges.flags(self._seals)
        self._survivors = edges.listed(masked)
        self._at_least(len(self._survivors))
        dealt = self._held.any(axis=1)
        self._dead = edges.listed(dealt & ~masked)
        self._reachable(self._survivors)
        self._live = self._held & masked[edges.rows]
        self._alive = edges.neighbours(self._live)
        self._lost_partners = edges.neighbours(self._held & ~self._live)
        seals = edges.outbound(self._seals, self._held, TAG_BYTES + HALF_BYTES)
        tags = edges.inbound(seals[..., :TAG_BYTES], self._live)
        messages = {m: Survivors(self._survivors, self._dead, tags[m]) for m in self._survivors}
        self._open(Stage.CONSENTS, self._survivors)
        return self._send(messages)

    def _close_consents(self) -> Outbox:
        self._reachable(self._consents)
        edges, said = self._edges, self._consents
        tags = {m: Entries.of(consent.tags, TAG_BYTES) for m, consent in said.items()}
        shown = np.zeros((*edges.rows.shape, DIGEST_BYTES + TAG_BYTES), dtype=np.uint8)
        shown[..., DIGEST_BYTES:] = edges.outbound(tags, self._live, TAG_BYTES)
        for member, consent in said.items():
            digest = np.frombuffer(consent.digest, dtype=np.uint8)
            shown[edges.row[member], :, :DIGEST_BYTES] = digest
        inbound = edges.inbound(shown, self._live & edges.flags(said)[edges.rows])
        messages: dict[int, Message] = {}
        for member in said:
            if len(inbound[member]) >= self._roster.threshold:
                messages[member] = Consents(inbound[member])
            else:
                self.lost[member] = "too few neighbours consented"
        self._reachable(messages)
        self._open(Stage.UNMASK, messages)
        return self._send(messages)

    def _close_unmask(self) -> Total:
        self._reachable(self._seeds)
        edges = self._edges
        opened = edges.outbound(self._seeds, self._live, SHARE_BYTES)
        opened |= edges.outbound(self._roots, self._held & ~self._live, SHARE_BYTES)
        unmask(
            self._sum,
            edges,
            opened=opened,
            given=self._held & edges.flags(self._seeds)[edges.rows],
            live=self._live,
            survivors=self._survivors,
            dead=self._dead,
            threshold=self._roster.threshold,
            digests=self._digests,
            seals=edges.outbound(self._seals, self._held, TAG_BYTES + HALF_BYTES),
            graph_digest=self._graph_digest,
            keys=RoundKeys(self._terms.run, self._terms.round_number, self._digest),
        )
        words = self._sum
        words &= np.uint32((1 << self._terms.ring_bits) - 1)
        self._end()
        return Total(words, self._survivors)

    def _at_least(self, count: int) -> None:
        if count < self._min_cohort:
            raise Cannot(f"{count} members left, need {self._min_cohort}")

    def _reachable(self, present: Iterable[int]) -> None:
        """Ends the round if somebody's secret can no longer be rebuilt by those ``present``."""
        edges = self._edges
        left = (self._held & edges.flags(present)[edges.rows]).sum(axis=1)
        masked = edges.flags(self._seals)
        # Whom nobody in the sum has a mask with: nothing of it needs to be rebuilt.
        needed = masked | (self._held & masked[edges.rows]).any(axis=1)
        short = np.flatnonzero(needed & (left < self._roster.threshold))
        if short.size:
            row = int(short[0])
            raise Cannot(
                f"{left[row]} neighbours of member {edges.members[row]} left, "
                f"need {self._roster.threshold}"
            )


def _unused(why: str) -> Refused:
    return Refused(Reason.MALFORMED, why)
