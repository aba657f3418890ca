"""Secure aggregation over messages: the same model, and nothing else on the wire or left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from helpers.local_grid import LocalGrid

from umbel.client.flower.app import app as client_app
from umbel.client.site_ledger import read
from umbel.core import signing
from umbel.core.errors import InputError
from umbel.core.messages import MANIFEST, MODEL, SECURE, write_run
from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, TrainPlan, Updates
from umbel.core.run_file import RunFile, resolve
from umbel.privacy.clipping import zeroing
from umbel.privacy.secure_aggregation.terms import TERMS_BYTES
from umbel.server.flower.grid import GridFederation
from umbel.server.flower.secure_grid import SecureGrid
from umbel.server.private_sum import Parts
from umbel.server.rounds import Cohort, Fold
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import Prepared, prepare
from umbel.simulations.secure import SecureFederation

CLIENTS = 4
CAP = 90.0


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_file(**tables: dict[str, Any]) -> RunFile:
    return resolve(
        {
            "run": {"rounds": 2, "seed": 3} | tables.pop("run", {}),
            "data": {
                "name": "breast-cancer",
                "split": {"kind": "dirichlet", "clients": CLIENTS, "alpha": 1.0},
                "holdout": 0.0,
                "client_holdout": 0.25,
            },
            "task": {"kind": "classification", "model": "logistic"},
            "client": {"lr": 0.05, "local_steps": 3, "device": "cpu"},
            "strategy": {"max_weight": CAP} | tables.pop("strategy", {}),
            "secure_aggregation": {"enabled": True} | tables.pop("secure", {}),
            **tables,
        }
    )


def federation(
    run: RunFile,
    tamper: Callable[..., Any] | None = None,
    configs: list[dict[str, Any]] | None = None,
    peers: dict[str, bytes] | None = None,
) -> tuple[Any, SecureGrid]:
    nodes = configs or [{"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)]
    grid = LocalGrid(client_app, nodes, **({} if tamper is None else {"tamper": tamper}))
    inner = GridFederation(grid, run, sites=len(nodes))
    return grid, SecureGrid(inner, prepare(run).strategy, peers)


def plan(prepared: Prepared, number: int = 1) -> TrainPlan:
    names = prepared.data.names
    return TrainPlan(number, list(names), prepared.model(), len(names), run_id="r")


def plain(prepared: Prepared, asked: TrainPlan) -> Any:
    inner = sequential(prepared.run, prepared.data, prepared.task, prepared.strategy.client)
    sums = prepared.strategy.combine.zero(asked.expected())
    for update in inner.train(asked):
        assert isinstance(update, Updates)
        weights = update.weights.clamp(max=CAP)
        sums = prepared.strategy.combine.add(
            sums, Updates(1, update.clients, update.delta, weights)
        )
    return sums


def whole(items: list[Any]) -> Cohort:
    (found,) = (item for item in items if isinstance(item, Cohort))
    return found


def stage_of(message: Message) -> str:
    return message.metadata.message_type.partition(".")[2]


def client_of(message: Message) -> str:
    return str(json.loads(str(message.content[MANIFEST][MANIFEST]))["client"])


def bytes_of(message: Message) -> bytes:
    found = b""
    for record in message.content.values():
        assert isinstance(record, ConfigRecord)
        for value in record.values():
            found += value if isinstance(value, bytes) else str(value).encode()
    return found


def test_the_sum_over_messages_is_that_of_the_plain_updates() -> None:
    run = run_file()
    prepared = prepare(run)
    _, secure = federation(run)
    asked = plan(prepared)
    found, expected = whole(list(secure.train(asked))), plain(prepared, asked)
    assert found.participants == asked.clients
    assert found.sums.clients == CLIENTS
    assert found.sums.weight == pytest.approx(expected.weight, abs=1e-4)
    for name, tensor in expected.delta.items():
        torch.testing.assert_close(found.sums.delta[name], tensor, rtol=0, atol=1e-4)
    assert found.training().keys() == {"loss", "accuracy"}
    inner = sequential(run, prepared.data, prepared.task, prepared.strategy.client)
    updates = [u for u in inner.train(asked) if isinstance(u, Updates)]
    weights = torch.cat([u.weights.clamp(max=CAP) for u in updates])
    losses = torch.cat([u.metrics["loss"] for u in updates])
    mean = float((weights * losses).sum() / weights.sum())
    assert found.training()["loss"] == pytest.approx(mean, abs=1e-4)


def test_evaluation_shows_the_mean_of_all_and_nobodys_own() -> None:
    run = run_file()
    prepared = prepare(run)
    _, secure = federation(run)
    names = list(prepared.data.names)
    items = list(secure.evaluate(EvaluatePlan(1, names, prepared.model())))
    assert [type(item) for item in items] == [Evaluation]
    inner = sequential(run, prepared.data, prepared.task, prepared.strategy.client)
    each = [
        e
        for e in inner.evaluate(EvaluatePlan(1, names, prepared.model()))
        if isinstance(e, Evaluation)
    ]
    weights = [min(e.examples, CAP) for e in each]
    for metric in ("loss", "accuracy"):
        pairs = zip(weights, each, strict=True)
        mean = sum(w * e.metrics[metric] for w, e in pairs) / sum(weights)
        assert items[0].metrics[metric] == pytest.approx(mean, abs=1e-4)  # type: ignore[union-attr]


def test_the_wire_shows_no_count_no_metric_no_update_and_no_key() -> None:
    run = run_file()
    prepared = prepare(run)
    wire: list[tuple[str, Message]] = []
    kept: list[bytes] = []
    grid: Any = None

    def listen(request: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        wire.append((request.metadata.message_type, reply))
        if grid is not None:
            for state in grid.states.values():
                kept.extend(bytes(r["state"]) for r in state.values())
        return reply

    grid, secure = federation(run, listen)
    asked = plan(prepared)
    whole(list(secure.train(asked)))
    list(secure.evaluate(EvaluatePlan(1, list(asked.clients), asked.model)))
    everything = b"\0".join(bytes_of(reply) for _, reply in wire)
    inner = sequential(run, prepared.data, prepared.task, prepared.strategy.client)
    for update in inner.train(asked):
        assert isinstance(update, Updates)
        count = int(update.weights[0])
        for _, reply in wire:
            text = str(reply.content[MANIFEST][MANIFEST])
            assert f":{count}" not in text
            assert f":{float(count)}" not in text
        for metric in update.metrics.values():
            assert str(float(metric[0]))[:8].encode() not in everything
        for tensor in update.delta.values():
            row = tensor[0].float().numpy().tobytes()
            assert row[:4] not in everything
            assert row[-8:] not in everything
    hellos = [json.loads(str(r.content[MANIFEST][MANIFEST])) for k, r in wire if "hello" in k]
    assert {(h["examples"], h["test_examples"]) for h in hellos} == {(1, 1)}
    secrets = set()
    for state in kept:
        table = json.loads(state[TERMS_BYTES:])
        secrets |= {table["pair"], table["seed"]} - {None, "", "00" * 32}
        for edge in table["edges"].values():
            secrets |= {edge[0], edge[1], edge[2]} - {""}
    assert len(secrets) > 20
    for secret in secrets:
        assert bytes.fromhex(secret) not in everything
        assert secret.encode() not in everything


def test_secrets_leave_the_context_with_the_round() -> None:
    run = run_file()
    prepared = prepare(run)
    during: list[int] = []
    grid: Any = None

    def listen(request: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        if stage_of(request) == "secure_masked":
            during.append(len(grid.states[request.metadata.dst_node_id]))
        return reply

    grid, secure = federation(run, listen)
    whole(list(secure.train(plan(prepared))))
    assert during == [1] * CLIENTS
    assert all(len(state) == 0 for state in grid.states.values())

    def lose_all(request: Message, answer: Callable[[], Message]) -> Message | None:
        reply = answer()
        return None if stage_of(request) == "secure_consents" else reply

    grid.tamper = lose_all
    asked = plan(prepared, 2)
    failures = list(
        secure.train(TrainPlan(2, asked.clients, asked.model, CLIENTS, 0.2, run_id="r"))
    )
    assert len(failures) == CLIENTS
    left = {len(state) for state in grid.states.values()}
    assert left == {1}, "a round that broke off is forgotten with the next one"
    grid.tamper = lambda request, answer: answer()
    whole(list(secure.train(plan(prepared, 3))))
    assert all(len(state) == 0 for state in grid.states.values())


@pytest.mark.parametrize("stage", ["secure_adverts", "secure_shares", "secure_masked"])
def test_a_node_that_is_lost_costs_its_own_update_alone(stage: str) -> None:
    run = run_file()
    prepared = prepare(run)
    asked = plan(prepared)
    victim = asked.clients[1]

    def lose(request: Message, answer: Callable[[], Message]) -> Message | None:
        gone = stage_of(request) == stage and client_of(request) == victim
        return None if gone else answer()

    _, secure = federation(run, lose)
    items = list(secure.train(TrainPlan(1, asked.clients, asked.model, CLIENTS, 0.2, run_id="r")))
    rest = [c for c in asked.clients if c != victim]
    assert whole(items).participants == rest
    (failure,) = (item for item in items if isinstance(item, Failure))
    assert (failure.client, failure.reason) == (victim, "no reply within 0.2 s")
    expected = plain(prepared, asked.part(rest))
    for name, tensor in expected.delta.items():
        torch.testing.assert_close(whole(items).sums.delta[name], tensor, rtol=0, atol=1e-4)


def test_another_model_than_the_announced_one_is_refused_and_not_trained_on() -> None:
    run = run_file()
    prepared = prepare(run)
    asked = plan(prepared)
    victim = asked.clients[0]

    def swap(request: Message, answer: Callable[[], Message]) -> Message:
        if stage_of(request) == "secure_masked" and client_of(request) == victim:
            document = request.content[MODEL][MODEL]
            assert isinstance(document, bytes)
            other = document[:-1] + bytes([document[-1] ^ 1])
            request.content[MODEL] = ConfigRecord({MODEL: other})
        return answer()

    _, secure = federation(run, swap)
    items = list(secure.train(asked))
    (failure,) = (item for item in items if isinstance(item, Failure))
    assert failure.client == victim
    assert "other_model" in failure.reason
    assert victim not in whole(items).participants


def test_a_run_of_sites_with_pinned_keys(tmp_path: Path) -> None:
    run = run_file()
    prepared = prepare(run)
    names = list(prepared.data.names)
    keys = {name: signing.make_key(tmp_path / f"{name}.pem") for name in names}
    peers = {name: signing.public_bytes(key) for name, key in keys.items()}
    pinned = tmp_path / "peers.json"
    pinned.write_text(json.dumps({name: key.hex() for name, key in peers.items()}))
    configs = [
        {"client": name, "identity": str(tmp_path / f"{name}.pem"), "peers": str(pinned)}
        for name in names
    ]
    _, secure = federation(run, configs=configs, peers=peers)
    asked = plan(prepared)
    assert whole(list(secure.train(asked))).participants == names

    # A server with another key in one site's name: every site refuses, before any data are opened.
    stranger = signing.public_bytes(signing.make_key(tmp_path / "stranger.pem"))
    _, forged = federation(run, configs=configs, peers={**peers, names[0]: stranger})
    items = list(forged.train(asked))
    assert not [item for item in items if isinstance(item, Cohort)]
    assert len(items) == CLIENTS
    assert all("of another run, round or model" in f.reason for f in items)  # type: ignore[union-attr]


def keys_forbidden(*_: object) -> None:
    raise AssertionError("a kept set-up needs no new keys")


def test_a_set_up_is_kept_for_the_same_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_file(run={"rounds": 5, "seed": 3}, secure={"keep_setup": True})
    prepared = prepare(run)
    wire: list[tuple[str, int, bytes]] = []

    def listen(request: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        if SECURE in request.content:
            document = reply.content[MODEL][MODEL]
            assert isinstance(document, bytes)
            wire.append((stage_of(request), request.metadata.dst_node_id, document))
        return reply

    grid, secure = federation(run, listen)
    first = whole(list(secure.train(plan(prepared, 1))))
    assert all(set(state) == {"umbel.secure.train"} for state in grid.states.values())
    stages, masked = [stage for stage, _, _ in wire], {n: d for s, n, d in wire if "masked" in s}
    assert stages.count("secure_adverts") == stages.count("secure_shares") == CLIENTS
    wire.clear()
    monkeypatch.setattr("umbel.privacy.secure_aggregation.client.KeyPair", keys_forbidden)
    second = whole(list(secure.train(plan(prepared, 2))))
    assert second.participants == first.participants
    # The first message has the kind that sites count rounds by; and there is one stage less.
    assert [stage for stage, _, _ in wire].count("secure_adverts") == CLIENTS
    assert "secure_shares" not in {stage for stage, _, _ in wire}
    expected = plain(prepared, plan(prepared, 2))
    for name, tensor in expected.delta.items():
        torch.testing.assert_close(second.sums.delta[name], tensor, rtol=0, atol=1e-4)
    # Fresh masks: as good as no word is the same.
    for stage, node, document in wire:
        if stage == "secure_masked":
            assert sum(a == b for a, b in zip(document, masked[node], strict=False)) < 0.3 * len(
                document
            )
    monkeypatch.undo()

    # A node that was started anew has lost it: it costs that round, and the next has new keys.
    grid.states.pop(1001)
    (failure, *_) = (f for f in secure.train(plan(prepared, 3)) if isinstance(f, Failure))
    assert "no_setup" in failure.reason
    wire.clear()
    fewer = plan(prepared, 4)
    assert whole(list(secure.train(fewer))).participants == fewer.clients
    assert {stage for stage, _, _ in wire} >= {"secure_adverts", "secure_shares"}
    # After the last round nothing is left.
    whole(list(secure.train(plan(prepared, 5))))
    assert all(len(state) == 0 for state in grid.states.values())


def test_another_cohort_has_another_set_up() -> None:
    run = run_file(run={"rounds": 9, "seed": 3}, secure={"keep_setup": True})
    prepared = prepare(run)
    grid, secure = federation(run)
    asked = plan(prepared, 1)
    whole(list(secure.train(asked)))
    before = {node: state["umbel.secure.train"]["setup"] for node, state in grid.states.items()}
    there = asked.clients[1:]
    fewer = TrainPlan(2, there, asked.model, len(there), run_id="r")
    assert whole(list(secure.train(fewer))).participants == there
    after = {node: state["umbel.secure.train"]["setup"] for node, state in grid.states.items()}
    assert sum(before[node] != after[node] for node in before) == len(there)


def test_a_set_up_ends_after_so_many_rounds_and_with_its_run() -> None:
    from umbel.client.flower.secure_app import _take_setup
    from umbel.client.secure import Round
    from umbel.privacy.secure_aggregation.parameters import KEPT_ROUNDS

    announced = Round(b"r" * 16, 7, bytes(32))

    def found(run: bytes, used: int, *, fresh: bool) -> bytes | None:
        context = Context(1, 1, {}, RecordDict(), {})
        record = ConfigRecord({"run": run, "setup": b"secret", "used": used})
        context.state["umbel.secure.train"] = record
        setup = _take_setup(context, "train", announced, fresh=fresh)[0]
        assert not context.state, "what was taken, or was another run's, is no longer there"
        return setup

    assert found(b"r" * 16, KEPT_ROUNDS - 2, fresh=True) == b"secret"
    assert found(b"r" * 16, KEPT_ROUNDS - 1, fresh=True) is None
    assert found(b"r" * 16, KEPT_ROUNDS - 1, fresh=False) == b"secret"
    assert found(b"s" * 16, 0, fresh=True) is None


def noisy(kind: str = "distributed-discrete-gaussian") -> RunFile:
    run = run_file(
        privacy={"unit": "client", "mechanism": kind, "noise_multiplier": 0.5},
        strategy={"weights": "uniform"},
        secure={"corrupt_fraction": 0.0},
    )
    return prepare(run).run


def fold(run: RunFile, prepared: Prepared) -> Fold:
    clip = zeroing(run.privacy.clip_norm, list(prepared.model().params), per_layer=False)
    return Fold(run.strategy, 1.0, Parts(clip, frozenset(), 1.0))


@pytest.mark.parametrize("kind", ["distributed-discrete-gaussian", "distributed-skellam"])
def test_noise_of_the_clients_over_messages_is_that_in_process(kind: str) -> None:
    run = noisy(kind)
    prepared = prepare(run)
    asked = replace(plan(prepared), fold=fold(run, prepared))
    replies: list[Message] = []

    def listen(request: Message, answer: Callable[[], Message]) -> Message:
        replies.append(answer())
        return replies[-1]

    _, secure = federation(run, listen)
    found = whole(list(secure.train(asked)))
    inner = sequential(run, prepared.data, prepared.task, prepared.strategy.client)
    expected = whole(list(SecureFederation(inner, run, prepared.strategy).train(asked)))
    assert found.participants == expected.participants == asked.clients
    assert found.training() == {}
    for name, tensor in expected.sums.sums.delta.items():
        assert torch.equal(found.sums.sums.delta[name], tensor)
    assert all(b"loss" not in bytes_of(reply) for reply in replies)


def test_at_sites_noise_is_drawn_by_the_system_and_debited(tmp_path: Path) -> None:
    run = noisy()
    prepared = prepare(run)
    names = list(prepared.data.names)
    keys = {name: signing.make_key(tmp_path / f"{name}.pem") for name in names}
    peers = {name: signing.public_bytes(key) for name, key in keys.items()}
    pinned = tmp_path / "peers.json"
    pinned.write_text(json.dumps({name: key.hex() for name, key in peers.items()}))
    configs = [
        {
            "client": name,
            "identity": str(tmp_path / f"{name}.pem"),
            "peers": str(pinned),
            "ledger": str(tmp_path / name),
        }
        for name in names
    ]
    asked = replace(plan(prepared), fold=fold(run, prepared))
    _, secure = federation(run, configs=configs, peers=peers)
    one, two = (whole(list(secure.train(asked))).sums.sums.delta for _ in range(2))
    assert not any(torch.equal(one[name], two[name]) for name in one)
    (ledger,) = read(tmp_path / names[0])
    assert [line["round"] for line in ledger["lines"]] == [1, 1]
    assert ledger["lines"][0]["mechanism"]["rho"] == pytest.approx(2.0)
    assert "noise of" in ledger["lines"][0]["mechanism"]["name"]


def test_a_hostile_server_gets_no_vector_under_weaker_terms() -> None:
    """Residues in a run without noise would wrap around unseen; a larger cohort than the noise is
    sized for may have more corrupt members."""
    plainly, run = run_file(), noisy()
    for mine, modular in ((plainly, True), (run, False)):
        prepared = prepare(mine)
        _, secure = federation(mine)
        asked = replace(plan(prepared), fold=fold(run, prepared) if mine is run else None)
        honest = secure._carry_out

        def switched(
            purpose: str,
            given: Any,
            groups: Any,
            shape: Any,
            document: bytes,
            honest: Any = honest,
            modular: bool = modular,
        ) -> Any:
            other = shape._replace(modular=modular, value_bits=32 if modular else 29)
            return honest(purpose, given, groups, other, document)

        secure._carry_out = switched  # type: ignore[method-assign]
        items = list(secure.train(asked))
        assert len(items) == CLIENTS
        # Its own terms are others, so that no message of the round is one to it.
        assert all("another run, round or model" in f.reason for f in items)  # type: ignore[union-attr]

    def shrink(request: Message, answer: Callable[[], Message]) -> Message:
        if SECURE in request.content:
            manifest = json.loads(str(request.content[MANIFEST][MANIFEST]))
            manifest["run"]["strategy"]["cohort"] = CLIENTS - 1
            request.content[MANIFEST] = ConfigRecord({MANIFEST: json.dumps(manifest)})
        return answer()

    smaller = run.model_copy(update={"strategy": run.strategy.model_copy(update={"cohort": 3})})
    _, secure = federation(run, shrink)
    secure._tables = write_run(smaller)
    prepared = prepare(run)
    items = list(secure.train(replace(plan(prepared), fold=fold(run, prepared))))
    assert len(items) == CLIENTS
    assert all("noise and ring are for 3" in item.reason for item in items)  # type: ignore[union-attr]


def test_masks_are_never_skipped_at_sites() -> None:
    with pytest.raises(InputError, match="accounting_only masks nothing"):
        federation(run_file(secure={"accounting_only": True}))
    with pytest.raises(InputError, match="share of all examples"):
        federation(run_file(strategy={"name": "scaffold"}))
    unseen = {"unit": "client", "noise_multiplier": 1.0}
    with pytest.raises(InputError, match="distributed-discrete-gaussian"):
        federation(run_file(privacy=unseen))
    with pytest.raises(InputError, match="no pinned identity key"):
        federation(run_file(), peers={})


def test_stages_of_a_run_without_masks_are_refused() -> None:
    run = run_file()
    tables = run.model_dump(mode="json")
    tables["secure_aggregation"]["enabled"] = False

    def switch_off(request: Message, answer: Callable[[], Message]) -> Message:
        if SECURE in request.content:
            manifest = json.loads(str(request.content[MANIFEST][MANIFEST]))
            manifest["run"]["secure_aggregation"]["enabled"] = False
            request.content[MANIFEST] = ConfigRecord({MANIFEST: json.dumps(manifest)})
        return answer()

    _, secure = federation(run, switch_off)
    items = list(secure.train(plan(prepare(run))))
    assert all(isinstance(item, Failure) for item in items)
    assert all("cannot take part" in item.reason for item in items)  # type: ignore[union-attr]
