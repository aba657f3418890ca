"""The client: one message in, one message out, and nothing that two rounds share.

Whatever comes in, ``step`` returns the next message or a signed refusal, after which the client is
dead for the round. It hands out, per neighbour, either the share of the neighbour's self-mask seed
or the share of its root, once, and only after enough neighbours consented to the same survivor set:
with both, or with different sets for different members, a server could take a mask off a vector
that is not summed with others.

What Python allows is wiped: the seed is overwritten, the key objects are let go (OpenSSL clears
them), the shares dropped. Immutable bytes and ints that the interpreter copied stay in freed memory
until that is used again.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from umbel.core.errors import InputError
from umbel.privacy.secure_aggregation import boxes, graph, shamir
from umbel.privacy.secure_aggregation.agreement import KeyPair, RoundKeys
from umbel.privacy.secure_aggregation.identities import Directory, Identity
from umbel.privacy.secure_aggregation.keystream import Words, add_streams
from umbel.privacy.secure_aggregation.messages import (
    DIGEST_BYTES,
    MAX_DETAIL,
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
)
from umbel.privacy.secure_aggregation.refusals import Reason, Refused
from umbel.privacy.secure_aggregation.rosters import accept_roster
from umbel.privacy.secure_aggregation.statements import (
    SIGN_REFUSAL,
    root_digest,
    seed_digest,
    survivors_digest,
)
from umbel.privacy.secure_aggregation.survivors import accept_survivors
from umbel.privacy.secure_aggregation.terms import Policy, Terms
from umbel.privacy.secure_aggregation.words import pack_words


@dataclass
class Edge:
    """What a client keeps about a neighbour; the later fields fill as the round goes on."""

    mine: bytes
    box_in: bytes
    tags: bytes
    theirs: boxes.Contents = field(default=boxes.Contents(b"", b"", b""))


@dataclass
class State:
    """What a client knows in a round; everything secret of it is here."""

    over: Reason | None = None
    expects: tuple[type[Message], ...] = (Invitation, Again)
    pair: KeyPair | None = None
    chain: graph.Chain | None = None
    seed: bytearray = field(default_factory=bytearray)
    edges: dict[int, Edge] = field(default_factory=dict)
    advert: Advert | None = None
    roster: Roster | None = None
    members: tuple[int, ...] = ()
    neighbours: tuple[int, ...] = ()
    graph_digest: bytes = b""
    survivors: Survivors | None = None
    consent_digest: bytes = b""


class Setup(NamedTuple):
    """What a client may keep of a round for later ones: who is who, and the secrets of its pairs.

    Args:
        roster: as it was agreed on.
        members: of the roster. neighbours: those of the client, ascending.
        digest: of roster and graph.
        secrets: neighbour -> what only the two know, 64 bytes.
    """

    roster: Roster
    members: tuple[int, ...]
    neighbours: tuple[int, ...]
    digest: bytes
    secrets: Mapping[int, bytes]


class Client:
    """One member in one round.

    Args:
        member: its number in ``directory``.
        identity: its signing key, the one pinned there.
        directory: everybody's pinned public keys.
        terms: the round that its own manifest announces.
        policy: what it demands of any round.
        payload: gives the vector, shape (terms.size,), uint32, each element below
            2**terms.value_bits; called once, after all checks on keys, roster and shares.
        keep: whether ``setup`` is there after the round.
        setup: of an earlier round, for a server that asks for the same members again.
    Raises:
        InputError: the arguments do not belong together.
    """

    def __init__(
        self,
        member: int,
        identity: Identity,
        directory: Directory,
        terms: Terms,
        policy: Policy,
        payload: Callable[[], Words],
        keep: bool = False,
        setup: Setup | None = None,
    ) -> None:
        if not 0 <= member < len(directory) or directory[member] != identity.public_key:
            raise InputError(
                f"member {member} is not pinned with this identity",
                where="secure aggregation directory",
                fix="provision the site again, or give it its own key",
            )
        if terms.directory != directory.digest:
            raise InputError(
                "the terms name another directory than the pinned one",
                where="secure aggregation terms",
                fix="compare the provisioned list of members on server and site",
            )
        self.member = member
        self._identity = identity
        self._directory = directory
        self._terms = terms
        self._digest = terms.digest
        self._policy = policy
        self._payload = payload
        self._keys = RoundKeys(terms.run, terms.round_number, self._digest)
        self._keep = keep
        self.setup = setup
        self.state = State()

    def _forget(self) -> None:
        """Lets go of every secret of the round."""
        self.state.seed[:] = bytes(len(self.state.seed))
        self.state = State(self.state.over)

    @property
    def finished(self) -> bool:
        """Whether the client has answered for the last time in this round."""
        return self.state.over is not None

    def step(self, data: bytes) -> Message:
        """The answer to one message of the server: the next message, or a refusal."""
        try:
            if self.state.over is not None:
                raise Refused(self.state.over, "this client has answered for the last time")
            message = decode(data, self._digest)
            if type(message) not in self.state.expects:
                expected = " or ".join(kind.__name__ for kind in self.state.expects)
                raise Refused(
                    Reason.OUT_OF_TURN, f"expected {expected}, got {type(message).__name__}"
                )
            return self._answer(message)
        except Refused as refused:
            return self._refuse(refused)
        except BaseException:
            # The payload failed: its error stays at home, and the round ends for this client.
            self.state.over = Reason.DEAD
            self._forget()
            raise

    def _answer(self, message: Message) -> Message:
        match message:
            case Invitation():
                return self._on_invitation(message)
            case Again():
                return self._on_again(message)
            case Roster():
                return self._on_roster(message)
            case Draw():
                return self._on_draw(message)
            case Delivery():
                return self._on_delivery(message)
            case Survivors():
                return self._on_survivors(message)
            case Consents():
                return self._on_consents(message)
            case _:
                raise Refused(Reason.OUT_OF_TURN, "a message that servers do not send")

    def _refuse(self, refused: Refused) -> Refusal:
        if self.state.over is None:
            self.state.over = Reason.DEAD
        self._forget()
        detail = refused.detail.encode("ascii", "replace").decode("ascii")[:MAX_DETAIL]
        unsigned = Refusal(self.member, refused.reason, detail, b"")
        signature = self._identity.sign(SIGN_REFUSAL, unsigned.signed(self._digest))
        return Refusal(self.member, refused.reason, detail, signature)

    def _on_invitation(self, message: Invitation) -> Advert:
        self._accept_terms(message.terms)
        self.state.pair, self.state.chain = KeyPair(), graph.Chain()
        self.state.advert = Advert(
            self.member, self.state.pair.public_key, self.state.chain.commitment
        )
        self.state.expects = (Roster,)
        return self.state.advert

    def _on_again(self, message: Again) -> Shares:
        self._accept_terms(message.terms)
        kept = self.setup
        if kept is None or kept.digest != message.setup:
            raise Refused(Reason.NO_SETUP, "nothing is kept of that round")
        n = len(kept.members)
        if self._terms.overflows(n) or n > self._policy.max_cohort:
            raise Refused(Reason.RING_OVERFLOW, f"the values of {n} members do not fit the ring")
        self.state.roster, self.state.members, self.state.neighbours = (
            kept.roster,
            kept.members,
            kept.neighbours,
        )
        return self._deal(graph.kept_digest(self._digest, kept.digest), kept.secrets)

    def _accept_terms(self, terms: bytes) -> None:
        mine = self._terms
        try:
            theirs = Terms.decode(terms)
        except InputError as error:
            raise Refused(Reason.OTHER_TERMS, error.message) from None
        if (theirs.run, theirs.round_number) != (mine.run, mine.round_number):
            raise Refused(Reason.REPLAY, f"round {theirs.round_number} of another run or time")
        if theirs.context != mine.context:
            raise Refused(Reason.OTHER_MODEL, "the base model is not that of the manifest")
        if theirs != mine:
            raise Refused(Reason.OTHER_TERMS, "size, ring, value bits or directory differ")

    def _on_roster(self, message: Roster) -> Reveal | Shares:
        assert self.state.advert is not None
        assert self.state.chain is not None
        self.state.members = accept_roster(
            message,
            previous=self.state.roster,
            own=self.state.advert,
            known=len(self._directory),
            terms=self._terms,
            policy=self._policy,
        )
        self.state.roster = message
        if message.neighbours == len(self.state.members) - 1:
            return self._meet(bytes(32), np.arange(len(self.state.members)))
        self.state.expects = (Draw, Roster)
        return Reveal(self.member, message.draw, self.state.chain.open(message.draw))

    def _on_draw(self, message: Draw) -> Shares:
        assert self.state.roster is not None
        n, size = len(self.state.members), graph.NONCE_BYTES
        if len(message.nonces) != n * size:
            raise Refused(Reason.WRONG_REVEAL, f"{len(message.nonces)} bytes for {n} secrets")
        odd = graph.all_open(
            self.state.roster.commitments(), self.state.roster.draw, message.nonces
        )
        if odd >= 0:
            raise Refused(
                Reason.WRONG_REVEAL,
                f"the secret of member {self.state.members[odd]} is not the promised one",
            )
        seed = graph.seed_of(self._roster_digest(), message.nonces)
        return self._meet(seed, graph.ring(seed, n))

    def _roster_digest(self) -> bytes:
        roster = self.state.roster
        assert roster is not None
        return graph.roster_digest_of(
            self._digest, roster.draw, roster.neighbours, roster.threshold, roster.adverts
        )

    def _meet(self, seed: bytes, order: graph.Order) -> Shares:
        """Agrees on a secret with each neighbour, and deals."""
        assert self.state.roster is not None
        assert self.state.pair is not None
        me, roster = self.member, self.state.roster
        positions = graph.neighbours_of(order, roster.neighbours, self.state.members.index(me))
        self.state.neighbours = tuple(self.state.members[position] for position in positions)
        secrets: dict[int, bytes] = {}
        for position in positions:
            advert = roster.entry(position)
            them = advert.member
            try:
                lasting = self._identity.agree(self._directory, them)
            except ValueError:
                raise Refused(Reason.REPLACED_KEY, f"member {them} has no usable key") from None
            secrets[them] = self.state.pair.agree(advert.key, them) + lasting
        self.state.pair = self.state.chain = None
        digest = graph.digest_of(self._roster_digest(), seed)
        if self._keep:
            self.setup = Setup(roster, self.state.members, self.state.neighbours, digest, secrets)
        return self._deal(digest, secrets)

    def _deal(self, graph_digest: bytes, secrets: Mapping[int, bytes]) -> Shares:
        """Seals a share of both of the client's secrets of this round for each neighbour."""
        assert self.state.roster is not None
        me, keys, bound = self.member, self._keys, graph_digest
        self.state.graph_digest = graph_digest
        self.state.seed = bytearray(os.urandom(shamir.SECRET_BYTES))
        root = os.urandom(shamir.SECRET_BYTES)
        k, t = self.state.roster.neighbours, self.state.roster.threshold
        dealt = zip(
            shamir.split(bytes(self.state.seed), t, k), shamir.split(root, t, k), strict=True
        )
        sealed = []
        for them, (seed_share, root_share) in zip(self.state.neighbours, dealt, strict=True):
            pair = keys.pair(secrets[them], me, them)
            half = keys.half(root, me, them)
            self.state.edges[them] = Edge(half, pair.box(them, me), pair.tags)
            contents = boxes.Contents(seed_share, root_share, half)
            sealed.append((them, boxes.seal(pair.box(me, them), bound, me, them, contents)))
        self.state.expects = (Delivery,)
        digests = seed_digest(bound, me, bytes(self.state.seed)), root_digest(bound, me, root)
        return Shares(me, *digests, tuple(sealed))

    def _on_delivery(self, message: Delivery) -> Masked:
        assert self.state.roster is not None
        for them, _ in message.boxes:
            if them not in self.state.edges:
                raise Refused(Reason.NOT_A_NEIGHBOUR, f"shares from {them}, who is no neighbour")
        if len(message.boxes) < self.state.roster.threshold:
            raise Refused(
                Reason.TOO_FEW_SHARES,
                f"shares from {len(message.boxes)} neighbours, need {self.state.roster.threshold}",
            )
        for them, box in message.boxes:
            edge = self.state.edges[them]
            edge.theirs = boxes.open_box(
                edge.box_in, self.state.graph_digest, them, self.member, box
            )
            edge.box_in = b""
        heard = {them for them, _ in message.boxes}
        self.state.edges = {them: edge for them, edge in self.state.edges.items() if them in heard}
        me, bound, wrap = self.member, self.state.graph_digest, self._keys.wrap
        seals = tuple(
            (
                them,
                boxes.confirm(edge.tags, bound, me, them)
                + wrap(edge.mine, edge.theirs.half, me, them),
            )
            for them, edge in self.state.edges.items()
        )
        masked = self._mask(self._payload())
        self.state.expects = (Survivors,)
        return Masked(me, seals, masked)

    def _mask(self, values: Words) -> memoryview:
        """The payload under its masks, in wire form; the masks' keys are dropped."""
        terms, me = self._terms, self.member
        if values.shape != (terms.size,) or values.dtype != np.uint32:
            raise Refused(Reason.BAD_INPUT, f"the payload is no vector of {terms.size} elements")
        if int(values.max()) >> terms.value_bits:
            raise Refused(Reason.RING_OVERFLOW, f"an element has over {terms.value_bits} bits")
        words = np.array(values, dtype="<u4")
        keys, own = self._keys, self._keys.self_mask(bytes(self.state.seed), me)
        masks = {
            them: keys.mask((edge.mine, edge.theirs.half), me, them)
            for them, edge in self.state.edges.items()
        }
        above = [mask for them, mask in masks.items() if them > me]
        below = [mask for them, mask in masks.items() if them < me]
        add_streams(words, [own, *above], below)
        for edge in self.state.edges.values():
            edge.mine = b""
            edge.theirs = edge.theirs._replace(half=b"")
        self.state.seed[:] = bytes(len(self.state.seed))
        return pack_words(words, terms)

    def _on_survivors(self, message: Survivors) -> Consent:
        assert self.state.roster is not None
        accept_survivors(
            message,
            me=self.member,
            members=self.state.members,
            neighbours=self.state.neighbours,
            confirmations={them: edge.tags for them, edge in self.state.edges.items()},
            threshold=self.state.roster.threshold,
            min_cohort=self._policy.min_cohort,
            graph_digest=self.state.graph_digest,
        )
        self.state.survivors = message
        self.state.consent_digest = survivors_digest(message, self.state.graph_digest)
        self.state.expects = (Consents,)
        active = set(message.active)
        tags = tuple(
            (them, boxes.consent(edge.tags, self.state.consent_digest, self.member, them))
            for them, edge in self.state.edges.items()
            if them in active
        )
        return Consent(self.member, self.state.consent_digest, tags)

    def _on_consents(self, message: Consents) -> Unmask:
        assert self.state.roster is not None
        assert self.state.survivors is not None
        active = set(self.state.survivors.active)
        # A tag that does not verify counts as missing.
        good, threshold = 0, self.state.roster.threshold
        for them, entry in message.consents:
            if them not in self.state.edges or them not in active:
                raise Refused(Reason.NOT_A_NEIGHBOUR, f"a consent of {them}, no live neighbour")
            digest, tag = entry[:DIGEST_BYTES], entry[DIGEST_BYTES:]
            expected = boxes.consent(self.state.edges[them].tags, digest, them, self.member)
            if not hmac.compare_digest(tag, expected):
                continue
            if digest != self.state.consent_digest:
                raise Refused(Reason.SPLIT_VIEWS, f"member {them} was shown another survivor set")
            good += 1
        if good < threshold:
            raise Refused(
                Reason.TOO_FEW_CONSENTS,
                f"{good} neighbours consented to this set, need {threshold}",
            )
        edges = self.state.edges.items()
        seeds = tuple((them, edge.theirs.seed) for them, edge in edges if them in active)
        roots = tuple((them, edge.theirs.root) for them, edge in edges if them not in active)
        self.state.over = Reason.ALREADY_UNMASKED
        self._forget()
        return Unmask(self.member, seeds, roots)
