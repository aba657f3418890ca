"""A hostile server: each script is refused with its reason, signed, and gets nothing.

A script changes the message that an honest server would have sent to the victim, member 0.
"""

# ruff: noqa: E501 - a script a line

from __future__ import annotations

import os
import struct
from dataclasses import replace

import numpy as np
import pytest

from umbel.privacy.secure_aggregation import boxes, graph, shamir
from umbel.privacy.secure_aggregation.agreement import KeyPair, RoundKeys
from umbel.privacy.secure_aggregation.boxes import BOX_BYTES, Contents
from umbel.privacy.secure_aggregation.in_process import run_round
from umbel.privacy.secure_aggregation.messages import (
    ADVERT_BYTES,
    Advert,
    Again,
    Consents,
    Delivery,
    Draw,
    Invitation,
    Masked,
    Refusal,
    Reveal,
    Roster,
    Shares,
    Survivors,
    decode,
    encode,
)
from umbel.privacy.secure_aggregation.refusals import Reason
from umbel.privacy.secure_aggregation.server import Stage, Total
from umbel.privacy.secure_aggregation.statements import SIGN_REFUSAL
from umbel.privacy.secure_aggregation.terms import Policy, widest_values
from umbel.privacy.secure_aggregation.words import unpack_words


def entries(roster):
    return [roster.entry(i) for i in range(len(roster.adverts) // ADVERT_BYTES)]


def with_entries(roster, adverts):
    return replace(roster, adverts=b"".join(advert.body() for advert in adverts))


def forged(cohort, advert):
    """A fresh key in ``advert``'s name; the server knows its private half."""
    cohort.forged = KeyPair()
    return replace(advert, key=cohort.forged.public_key)


def change_terms(**changes):
    def script(cohort, message):
        return Invitation(replace(cohort.terms, **changes).encode())

    return script


def change_member(member, change):
    def script(cohort, roster):
        adverts = entries(roster)
        adverts[member] = change(cohort, adverts[member])
        return with_entries(roster, adverts)

    return script


def sybil(cohort, roster):
    stranger = replace(roster.entry(4), member=77)
    return replace(with_entries(roster, [*entries(roster), stranger]), neighbours=5, threshold=4)


ROSTER = [
    ("threshold one", lambda c, m: replace(m, threshold=1), Reason.THRESHOLD_TOO_LOW),
    ("threshold half", lambda c, m: replace(m, threshold=2), Reason.THRESHOLD_TOO_LOW),
    ("threshold zero", lambda c, m: replace(m, threshold=0), Reason.NO_SUCH_GRAPH),
    ("threshold over all", lambda c, m: replace(m, threshold=5), Reason.NO_SUCH_GRAPH),
    ("odd graph", lambda c, m: replace(m, neighbours=3), Reason.NO_SUCH_GRAPH),
    ("no neighbours", lambda c, m: replace(m, neighbours=0), Reason.NO_SUCH_GRAPH),
    ("one neighbour pair", lambda c, m: replace(m, neighbours=2, threshold=1), Reason.THRESHOLD_TOO_LOW),
    ("two clients", lambda c, m: replace(with_entries(m, entries(m)[:2]), neighbours=1, threshold=1), Reason.COHORT_TOO_SMALL),
    ("nobody", lambda c, m: with_entries(m, []), Reason.NOT_IN_ROSTER),
    ("victim left out", lambda c, m: with_entries(m, entries(m)[1:]), Reason.NOT_IN_ROSTER),
    ("victim's key replaced", change_member(0, forged), Reason.REPLACED_KEY),
    ("victim's commitment replaced", change_member(0, lambda c, a: replace(a, commitment=os.urandom(32))), Reason.REPLACED_KEY),
    ("key of small order", change_member(3, lambda c, a: replace(a, key=bytes(32))), Reason.REPLACED_KEY),
    ("member twice", lambda c, m: with_entries(m, [*entries(m)[:2], *entries(m)[1:]]), Reason.DUPLICATE_MEMBER),
    ("members out of order", lambda c, m: with_entries(m, entries(m)[::-1]), Reason.DUPLICATE_MEMBER),
    ("sybil", sybil, Reason.UNKNOWN_MEMBER),
    ("first draw skipped", lambda c, m: replace(m, draw=1), Reason.OUT_OF_TURN),
    ("a draw too many", lambda c, m: replace(m, draw=9), Reason.DRAWS_EXHAUSTED),
]  # fmt: skip

INVITATION = [
    ("another run", change_terms(run=b"x" * 16), Reason.REPLAY),
    ("an older round", change_terms(round_number=3), Reason.REPLAY),
    ("another base model", change_terms(context=b"x" * 32), Reason.OTHER_MODEL),
    ("another size", change_terms(size=8), Reason.OTHER_TERMS),
    ("another ring", change_terms(value_bits=31), Reason.OTHER_TERMS),
    ("another directory", change_terms(directory=b"x" * 32), Reason.OTHER_TERMS),
    ("residues in place of values", change_terms(modular=True, value_bits=32), Reason.OTHER_TERMS),
    ("a flag of two", lambda c, m: Invitation(m.terms[:-1] + b"\x02"), Reason.OTHER_TERMS),
    ("terms out of bounds", lambda c, m: Invitation(m.terms[:-2] + b"\x40\x01"), Reason.OTHER_TERMS),
]  # fmt: skip


def swap(message, position, box):
    boxes = list(message.boxes)
    boxes[position] = (boxes[position][0], box)
    return Delivery(tuple(boxes))


def reflected(cohort, message):
    """The victim's own box to member 1, as if member 1 had sent it."""
    return swap(message, 0, cohort.sent.boxes[0][1])


DELIVERY = [
    ("a box changed", lambda c, m: swap(m, 1, bytes(BOX_BYTES)), Reason.TAMPERED_SHARES),
    ("boxes exchanged", lambda c, m: swap(m, 1, m.boxes[2][1]), Reason.TAMPERED_SHARES),
    ("own box reflected", reflected, Reason.TAMPERED_SHARES),
    ("too few boxes", lambda c, m: Delivery(m.boxes[:2]), Reason.TOO_FEW_SHARES),
    ("no boxes", lambda c, m: Delivery(()), Reason.TOO_FEW_SHARES),
    ("a stranger's box", lambda c, m: Delivery((*m.boxes, (9, bytes(BOX_BYTES)))), Reason.NOT_A_NEIGHBOUR),
    ("own box", lambda c, m: Delivery(((0, bytes(BOX_BYTES)), *m.boxes)), Reason.NOT_A_NEIGHBOUR),
    ("a box twice", lambda c, m: Delivery((m.boxes[0], *m.boxes)), Reason.DUPLICATE_MEMBER),
]  # fmt: skip


def tagless(message, *members):
    return replace(message, tags=tuple(e for e in message.tags if e[0] not in members))


SURVIVORS = [
    ("active and dead", lambda c, m: replace(m, dead=(3,)), Reason.ACTIVE_AND_DEAD),
    ("victim active and dead", lambda c, m: replace(m, dead=(0,)), Reason.ACTIVE_AND_DEAD),
    ("victim dead", lambda c, m: replace(m, active=(1, 2, 3, 4), dead=(0,)), Reason.DECLARED_DEAD),
    ("victim nowhere", lambda c, m: replace(m, active=(1, 2, 3, 4)), Reason.DECLARED_DEAD),
    ("a stranger active", lambda c, m: replace(m, active=(*m.active, 9)), Reason.UNKNOWN_MEMBER),
    ("a stranger dead", lambda c, m: replace(m, dead=(9,)), Reason.UNKNOWN_MEMBER),
    ("two survivors", lambda c, m: Survivors((0, 1), (2, 3, 4), ()), Reason.TOO_FEW_SURVIVORS),
    ("victim alone", lambda c, m: Survivors((0,), (1, 2, 3, 4), ()), Reason.TOO_FEW_SURVIVORS),
    ("under the threshold", lambda c, m: tagless(Survivors((0, 1, 2), (3, 4), m.tags), 3, 4), Reason.TOO_FEW_SURVIVORS),
    ("a neighbour hidden", lambda c, m: replace(m, active=(0, 1, 2, 3)), Reason.UNACCOUNTED_NEIGHBOUR),
    ("no confirmation", lambda c, m: tagless(m, 2), Reason.UNCONFIRMED_EDGE),
    ("forged confirmation", lambda c, m: replace(m, tags=((1, bytes(16)), *m.tags[1:])), Reason.UNCONFIRMED_EDGE),
    ("confirmations exchanged", lambda c, m: replace(m, tags=((1, m.tags[1][1]), (2, m.tags[0][1]), *m.tags[2:])), Reason.UNCONFIRMED_EDGE),
    ("own confirmation reflected", lambda c, m: replace(m, tags=((1, c.sent_tags[1]), *m.tags[1:])), Reason.UNCONFIRMED_EDGE),
    ("a tag unasked for", lambda c, m: replace(m, tags=(*m.tags, (9, bytes(16)))), Reason.NOT_A_NEIGHBOUR),
    ("survivor twice", lambda c, m: replace(m, active=(0, 1, 1, 2, 3, 4)), Reason.DUPLICATE_MEMBER),
]  # fmt: skip


def consent_to(cohort, member, digest):
    """``member``'s consent to ``digest``, as it would tell the victim."""
    key = cohort.clients[0].state.edges[member].tags
    return (member, digest + boxes.consent(key, digest, member, 0))


def split_view(cohort, message):
    """Member 2 was shown, and consented to, another set."""
    others = [entry for entry in message.consents if entry[0] != 2]
    return Consents(tuple(sorted([*others, consent_to(cohort, 2, b"x" * 32)])))


def untagged(cohort, message):
    return Consents(tuple((m, value[:32] + bytes(16)) for m, value in message.consents))


def one_consents_for_all(cohort, message):
    first = message.consents[0][1]
    return Consents(tuple((m, first) for m, _ in message.consents))


CONSENTS = [
    ("split views", split_view, Reason.SPLIT_VIEWS),
    ("forged consents", untagged, Reason.TOO_FEW_CONSENTS),
    ("one consent for all", one_consents_for_all, Reason.TOO_FEW_CONSENTS),
    ("too few consents", lambda c, m: Consents(m.consents[:2]), Reason.TOO_FEW_CONSENTS),
    ("no consents", lambda c, m: Consents(()), Reason.TOO_FEW_CONSENTS),
    ("own consent", lambda c, m: Consents(((0, m.consents[0][1]), *m.consents)), Reason.NOT_A_NEIGHBOUR),
    ("a stranger's consent", lambda c, m: Consents((*m.consents, (9, bytes(48)))), Reason.NOT_A_NEIGHBOUR),
    ("a consent twice", lambda c, m: Consents((m.consents[0], *m.consents)), Reason.DUPLICATE_MEMBER),
]  # fmt: skip

SCRIPTS = [
    (kind, *script)
    for kind, scripts in (
        (Invitation, INVITATION),
        (Roster, ROSTER),
        (Delivery, DELIVERY),
        (Survivors, SURVIVORS),
        (Consents, CONSENTS),
    )
    for script in scripts
]


def assert_refused(cohort, answer, reason, victim=0):
    assert isinstance(answer, Refusal), answer
    assert answer.reason is reason, answer
    signed = answer.signed(cohort.terms.digest)
    assert cohort.directory.verify(victim, SIGN_REFUSAL, signed, answer.signature)
    assert len(encode(answer, cohort.terms.digest)) < 400
    kept = cohort.clients[victim].state
    assert kept.edges == {}
    assert kept.pair is None


def record(cohort):
    """Keeps what the victim sent, for scripts that play it back."""
    victim = cohort.clients[0]
    step = victim.step

    def recorded(data):
        answer = step(data)
        if hasattr(answer, "boxes"):
            cohort.sent = answer
        if hasattr(answer, "seals"):
            cohort.sent_tags = {them: seal[:16] for them, seal in answer.seals}
        return answer

    victim.step = recorded


@pytest.mark.parametrize(
    ("kind", "name", "script", "reason"), SCRIPTS, ids=[name for _, name, *_ in SCRIPTS]
)
def test_script(cohort_of, kind, name, script, reason):
    cohort = cohort_of(5)
    record(cohort)
    message = cohort.until(kind)
    answer = cohort.send(script(cohort, message))
    assert_refused(cohort, answer, reason)
    assert (0 in cohort.opened) == (kind in (Survivors, Consents))  # the data set is untouched
    # Dead for the round: the right message no longer helps.
    again = cohort.send(message)
    assert isinstance(again, Refusal)
    assert again.reason is Reason.DEAD


def test_there_are_enough_scripts():
    assert len(SCRIPTS) + 2 * len(MIDDLE) >= 60


def test_a_second_unmask_request(cohort_of):
    cohort = cohort_of(5)
    consents = cohort.until(Consents)
    assert not isinstance(cohort.send(consents), Refusal)
    fewer = Consents(consents.consents[:3])
    for message in (consents, fewer, Survivors((0, 1, 2, 3), (4,), ())):
        assert_refused(cohort, cohort.send(message), Reason.ALREADY_UNMASKED)


def test_a_second_survivor_set(cohort_of):
    cohort = cohort_of(5)
    survivors = cohort.until(Survivors)
    cohort.send(survivors)
    assert_refused(cohort, cohort.send(survivors), Reason.OUT_OF_TURN)


def test_shares_asked_for_before_consent(cohort_of):
    cohort = cohort_of(5)
    cohort.until(Survivors)
    assert_refused(cohort, cohort.send(Consents(())), Reason.OUT_OF_TURN)


def test_a_message_that_only_clients_send(cohort_of):
    cohort = cohort_of(5)
    cohort.until(Roster)
    assert_refused(cohort, cohort.send(Reveal(1, 0, bytes(32))), Reason.OUT_OF_TURN)


@pytest.mark.parametrize("kind", [Roster, Delivery, Survivors, Consents])
def test_a_message_of_another_round(cohort_of, kind):
    cohort = cohort_of(5)
    message = cohort.until(kind)
    other = replace(cohort.terms, round_number=5)
    assert_refused(cohort, cohort.clients[0].step(encode(message, other.digest)), Reason.REPLAY)


@pytest.mark.parametrize("kind", [Invitation, Roster, Delivery, Survivors, Consents])
def test_bytes_added_cut_or_of_another_version(cohort_of, kind):
    for spoil in (
        lambda data: data + b"\0",
        lambda data: data[:-1],
        lambda data: b"UMBELS\x02" + data[7:],
        lambda data: data[:7] + b"\xff" + data[8:],
        lambda data: b"",
    ):
        cohort = cohort_of(5)
        message = cohort.until(kind)
        answer = cohort.clients[0].step(spoil(encode(message, cohort.terms.digest)))
        assert_refused(cohort, answer, Reason.MALFORMED)


def test_a_list_that_claims_to_be_endless(cohort_of):
    cohort = cohort_of(5)
    cohort.until(Delivery)
    header = encode(Delivery(()), cohort.terms.digest)[:-4]
    answer = cohort.clients[0].step(header + struct.pack(">I", 0xFFFFFFFF))
    assert_refused(cohort, answer, Reason.MALFORMED)


def test_more_members_than_the_ring_holds(cohort_of):
    cohort = cohort_of(5)
    cohort.terms = replace(cohort.terms, value_bits=widest_values(5, 32) + 1)
    cohort.clients[0] = cohort.client(0)
    invitation = encode(Invitation(cohort.terms.encode()), bytes(32))
    honest = [cohort.client(m).step(invitation) for m in range(1, 5)]
    own = cohort.send(Invitation(cohort.terms.encode()))
    adverts = b"".join(advert.body() for advert in (own, *honest))
    assert_refused(cohort, cohort.send(Roster(0, 4, 3, adverts)), Reason.RING_OVERFLOW)


def test_a_threshold_that_the_stated_coalition_could_use(cohort_of):
    cohort = cohort_of(5, corrupt_fraction=0.2)  # one corrupt: 2t > 4 + 1 holds for 3
    roster = cohort.until(Roster)
    assert not isinstance(cohort.send(roster), Refusal)
    cohort = cohort_of(5, corrupt_fraction=0.4)  # two: 2t > 6 asks for 4
    roster = cohort.until(Roster)
    assert_refused(cohort, cohort.send(roster), Reason.THRESHOLD_TOO_LOW)


def test_a_threshold_that_allows_smaller_sums_than_the_policy(cohort_of):
    cohort = cohort_of(5)
    cohort.policy = Policy(min_cohort=5, corrupt_fraction=0.0)
    cohort.clients[0] = cohort.client(0)
    roster = cohort.until(Roster)
    assert_refused(cohort, cohort.send(roster), Reason.COHORT_TOO_SMALL)


def test_a_larger_cohort_than_the_noise_is_sized_for(cohort_of):
    cohort = cohort_of(5)
    cohort.policy = Policy(corrupt_fraction=0.0, max_cohort=4)
    cohort.clients[0] = cohort.client(0)
    roster = cohort.until(Roster)
    assert_refused(cohort, cohort.send(roster), Reason.RING_OVERFLOW)
    _, later, setup = kept(cohort_of)
    later.policy = cohort.policy
    later.clients[0] = later.client(0, setup=later.clients[0].setup)
    answer = later.send(Again(later.terms.encode(), setup.digest))
    assert_refused(later, answer, Reason.RING_OVERFLOW)


def test_an_oversized_element_never_leaves(cohort_of):
    cohort = cohort_of(5)
    cohort.inputs[0][2] = 2**32 - 1
    delivery = cohort.until(Delivery)
    assert_refused(cohort, cohort.send(delivery), Reason.RING_OVERFLOW)


# Sparse graphs: the server and its clients may not choose who is whose neighbour.

SPARSE = {"n": 12, "neighbours": 6}


def test_an_opening_replaced_cut_or_repeated(cohort_of):
    for change in (
        lambda d: d[:32] + os.urandom(32) + d[64:],
        lambda d: os.urandom(32) + d[32:],
        lambda d: d[:-32],
        lambda d: d + bytes(32),
        lambda d: d[32:64] + d[32:],
        lambda d: b"",
    ):
        cohort = cohort_of(**SPARSE)
        draw = cohort.until(Draw)
        assert_refused(cohort, cohort.send(Draw(change(draw.nonces))), Reason.WRONG_REVEAL)


def test_a_redraw_with_new_faces(cohort_of):
    cohort = cohort_of(**SPARSE)
    roster = cohort.until(Roster)
    few = replace(with_entries(roster, entries(roster)[:10]), draw=0)
    assert isinstance(cohort.send(few), Reveal)
    assert_refused(cohort, cohort.send(replace(roster, draw=1)), Reason.ROSTER_GREW)


def test_the_same_draw_again_with_another_roster(cohort_of):
    cohort = cohort_of(**SPARSE)
    roster = cohort.until(Roster)
    cohort.send(roster)
    again = with_entries(roster, entries(roster)[:10])
    assert_refused(cohort, cohort.send(again), Reason.OUT_OF_TURN)


def test_draws_without_end(cohort_of):
    cohort = cohort_of(**SPARSE)
    roster = cohort.until(Roster)
    for draw in range(4):
        assert isinstance(cohort.send(replace(roster, draw=draw)), Reveal)
    assert_refused(cohort, cohort.send(replace(roster, draw=4)), Reason.DRAWS_EXHAUSTED)


def test_openings_of_an_earlier_draw(cohort_of):
    cohort = cohort_of(**SPARSE)
    draw = cohort.until(Draw)
    # The victim is led to the second draw and given the secrets of the first.
    roster = cohort.clients[0].state.roster
    assert isinstance(cohort.send(replace(roster, draw=1)), Reveal)
    assert_refused(cohort, cohort.send(draw), Reason.WRONG_REVEAL)


def test_a_forged_roster_puts_forged_members_among_the_neighbours(cohort_of):
    # The server invents everybody but the victim. It knows their chains, not the victim's, so it
    # cannot keep the invented ones out of the victim's neighbourhood.
    cohort = cohort_of(**SPARSE)
    roster = cohort.until(Roster)
    own, chains, adverts = roster.entry(0), [], []
    for member in range(1, 12):
        chain = graph.Chain()
        chains.append(chain)
        adverts.append(Advert(member, KeyPair().public_key, chain.commitment))
    reveal = cohort.send(with_entries(roster, [own, *adverts]))
    nonces = reveal.nonce + b"".join(chain.open(0) for chain in chains)
    # It deals, under keys that need the others' identities; nobody can answer with a box of theirs.
    shares = cohort.send(Draw(nonces))
    assert isinstance(shares, Shares)
    delivery = Delivery(tuple((them, bytes(BOX_BYTES)) for them, _ in shares.boxes))
    assert_refused(cohort, cohort.send(delivery), Reason.TAMPERED_SHARES)
    assert cohort.opened == []


def test_two_degrees_for_two_halves_do_not_fit_together(cohort_of):
    # The same keys, another threshold for the victim: its boxes are bound to another graph.
    cohort = cohort_of(9)
    server = cohort.server()
    out = server.invite()
    cohort.answer(server, out)
    out = server.advance()
    roster = decode(out.messages[0], cohort.terms.digest)
    messages = dict(out.messages)
    messages[0] = encode(replace(roster, threshold=roster.threshold + 1), cohort.terms.digest)
    cohort.answer(server, type(out)(messages))
    out = server.advance()
    delivery = decode(out.messages[0], cohort.terms.digest)
    assert_refused(cohort, cohort.send(delivery), Reason.TAMPERED_SHARES)


MIDDLE = [
    ("to the victim alone", change_member(3, forged)),
    ("its commitment as well", change_member(3, lambda c, a: replace(forged(c, a), commitment=os.urandom(32)))),
    ("its commitment alone", change_member(3, lambda c, a: replace(a, commitment=os.urandom(32)))),
    ("another member's key", change_member(3, lambda c, a: replace(a, key=c.clients[2].state.advert.key))),
]  # fmt: skip


@pytest.mark.parametrize("forge", [False, True])
@pytest.mark.parametrize(("name", "script"), MIDDLE)
def test_a_key_replaced_by_the_server_opens_no_box(cohort_of, name, script, forge):
    """The victim deals for the false key, but no box of member 3 opens: no payload is asked for.

    With ``forge`` the server makes that box itself. It lacks the secret of the two identities.
    """
    cohort = cohort_of(5)
    server = cohort.server()
    out = server.invite()
    cohort.answer(server, out)
    out = server.advance()
    roster = script(cohort, decode(out.messages[0], cohort.terms.digest))
    messages = dict(out.messages)
    messages[0] = encode(roster, cohort.terms.digest)
    cohort.answer(server, type(out)(messages))
    out = server.advance()
    delivery = decode(out.messages[0], cohort.terms.digest)
    if forge and hasattr(cohort, "forged"):
        own = roster.entry(0)
        terms = cohort.terms
        keys = RoundKeys(terms.run, terms.round_number, terms.digest)
        pair = keys.pair(cohort.forged.agree(own.key, 0) + bytes(32), 0, 3)
        bound = cohort.clients[0].state.graph_digest
        share = shamir.split(os.urandom(32), 2, 3)[0]
        box = boxes.seal(pair.box(3, 0), bound, 3, 0, Contents(share, share, os.urandom(32)))
        delivery = Delivery(tuple((m, box if m == 3 else b) for m, b in delivery.boxes))
    assert_refused(cohort, cohort.send(delivery), Reason.TAMPERED_SHARES)
    assert 0 not in cohort.opened


def test_an_advert_of_an_old_round_opens_no_box(cohort_of):
    old, cohort = cohort_of(5), cohort_of(5)
    advert = old.until(Roster).entry(3)
    roster = cohort.until(Roster)
    adverts = entries(roster)
    adverts[3] = advert
    shares = cohort.send(with_entries(roster, adverts))
    assert isinstance(shares, Shares)
    delivery = Delivery(tuple((them, bytes(BOX_BYTES)) for them, _ in shares.boxes))
    assert_refused(cohort, cohort.send(delivery), Reason.TAMPERED_SHARES)
    assert cohort.opened == []


def kept(cohort_of):
    """A cohort that has been through one round, its next round, and the server's set-up."""
    first = cohort_of(5)
    first.clients = {m: first.client(m, keep=True) for m in range(5)}
    server = first.server()
    run_round(server, first.clients, first.terms)
    later = first.next_round()
    later.clients = {m: later.client(m, setup=first.clients[m].setup) for m in range(5)}
    return first, later, server.setup


def test_a_set_up_is_kept_without_new_keys_and_with_new_masks(cohort_of, monkeypatch):
    first, later, setup = kept(cohort_of)

    def never(*arguments):
        raise AssertionError("a key exchange")

    monkeypatch.setattr(KeyPair, "agree", never)
    sent = []
    server = later.server(setup)
    end = run_round(server, later.clients, later.terms, wire=lambda s, data: sent.append((s, data)))
    assert np.array_equal(end.words, sum(later.inputs))
    assert not [d for s, d in sent if isinstance(decode(d, later.terms.digest), Advert | Roster)]
    third = later.next_round()
    third.clients = {m: third.client(m, setup=first.clients[m].setup) for m in range(5)}
    other = []
    again = run_round(third.server(setup), third.clients, third.terms, wire=lambda s, d: other.append((s, d)))  # fmt: skip
    assert isinstance(again, Total)
    masks = []
    for messages, cohort in ((sent, later), (other, third)):
        found = [decode(d, cohort.terms.digest) for s, d in messages if s == 0]
        (masked,) = [m for m in found if isinstance(m, Masked)]
        masks.append(unpack_words(masked.words, cohort.terms) - cohort.inputs[0])
    assert not np.array_equal(*masks)


@pytest.mark.parametrize("stage", [Stage.SHARES, Stage.MASKED, Stage.CONSENTS, Stage.UNMASK])
def test_a_kept_set_up_lives_through_drop_outs_and_who_was_lost_comes_back(cohort_of, stage):
    first, later, setup = kept(cohort_of)
    end = run_round(later.server(setup), later.clients, later.terms, silent=lambda s, m: s is stage and m == 2)  # fmt: skip
    assert isinstance(end, Total)
    assert np.array_equal(end.words, sum(later.inputs[m] for m in end.survivors))
    third = later.next_round()
    third.clients = {m: third.client(m, setup=first.clients[m].setup) for m in range(5)}
    back = run_round(third.server(setup), third.clients, third.terms)
    assert isinstance(back, Total)
    assert back.survivors == (0, 1, 2, 3, 4)


def test_a_set_up_that_is_not_the_clients_own_is_refused(cohort_of):
    _, later, setup = kept(cohort_of)
    terms = later.terms.encode()
    assert_refused(later, later.send(Again(terms, os.urandom(32))), Reason.NO_SETUP)
    fresh = cohort_of(5)
    assert_refused(fresh, fresh.send(Again(fresh.terms.encode(), setup.digest)), Reason.NO_SETUP)
    replayed = later.client(1, setup=None)
    old = replace(later.terms, round_number=later.terms.round_number - 1)
    answer = replayed.step(encode(Again(old.encode(), setup.digest), later.terms.digest))
    assert answer.reason is Reason.REPLAY
