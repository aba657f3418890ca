"""Whole rounds: the sum is exact or there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.core.errors import InputError
from umbel.privacy.secure_aggregation.encoding import Layout, Real, Whole
from umbel.privacy.secure_aggregation.in_process import run_round
from umbel.privacy.secure_aggregation.messages import Masked, Refusal, decode, encode
from umbel.privacy.secure_aggregation.parameters import Design, choose, is_regular
from umbel.privacy.secure_aggregation.server import Aborted, Outbox, Stage, Total
from umbel.privacy.secure_aggregation.terms import widest_values

STAGES = [stage for stage in Stage if stage is not Stage.OVER]


def is_exact(total, cohort):
    exact = sum(cohort.inputs[m].astype(np.uint64) for m in total.survivors)
    assert exact.max() < 2**cohort.terms.ring_bits
    return np.array_equal(total.words, exact)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_drops_give_the_exact_sum_or_no_sum(cohort_of, data):
    n = data.draw(st.integers(3, 14), "n")
    degrees = [k for k in range(2, n) if is_regular(n, k)]
    k = data.draw(st.sampled_from(degrees), "k")
    t = data.draw(st.integers(k // 2 + 1, k), "t")
    size = data.draw(st.integers(1, 40), "size")
    ring_bits = data.draw(st.integers(16, 32), "ring bits")
    cohort = cohort_of(n, k, max(t, 2), size, ring_bits, seed=data.draw(st.integers(0, 99)))
    gone = {
        member: data.draw(st.sampled_from(STAGES))
        for member in data.draw(st.sets(st.integers(0, n - 1), max_size=1 + n // 3), "lost")
    }
    too_early = set()

    def silent(stage, member):
        lost = gone.get(member) is stage
        if lost and stage not in (Stage.CONSENTS, Stage.UNMASK):
            too_early.add(member)
        return lost

    end = run_round(cohort.server(), cohort.clients, cohort.terms, silent=silent)
    if isinstance(end, Total):
        assert is_exact(end, cohort)
        assert len(end.survivors) >= 3
        assert too_early.isdisjoint(end.survivors)
    else:
        assert gone
        assert end.why


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("n", "neighbours"), [(9, None), (12, 8)])
def test_drops_within_the_threshold_are_survived_in_every_stage(cohort_of, stage, n, neighbours):
    cohort = cohort_of(n, neighbours)
    end = run_round(
        cohort.server(),
        cohort.clients,
        cohort.terms,
        silent=lambda s, m: s is stage and m in (1, 5),
    )
    assert isinstance(end, Total)
    assert is_exact(end, cohort)
    counted = stage in (Stage.CONSENTS, Stage.UNMASK) or (
        stage is Stage.REVEALS and neighbours is None  # the complete graph has no such stage
    )
    assert len(end.survivors) == (n if counted else n - 2)


def test_drops_in_several_stages_at_once(cohort_of):
    cohort = cohort_of(14)
    lost = dict(
        enumerate([Stage.ADVERTS, Stage.SHARES, Stage.MASKED, Stage.CONSENTS, Stage.UNMASK])
    )
    server = cohort.server()
    end = run_round(server, cohort.clients, cohort.terms, silent=lambda s, m: lost.get(m) is s)
    assert isinstance(end, Total)
    assert is_exact(end, cohort)
    assert end.survivors == tuple(range(3, 14))
    assert server.lost == {m: f"silent: {stage.name.lower()}" for m, stage in lost.items()}


@pytest.mark.parametrize("stage", [s for s in STAGES if s is not Stage.REVEALS])
def test_below_the_threshold_nothing_is_released(cohort_of, stage):
    cohort = cohort_of(9)  # t = 5
    server = cohort.server()
    alive = {0, 1} if stage is Stage.ADVERTS else {0, 1, 2, 3, 4}
    end = run_round(
        server, cohort.clients, cohort.terms, silent=lambda s, m: s is stage and m not in alive
    )
    assert isinstance(end, Aborted)
    assert "need" in end.why
    assert server.stage is Stage.OVER
    assert isinstance(server.advance(), Aborted)


def test_lost_openings_draw_another_graph_and_too_many_end_the_round(cohort_of):
    cohort = cohort_of(20, 6)
    seen = []

    def one_each_time(stage, member):
        if stage is Stage.REVEALS and member not in seen and len(seen) < 3:
            turn = len(seen)
            if member == turn:
                seen.append(member)
                return True
        return False

    end = run_round(cohort.server(), cohort.clients, cohort.terms, silent=one_each_time)
    assert isinstance(end, Total)
    assert is_exact(end, cohort)
    assert end.survivors == tuple(m for m in range(20) if m not in seen)
    cohort = cohort_of(20, 6)
    end = run_round(
        cohort.server(),
        cohort.clients,
        cohort.terms,
        silent=lambda s, m: s is Stage.REVEALS and m == max(server_members(cohort)),
    )
    assert isinstance(end, Aborted)
    assert "draws of the graph" in end.why


def server_members(cohort):
    """Whoever is still in: the highest number that has not fallen silent."""
    cohort.silenced = getattr(cohort, "silenced", set())
    left = [m for m in range(20) if m not in cohort.silenced]
    cohort.calls = getattr(cohort, "calls", 0) + 1
    if cohort.calls % len(left) == 0:  # the end of this stage's list is reached
        cohort.silenced.add(left[-1])
        cohort.calls = 0
    return left


def test_a_late_vector_is_discarded(cohort_of):
    cohort = cohort_of(9)
    server = cohort.server()
    out = server.invite()
    late = None
    while isinstance(out, Outbox):
        for member, data in out.messages.items():
            answer = encode(cohort.clients[member].step(data), cohort.terms.digest)
            if server.stage is Stage.MASKED and member == 4:
                late = answer
                continue
            server.receive(member, answer)
        if late is not None and server.stage is Stage.CONSENTS:
            server.receive(4, late)
        out = server.advance()
    assert isinstance(out, Total)
    assert 4 not in out.survivors
    assert is_exact(out, cohort)
    assert (4, "late or early Masked") in server.turned_away


def test_a_second_vector_and_one_in_another_name_are_discarded(cohort_of):
    cohort = cohort_of(5)
    server = cohort.server()
    out = server.invite()
    while isinstance(out, Outbox):
        masked = server.stage is Stage.MASKED
        for member, data in out.messages.items():
            answer = encode(cohort.clients[member].step(data), cohort.terms.digest)
            if masked and member == 1:
                server.receive(2, answer)
            server.receive(member, answer)
            if masked:
                server.receive(member, answer)
        out = server.advance()
    assert isinstance(out, Total)
    assert is_exact(out, cohort)
    assert len([why for _, why in server.turned_away if "not waited for" in why]) == 6


def test_wrong_shares_from_a_client_end_the_round_instead_of_a_wrong_sum(cohort_of):
    for kind in ("seeds", "roots"):
        cohort = cohort_of(5)
        server = cohort.server()
        out = server.invite()
        while isinstance(out, Outbox):
            for member, data in out.messages.items():
                if server.stage is Stage.MASKED and member == 4:
                    continue
                answer = cohort.clients[member].step(data)
                if server.stage is Stage.UNMASK and member == 0:
                    entries = getattr(answer, kind)
                    (them, share), rest = entries[0], entries[1:]
                    wrong = share[:-1] + bytes([share[-1] ^ 1])
                    seeds = ((them, wrong), *rest) if kind == "seeds" else answer.seeds
                    keys = ((them, wrong), *rest) if kind == "roots" else answer.roots
                    answer = type(answer)(0, seeds, keys)
                server.receive(member, encode(answer, cohort.terms.digest))
            out = server.advance()
        assert isinstance(out, Aborted)
        assert "not those that it dealt" in out.why or "belong together" in out.why


def test_a_refusal_takes_its_sender_out_and_is_named(cohort_of):
    cohort = cohort_of(6)
    server = cohort.server()
    out = server.invite()
    while isinstance(out, Outbox):
        for member, data in out.messages.items():
            spoiled = server.stage is Stage.SHARES and member == 3
            answer = cohort.clients[member].step(data[:-1] if spoiled else data)
            assert isinstance(answer, Refusal) == spoiled
            server.receive(member, encode(answer, cohort.terms.digest))
        out = server.advance()
    assert isinstance(out, Total)
    assert 3 not in out.survivors
    assert server.lost[3].startswith("refused: malformed")


def test_a_real_payload_with_weights_under_the_mask(cohort_of):
    n, d = 6, 500
    bits = widest_values(n, 32)
    layout = Layout([Real("delta", d, 2.0), Whole("examples", 1, 0, 10**6)], bits)
    cohort = cohort_of(n, size=layout.size)
    rng = np.random.default_rng(7)
    deltas, counts = rng.normal(size=(n, d)), rng.integers(1, 1000, n)
    cohort.inputs = [
        layout.encode({"delta": x, "examples": c}) for x, c in zip(deltas, counts, strict=True)
    ]
    end = run_round(
        cohort.server(),
        cohort.clients,
        cohort.terms,
        silent=lambda s, m: s is Stage.MASKED and m == 2,
    )
    assert isinstance(end, Total)
    sums = layout.decode(end.words, len(end.survivors))
    kept = list(end.survivors)
    assert sums["examples"][0] == counts[kept].sum()
    exact = np.clip(deltas[kept], -2, 2).sum(axis=0)
    assert np.abs(sums["delta"] - exact).max() <= layout.error_bound(layout.fields[0], len(kept))


def test_a_chosen_design_runs_at_its_drop_out_rate(cohort_of):
    n = 60
    design = choose(n, 0.05, 0.1)
    cohort = cohort_of(n, design.neighbours, design.threshold, corrupt_fraction=0.05)
    assert isinstance(design, Design)
    assert design.neighbours < n - 1
    end = run_round(
        cohort.server(),
        cohort.clients,
        cohort.terms,
        silent=lambda s, m: s is Stage.MASKED and m < 6,
    )
    assert isinstance(end, Total)
    assert is_exact(end, cohort)


def test_the_payload_is_asked_for_once_and_after_all_checks_on_keys(cohort_of):
    cohort = cohort_of(5)
    assert isinstance(run_round(cohort.server(), cohort.clients, cohort.terms), Total)
    assert sorted(cohort.opened) == list(range(5))


def test_secrets_are_let_go_at_the_end(cohort_of):
    cohort = cohort_of(5)
    run_round(cohort.server(), cohort.clients, cohort.terms)
    for client in cohort.clients.values():
        assert client.finished
        kept = client.state
        assert kept.edges == {}
        assert kept.seed == bytearray()
        assert kept.pair is kept.chain is None


def test_the_seed_is_overwritten_once_the_vector_is_masked(cohort_of):
    cohort = cohort_of(5)
    server = cohort.server()
    out = server.invite()
    while server.stage is not Stage.MASKED:
        cohort.answer(server, out)
        out = server.advance()
    seed = cohort.clients[0].state.seed
    assert any(seed)
    masked = cohort.clients[0].step(out.messages[0])
    assert isinstance(masked, Masked)
    assert not any(seed)
    assert all(
        edge.mine == edge.theirs.half == b"" for edge in cohort.clients[0].state.edges.values()
    )


def test_a_failing_payload_stays_at_home_and_ends_the_round_for_its_client(cohort_of):
    cohort = cohort_of(5)

    def fail():
        raise FileNotFoundError("/patients/42.npz")

    vars(cohort.clients[0])["_payload"] = fail
    server = cohort.server()
    out = server.invite()
    while server.stage is not Stage.MASKED:
        cohort.answer(server, out)
        out = server.advance()
    with pytest.raises(FileNotFoundError):
        cohort.clients[0].step(out.messages[0])
    after = cohort.clients[0].step(out.messages[0])
    assert isinstance(after, Refusal)
    assert "patients" not in after.detail
    assert decode(encode(after, cohort.terms.digest), cohort.terms.digest) == after


@pytest.mark.parametrize("ring_bits", [16, 20, 32])
def test_residues_are_summed_around_the_ring(cohort_of, ring_bits):
    cohort = cohort_of(6, size=40, ring_bits=ring_bits)
    cohort.terms = replace(cohort.terms, value_bits=ring_bits, modular=True)
    rng = np.random.default_rng(1)
    cohort.inputs = [rng.integers(0, 2**ring_bits, 40, dtype=np.uint32) for _ in range(6)]
    cohort.clients = {m: cohort.client(m) for m in range(6)}
    end = run_round(
        cohort.server(),
        cohort.clients,
        cohort.terms,
        silent=lambda s, m: (s, m) == (Stage.MASKED, 4),
    )
    assert isinstance(end, Total)
    assert end.survivors == (0, 1, 2, 3, 5)
    wide = sum(cohort.inputs[m].astype(np.int64) for m in end.survivors)
    assert wide.max() >= 2**ring_bits, "it does go round"
    np.testing.assert_array_equal(end.words, wide % 2**ring_bits)
    with pytest.raises(InputError, match="value_bits"):
        replace(cohort.terms, value_bits=ring_bits - 1)
