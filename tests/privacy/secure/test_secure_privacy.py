"""What the server sees: words without structure, and nothing in clear."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from umbel.privacy.secure_aggregation import boxes, shamir
from umbel.privacy.secure_aggregation import client as client_module
from umbel.privacy.secure_aggregation.encoding import Layout, Whole
from umbel.privacy.secure_aggregation.in_process import run_round
from umbel.privacy.secure_aggregation.messages import (
    Advert,
    Consent,
    Consents,
    Masked,
    Refusal,
    Reveal,
    Shares,
    Survivors,
    Unmask,
    decode,
    encode,
)
from umbel.privacy.secure_aggregation.refusals import Refused
from umbel.privacy.secure_aggregation.server import Aborted, Outbox, Stage, Total
from umbel.privacy.secure_aggregation.words import unpack_words


def masked_vectors(cohort):
    """The masked vectors of one round, shape (n, size), as the server gets them."""
    seen = {}

    def wire(sender, data):
        message = decode(data, cohort.terms.digest)
        if isinstance(message, Masked):
            seen[sender] = unpack_words(message.words, cohort.terms).copy()

    end = run_round(cohort.server(), cohort.clients, cohort.terms, wire=wire)
    assert isinstance(end, Total)
    return np.array([seen[m] for m in sorted(seen)]), end


def p_of_bytes(words):
    """p of χ² on the bytes of ``words`` against the uniform distribution, 255 degrees."""
    return stats.chisquare(np.bincount(words.view(np.uint8).reshape(-1), minlength=256)).pvalue


def test_masked_words_are_uniform_even_where_the_input_is_constant(cohort_of):
    cohort = cohort_of(4, size=50_000)
    cohort.inputs = [np.zeros(50_000, dtype=np.uint32) for _ in range(4)]
    vectors, end = masked_vectors(cohort)
    assert not end.words.any()
    # Eight tests at a false alarm of one in a million each; any structure gives p = 0.
    for row in vectors:
        assert p_of_bytes(row) > 1e-6
    for i in range(4):
        for j in range(i):
            assert p_of_bytes(vectors[i] - vectors[j]) > 1e-7
    # The masks cancel in the sum of all, and in no smaller one.
    assert p_of_bytes(vectors.sum(axis=0, dtype=np.uint32)) > 1e-6  # self-masks are still on it


def test_the_same_test_sees_an_unmasked_vector(cohort_of):
    plain = cohort_of(4, size=50_000).inputs[0]
    assert p_of_bytes(plain) < 1e-12  # the two top bits of each word are zero


def test_two_input_sets_of_one_sum_cannot_be_told_apart(cohort_of):
    # A distinguisher with every advantage: it knows both input sets and correlates the view with
    # their difference. Over many rounds its score must not depend on which set was used.
    size, rounds = 400, 40
    a, b = cohort_of(3, size=size, seed=1), cohort_of(3, size=size, seed=1)
    a.inputs = [vector // 2 for vector in a.inputs]
    b.inputs[2] = a.inputs[2]
    top = a.inputs[0].astype(np.int64)
    low = np.minimum(top, a.inputs[1].astype(np.int64))
    b.inputs[0] = (top - low).astype(np.uint32)
    b.inputs[1] = (a.inputs[1].astype(np.int64) + low).astype(np.uint32)
    assert np.array_equal(sum(a.inputs), sum(b.inputs))
    pattern = (a.inputs[0] - b.inputs[0]).astype(np.int32).astype(np.float64)
    scores = {}
    for name, cohort in (("a", a), ("b", b)):
        scores[name] = []
        for _ in range(rounds):
            cohort.clients = {m: cohort.client(m) for m in range(3)}
            vectors, end = masked_vectors(cohort)
            assert np.array_equal(end.words, sum(a.inputs))
            view = vectors[0].astype(np.int32).astype(np.float64)
            scores[name].append(np.corrcoef(view, pattern)[0, 1])
    assert stats.ttest_ind(scores["a"], scores["b"]).pvalue > 1e-5
    assert stats.ks_2samp(scores["a"], scores["b"]).pvalue > 1e-5
    # Without masks the score tells at once.
    assert abs(np.corrcoef(a.inputs[0].astype(np.float64), pattern)[0, 1]) > 0.3


def test_two_rounds_of_one_cohort_share_no_mask(cohort_of):
    cohort = cohort_of(4, size=20_000)
    first, _ = masked_vectors(cohort)
    cohort.clients = {m: cohort.client(m) for m in range(4)}
    second, _ = masked_vectors(cohort)
    for one, other in zip(first, second, strict=True):
        assert p_of_bytes(one - other) > 1e-6


def test_the_wire_holds_no_count_no_metric_and_no_key_in_clear(cohort_of, monkeypatch):
    secrets = []
    split = shamir.split

    def remember(secret, threshold, holders):
        shares = split(secret, threshold, holders)
        secrets.append((secret, shares))
        return shares

    monkeypatch.setattr(client_module.shamir, "split", remember)
    masks = []
    add = client_module.add_streams

    def remember_masks(target, plus, minus):
        masks.extend([*plus, *minus])
        add(target, plus, minus)

    monkeypatch.setattr(client_module, "add_streams", remember_masks)
    layout = Layout([Whole("examples", 4, 0, 2**29 - 1)], 29)
    cohort = cohort_of(5, size=4)
    marker = np.array([0x0ABCDEF1, 0x01234567, 0x13572468, 0x0BADCAFE])
    cohort.inputs = [layout.encode({"examples": marker + m}) for m in range(5)]
    sent = []
    end = run_round(
        cohort.server(),
        cohort.clients,
        cohort.terms,
        silent=lambda stage, m: stage is Stage.MASKED and m == 4,
        wire=lambda sender, data: sent.append(data),
    )
    assert isinstance(end, Total)
    everything = b"\0".join(sent)
    for vector in cohort.inputs:
        for element in vector.tolist():
            assert element.to_bytes(4, "little") not in everything
            assert element.to_bytes(4, "big") not in everything
    assert len(secrets) == 10
    for secret, shares in secrets:
        assert secret not in everything
        assert len(shares) == 4
    assert len(masks) == 4 * 5
    assert all(mask not in everything for mask in masks)
    # Of each member's two secrets shares of one kind are opened, never of the other.
    for member in range(5):
        (_, seeds), (_, keys) = secrets[2 * member], secrets[2 * member + 1]
        seeds_open = any(share in everything for share in seeds)
        keys_open = any(share in everything for share in keys)
        assert (seeds_open, keys_open) == ((True, False) if member < 4 else (False, True))


def test_a_client_sends_only_what_the_protocol_lists(cohort_of):
    # By size: nothing is added to a message, no count, no metric, no text.
    size, n, k = 100, 12, 6
    cohort = cohort_of(n, k, size=size)
    sizes = {}

    def wire(sender, data):
        if sender is not None:
            message = decode(data, cohort.terms.digest)
            sizes.setdefault(type(message), set()).add(len(data))

    run_round(cohort.server(), cohort.clients, cohort.terms, wire=wire)
    header = 40
    assert sizes == {
        Advert: {header + 68},
        Reveal: {header + 37},
        Shares: {header + 72 + k * 118},
        Masked: {header + 8 + k * 52 + 4 * size},
        Consent: {header + 40 + k * 20},
        Unmask: {header + 12 + k * 37},
    }


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_survivor_sets_open_both_secrets_of_a_client(cohort_of, data):
    """The server shows each client its own survivor set; its coalition gives it every share.

    Whatever it shows, and whatever consents it passes on, no honest client's two secrets can both
    be rebuilt.
    """
    n = data.draw(st.integers(4, 8), "n")
    corrupt = set(range(data.draw(st.integers(0, (n - 2) // 2), "corrupt")))
    k, x = n - 1, len(corrupt)
    t = (k + x) // 2 + 1
    cohort = cohort_of(n, threshold=t)
    cohort.policy = type(cohort.policy)(3, x / n)
    cohort.clients = {m: cohort.client(m) for m in range(n)}
    tags, opened = {}, {m: ([], []) for m in range(n)}
    server = cohort.server()
    out = server.invite()
    while server.stage is not Stage.MASKED:
        cohort.answer(server, out)
        out = server.advance()
    for member, message in out.messages.items():
        seals = cohort.clients[member].step(message).seals
        tags[member] = {them: seal[:16] for them, seal in seals}
    honest = [m for m in range(n) if m not in corrupt]
    views = [
        frozenset(data.draw(st.sets(st.integers(0, n - 1), min_size=2), "view")) for _ in range(2)
    ]
    consents = {}
    for m in honest:
        active = tuple(sorted(data.draw(st.sampled_from(views), "shown") | {m}))
        dead = tuple(v for v in range(n) if v not in active)
        shown = Survivors(active, dead, tuple((v, tags[v][m]) for v in active if v != m))
        answer = cohort.send(shown, m)
        if isinstance(answer, Consent):
            consents[m] = (answer, active)
    for m, (mine, active) in consents.items():
        relayed = []
        for v in active:
            if v in corrupt:  # says whatever helps
                key = cohort.clients[m].state.edges[v].tags
                relayed.append((v, mine.digest + boxes.consent(key, mine.digest, v, m)))
            elif v != m and v in consents and consents[v][0].digest == mine.digest:
                relayed.append((v, mine.digest + dict(consents[v][0].tags).get(m, bytes(16))))
        answer = cohort.send(Consents(tuple(relayed)), m)
        if isinstance(answer, Unmask):
            for them, _ in answer.seeds:
                opened[them][0].append(m)
            for them, _ in answer.roots:
                opened[them][1].append(m)
    for m in honest:
        seeds, keys = (len(givers) + x for givers in opened[m])
        assert seeds < t or keys < t
        if seeds >= t:  # its sum hides it among at least t - x other honest clients
            assert len(opened[m][0]) >= t - x


def test_flower_named_active_and_dead_gives_neither_secret(cohort_of):
    for victim in range(5):
        cohort = cohort_of(5)
        survivors = cohort.until(Survivors, victim)
        both = Survivors(survivors.active, (2,), survivors.tags)
        assert isinstance(cohort.send(both, victim), Refusal)


def test_flower_seeds_have_all_their_bits(cohort_of, monkeypatch):
    # There, masks came from 28 bits; here every key of a mask has 256, none repeated.
    masks = []
    add = client_module.add_streams

    def remember(target, plus, minus):
        masks.extend([*plus, *minus])
        add(target, plus, minus)

    monkeypatch.setattr(client_module, "add_streams", remember)
    for _ in range(6):
        cohort = cohort_of(8)
        run_round(cohort.server(), cohort.clients, cohort.terms)
    assert all(len(mask) == 32 for mask in masks)
    pairs, selfs = 6 * 8 * 7 // 2, 6 * 8
    assert len(set(masks)) == pairs + selfs
    bits = np.unpackbits(np.frombuffer(b"".join(set(masks)), dtype=np.uint8)).reshape(-1, 256)
    # Each of the 256 bits is a fair coin over 216 keys: six standard deviations.
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 6 * 0.5 / np.sqrt(len(bits))


@pytest.mark.parametrize("threshold", [4, 5, 6, 7])
def test_flower_any_number_of_shares_works_even_and_odd(cohort_of, threshold):
    cohort = cohort_of(9, 8, threshold)
    end = run_round(cohort.server(), cohort.clients, cohort.terms)
    # t = 4 is half of 8 neighbours and refused by every client.
    assert isinstance(end, Aborted if threshold == 4 else Total)


def test_flower_upload_is_four_bytes_a_number_and_two_where_the_ring_is_small(cohort_of):
    for ring_bits, width in ((32, 4), (24, 3), (16, 2)):
        cohort = cohort_of(5, size=1000, ring_bits=ring_bits)
        sizes = []

        def wire(sender, data, sizes=sizes, cohort=cohort):
            if isinstance(decode(data, cohort.terms.digest), Masked):
                sizes.append(len(data))

        run_round(cohort.server(), cohort.clients, cohort.terms, wire=wire)
        assert set(sizes) == {1000 * width + 48 + 4 * 52}


def test_flower_early_drops_do_not_end_the_round(cohort_of):
    for stage in (Stage.ADVERTS, Stage.REVEALS, Stage.SHARES):
        cohort = cohort_of(12, 8)
        end = run_round(
            cohort.server(),
            cohort.clients,
            cohort.terms,
            silent=lambda s, m, stage=stage: s is stage and m == 3,
        )
        assert isinstance(end, Total)
        assert end.survivors == tuple(m for m in range(12) if m != 3)


@given(noise=st.binary(max_size=400), at=st.sampled_from(list(range(6))), data=st.data())
@settings(max_examples=150, deadline=None)
def test_hostile_bytes_give_one_clean_refusal(cohort_of, noise, at, data):
    """Noise, or an honest message with a few bytes changed, at any stage."""
    cohort = cohort_of(5, size=3)
    server = cohort.server()
    out = server.invite()
    for _ in range(at):
        cohort.answer(server, out)
        out = server.advance()
        if not isinstance(out, Outbox):
            return
    honest = out.messages[0]
    changed = bytearray(honest)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(honest) - 1))] ^= data.draw(st.integers(1, 255))
    header = honest[:40]
    hostile = data.draw(st.sampled_from([noise, header + noise, bytes(changed)]))
    answer = cohort.clients[0].step(hostile)
    if isinstance(answer, Refusal):
        assert decode(encode(answer, cohort.terms.digest), cohort.terms.digest) == answer
    else:
        # Bytes that a client cannot know to be wrong: the advert of a member, whose box then does
        # not open, or the consent of a neighbour whom it does not need.
        assert hostile[7] in (1, 3, 11)
    # And the server sets the same bytes aside.
    before = server.stage
    server.receive(0, hostile)
    assert server.stage is before


@given(message=st.binary(max_size=300), kind=st.integers(1, 14))
@settings(max_examples=200, deadline=None)
def test_whatever_parses_has_one_encoding(cohort_of, message, kind):
    digest = bytes(32)
    data = b"UMBELS\x01" + bytes([kind]) + digest + message
    try:
        parsed = decode(data, digest)
    except Refused:  # and no other error
        return
    assert encode(parsed, digest) == data
