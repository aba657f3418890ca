"""Secure aggregation over messages: the same model, and nothing else on the wire or left behind."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message

from umbel.client.flower.app import app as client_app
from umbel.core import signing
from umbel.core.errors import InputError
from umbel.core.messages import MANIFEST, MODEL, SECURE
from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, TrainPlan, Updates
from umbel.core.run_file import RunFile, resolve
from umbel.privacy.secure_aggregation.terms import TERMS_BYTES
from umbel.server.flower.grid import GridFederation
from umbel.server.flower.secure_grid import SecureGrid
from umbel.server.rounds import Cohort
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import Prepared, prepare


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LocalGrid = _load("local_grid").LocalGrid
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
            "run": {"rounds": 2, "seed": 3},
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


def test_masks_are_never_skipped_at_sites() -> None:
    with pytest.raises(InputError, match="accounting_only masks nothing"):
        federation(run_file(secure={"accounting_only": True}))
    with pytest.raises(InputError, match="share of all examples"):
        federation(run_file(strategy={"name": "scaffold"}))
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
