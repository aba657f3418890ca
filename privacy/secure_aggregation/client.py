"""The client: one message in, one message out, and nothing that two rounds share.

Whatever comes in, ``step`` returns the next message or a signed refusal, after which the client is
dead for the round. It hands out, per neighbour, either the share of the neighbour's self-mask seed
or the share of its mask key, once, and only after enough neighbours signed the same survivor set:
with both, or with different sets for different members, a server could take a mask off a vector
that is not summed with others.

What Python allows is wiped: the seed is overwritten, the key objects are let go (OpenSSL clears
them), the shares dropped. Immutable bytes and ints that the interpreter copied stay in freed memory
until that is used again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from umbel.core.errors import InputError
from umbel.privacy.secure_aggregation import boxes, graph, shamir
from umbel.privacy.secure_aggregation.agreement import KeyPair, Purpose, RoundKeys
from umbel.privacy.secure_aggregation.identities import Directory, Identity
from umbel.privacy.secure_aggregation.keystream import Words, add_streams
from umbel.privacy.secure_aggregation.messages import (
    DIGEST_BYTES,
    MAX_DETAIL,
    Advert,
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
    SIGN_ADVERT,
    SIGN_REFUSAL,
    SIGN_SURVIVORS,
    seed_digest,
    survivors_digest,
)
from umbel.privacy.secure_aggregation.survivors import accept_survivors
from umbel.privacy.secure_aggregation.terms import Policy, Terms
from umbel.privacy.secure_aggregation.words import pack_words


@dataclass
class _Edge:
    """What a client keeps about a neighbour; the later fields fill as the round goes on."""

    mask: bytes
    box_in: bytes
    confirmation: bytes
    shares: tuple[bytes, bytes] = field(default=(b"", b""))


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
        self._expects: tuple[type[Message], ...] = (Invitation,)
        self._over: Reason | None = None
        self._forget()

    def _forget(self) -> None:
        """Lets go of every secret of the round."""
        seed: bytearray | None = getattr(self, "_seed", None)
        if seed is not None:
            seed[:] = bytes(len(seed))
        self._seed = bytearray()
        self._mask_pair: KeyPair | None = None
        self._box_pair: KeyPair | None = None
        self._chain: graph.Chain | None = None
        self._edges: dict[int, _Edge] = {}
        self._advert: Advert | None = None
        self._roster: Roster | None = None
        self._members: tuple[int, ...] = ()
        self._neighbours: tuple[int, ...] = ()
        self._graph_digest = b""
        self._survivors: Survivors | None = None
        self._consent_digest = b""

    @property
    def finished(self) -> bool:
        """Whether the client has answered for the last time in this round."""
        return self._over is not None

    def step(self, data: bytes) -> Message:
        """The answer to one message of the server: the next message, or a refusal."""
        try:
            if self._over is not None:
                raise Refused(self._over, "this client has answered for the last time")
            message = decode(data, self._digest)
            if type(message) not in self._expects:
                expected = " or ".join(kind.__name__ for kind in self._expects)
                raise Refused(
                    Reason.OUT_OF_TURN, f"expected {expected}, got {type(message).__name__}"
                )
            return self._answer(message)
        except Refused as refused:
            return self._refuse(refused)
        except BaseException:
            # The payload failed: its error stays at home, and the round ends for this client.
            self._over = Reason.DEAD
            self._forget()
            raise

    def _answer(self, message: Message) -> Message:
        match message:
            case Invitation():
                return self._on_invitation(message)
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
        if self._over is None:
            self._over = Reason.DEAD
        self._forget()
        detail = refused.detail.encode("ascii", "replace").decode("ascii")[:MAX_DETAIL]
        unsigned = Refusal(self.member, refused.reason, detail, b"")
        signature = self._identity.sign(SIGN_REFUSAL, unsigned.signed(self._digest))
        return Refusal(self.member, refused.reason, detail, signature)

    def _on_invitation(self, message: Invitation) -> Advert:
        mine = self._terms
        try:
            theirs = Terms.decode(message.terms)
        except InputError as error:
            raise Refused(Reason.OTHER_TERMS, error.message) from None
        if (theirs.run, theirs.round_number) != (mine.run, mine.round_number):
            raise Refused(Reason.REPLAY, f"round {theirs.round_number} of another run or time")
        if theirs.context != mine.context:
            raise Refused(Reason.OTHER_MODEL, "the base model is not that of the manifest")
        if theirs != mine:
            raise Refused(Reason.OTHER_TERMS, "size, ring, value bits or directory differ")
        self._mask_pair, self._box_pair, self._chain = KeyPair(), KeyPair(), graph.Chain()
        keys = (self._mask_pair.public_key, self._box_pair.public_key, self._chain.commitment)
        unsigned = Advert(self.member, *keys, b"")
        signature = self._identity.sign(SIGN_ADVERT, unsigned.signed(self._digest))
        self._advert = Advert(self.member, *keys, signature)
        self._expects = (Roster,)
        return self._advert

    def _on_roster(self, message: Roster) -> Reveal | Shares:
        assert self._advert is not None
        assert self._chain is not None
        self._members = accept_roster(
            message,
            previous=self._roster,
            own=self._advert,
            known=len(self._directory),
            terms=self._terms,
            policy=self._policy,
        )
        self._roster = message
        if message.neighbours == len(self._members) - 1:
            return self._deal(bytes(32), np.arange(len(self._members)))
        self._expects = (Draw, Roster)
        return Reveal(self.member, message.draw, self._chain.open(message.draw))

    def _on_draw(self, message: Draw) -> Shares:
        assert self._roster is not None
        n, size = len(self._members), graph.NONCE_BYTES
        if len(message.nonces) != n * size:
            raise Refused(Reason.WRONG_REVEAL, f"{len(message.nonces)} bytes for {n} secrets")
        for position, commitment in enumerate(self._roster.commitments()):
            nonce = message.nonces[size * position : size * (position + 1)]
            if not graph.opens(commitment, self._roster.draw, nonce):
                raise Refused(
                    Reason.WRONG_REVEAL,
                    f"the secret of member {self._members[position]} is not the promised one",
                )
        seed = graph.seed_of(self._roster_digest(), message.nonces)
        return self._deal(seed, graph.ring(seed, n))

    def _roster_digest(self) -> bytes:
        roster = self._roster
        assert roster is not None
        return graph.roster_digest_of(
            self._digest, roster.draw, roster.neighbours, roster.threshold, roster.adverts
        )

    def _deal(self, seed: bytes, order: graph.Order) -> Shares:
        """Agrees on keys with the neighbours and seals a share of both secrets for each."""
        assert self._roster is not None
        assert self._mask_pair is not None
        assert self._box_pair is not None
        me, roster = self.member, self._roster
        bound = self._graph_digest = graph.digest_of(self._roster_digest(), seed)
        positions = graph.neighbours_of(order, roster.neighbours, self._members.index(me))
        self._neighbours = tuple(self._members[position] for position in positions)
        self._seed = bytearray(os.urandom(shamir.SECRET_BYTES))
        k, t = roster.neighbours, roster.threshold
        seeds = shamir.split(bytes(self._seed), t, k)
        mask_keys = shamir.split(self._mask_pair.private_bytes(), t, k)
        sealed = []
        for i, position in enumerate(positions):
            advert = roster.entry(position)
            them = advert.member
            signed = advert.signed(self._digest)
            if not self._directory.verify(them, SIGN_ADVERT, signed, advert.signature):
                raise Refused(
                    Reason.REPLACED_KEY, f"the keys of member {them} are not signed by it"
                )
            mask_secret = self._mask_pair.agree(advert.mask_key, them)
            box_secret = self._box_pair.agree(advert.box_key, them)
            derive = self._keys.derive
            self._edges[them] = _Edge(
                mask=self._keys.mask(mask_secret, me, them),
                box_in=derive(box_secret, them, me, Purpose.SHARE_BOX),
                confirmation=derive(box_secret, min(me, them), max(me, them), Purpose.CONFIRMATION),
            )
            box_out = derive(box_secret, me, them, Purpose.SHARE_BOX)
            sealed.append((them, boxes.seal(box_out, bound, me, them, seeds[i], mask_keys[i])))
        self._mask_pair = self._box_pair = self._chain = None
        self._expects = (Delivery,)
        return Shares(me, seed_digest(bound, me, bytes(self._seed)), tuple(sealed))

    def _on_delivery(self, message: Delivery) -> Masked:
        assert self._roster is not None
        for them, _ in message.boxes:
            if them not in self._edges:
                raise Refused(Reason.NOT_A_NEIGHBOUR, f"shares from {them}, who is no neighbour")
        if len(message.boxes) < self._roster.threshold:
            raise Refused(
                Reason.TOO_FEW_SHARES,
                f"shares from {len(message.boxes)} neighbours, need {self._roster.threshold}",
            )
        for them, box in message.boxes:
            edge = self._edges[them]
            edge.shares = boxes.open_box(edge.box_in, self._graph_digest, them, self.member, box)
            edge.box_in = b""
        heard = {them for them, _ in message.boxes}
        self._edges = {them: edge for them, edge in self._edges.items() if them in heard}
        masked = self._mask(self._payload())
        tags = tuple(
            (them, boxes.confirm(edge.confirmation, self._graph_digest, self.member, them))
            for them, edge in self._edges.items()
        )
        self._expects = (Survivors,)
        return Masked(self.member, tags, masked)

    def _mask(self, values: Words) -> memoryview:
        """The payload under its masks, in wire form; the masks' keys are dropped."""
        terms, me = self._terms, self.member
        if values.shape != (terms.size,) or values.dtype != np.uint32:
            raise Refused(Reason.BAD_INPUT, f"the payload is no vector of {terms.size} elements")
        if int(values.max()) >> terms.value_bits:
            raise Refused(Reason.RING_OVERFLOW, f"an element has over {terms.value_bits} bits")
        words = np.array(values, dtype="<u4")
        own = self._keys.derive(bytes(self._seed), me, me, Purpose.SELF_MASK)
        above = [edge.mask for them, edge in self._edges.items() if them > me]
        below = [edge.mask for them, edge in self._edges.items() if them < me]
        add_streams(words, [own, *above], below)
        for edge in self._edges.values():
            edge.mask = b""
        self._seed[:] = bytes(len(self._seed))
        return pack_words(words, terms)

    def _on_survivors(self, message: Survivors) -> Consent:
        assert self._roster is not None
        accept_survivors(
            message,
            me=self.member,
            members=self._members,
            neighbours=self._neighbours,
            confirmations={them: edge.confirmation for them, edge in self._edges.items()},
            threshold=self._roster.threshold,
            min_cohort=self._policy.min_cohort,
            graph_digest=self._graph_digest,
        )
        self._survivors = message
        self._consent_digest = survivors_digest(message, self._graph_digest)
        signature = self._identity.sign(SIGN_SURVIVORS, self._consent_digest)
        self._expects = (Consents,)
        return Consent(self.member, self._consent_digest, signature)

    def _on_consents(self, message: Consents) -> Unmask:
        assert self._roster is not None
        assert self._survivors is not None
        active = set(self._survivors.active)
        same = []
        for them, signed in message.consents:
            if them not in self._edges or them not in active:
                raise Refused(Reason.NOT_A_NEIGHBOUR, f"a consent of {them}, no live neighbour")
            digest, signature = signed[:DIGEST_BYTES], signed[DIGEST_BYTES:]
            if digest == self._consent_digest:
                same.append((them, signature))
            elif self._directory.verify(them, SIGN_SURVIVORS, digest, signature):
                raise Refused(Reason.SPLIT_VIEWS, f"member {them} was shown another survivor set")
        # A signature that does not verify counts as missing; no more than enough are checked.
        good, threshold = 0, self._roster.threshold
        for them, signature in same:
            good += self._directory.verify(them, SIGN_SURVIVORS, self._consent_digest, signature)
            if good == threshold:
                break
        if good < threshold:
            raise Refused(
                Reason.TOO_FEW_CONSENTS, f"{good} neighbours signed this set, need {threshold}"
            )
        edges = self._edges.items()
        seeds = tuple((them, edge.shares[0]) for them, edge in edges if them in active)
        keys = tuple((them, edge.shares[1]) for them, edge in edges if them not in active)
        self._over = Reason.ALREADY_UNMASKED
        self._forget()
        return Unmask(self.member, seeds, keys)
