from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from helpers.local_grid import LocalGrid

from umbel.client.flower.app import app as client_app
from umbel.core import messages
from umbel.core.errors import NotNowError, RunError
from umbel.core.messages import MANIFEST, MODEL, NOT_NOW, TRAIN, Problem
from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, TrainPlan, Updates, pack
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model
from umbel.server.flower.app import app as server_app
from umbel.server.flower.grid import GridFederation
from umbel.server.store import RunStore
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import Prepared, prepare
from umbel.simulations.simulate import simulate

CLIENTS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_file(**tables: dict[str, Any]) -> RunFile:
    return resolve(
        {
            "run": {"rounds": 2, "seed": 3, **tables.pop("run", {})},
            "data": {
                "name": "breast-cancer",
                "split": {"kind": "iid", "clients": CLIENTS},
                "holdout": 0.0,
                "client_holdout": 0.25,
                **tables.pop("data", {}),
            },
            "task": {"kind": "classification", "model": "logistic"} | tables.pop("task", {}),
            "client": {"lr": 0.05, "local_steps": 3, "device": "cpu"},
            **tables,
        }
    )


def partitions() -> list[dict[str, int]]:
    return [{"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)]


def plan(prepared: Prepared, deadline: float | None = None, number: int = 1) -> TrainPlan:
    names = prepared.data.names
    return TrainPlan(number, list(names), prepared.model(), len(names), deadline)


def by_client(items: Iterator[Updates | Failure]) -> dict[str, Updates | Failure]:
    found: dict[str, Updates | Failure] = {}
    for item in items:
        name = item.client if isinstance(item, Failure) else item.clients[0]
        assert name not in found
        found[name] = item
    return found


def trained(message: Message) -> bool:
    return message.metadata.message_type == TRAIN


def to_client(message: Message) -> str:
    return str(json.loads(str(message.content[MANIFEST][MANIFEST]))["client"])


def reply_with(request: Message, manifest: object, document: object = b"") -> Message:
    content: dict[str, Any] = {}
    if manifest is not None:
        content[MANIFEST] = ConfigRecord({MANIFEST: manifest})  # type: ignore[dict-item]
    if document is not None:
        content[MODEL] = ConfigRecord({MODEL: document})  # type: ignore[dict-item]
    return Message(RecordDict(content), reply_to=request)


def test_deltas_are_those_of_the_sequential_engine() -> None:
    run = run_file()
    prepared = prepare(run)
    grid = LocalGrid(client_app, partitions())
    federation = GridFederation(grid, run, sites=CLIENTS)
    twin = sequential(run, prepared.data, prepared.task, prepared.strategy.client)
    assert list(federation.clients()) == list(twin.clients())
    assert list(federation.examples()) == list(twin.examples())
    assert federation.info == prepared.data.info
    left, right = by_client(federation.train(plan(prepared))), by_client(twin.train(plan(prepared)))
    assert left.keys() == right.keys()
    for client, expected in right.items():
        found = left[client]
        assert isinstance(found, Updates)
        assert isinstance(expected, Updates)
        assert found.delta.keys() == expected.delta.keys()
        for name, delta in expected.delta.items():
            torch.testing.assert_close(found.delta[name], delta)
        assert found.weights.tolist() == expected.weights.tolist()
        assert found.metrics.keys() == expected.metrics.keys()
        for name, values in expected.metrics.items():
            torch.testing.assert_close(found.metrics[name], values)
    question = EvaluatePlan(1, federation.clients(), prepared.model())
    scores = sorted(federation.evaluate(question), key=lambda e: e.client)
    for score, wanted in zip(scores, twin.evaluate(question), strict=True):
        assert isinstance(score, Evaluation)
        assert isinstance(wanted, Evaluation)
        assert (score.client, score.examples) == (wanted.client, wanted.examples)
        assert score.metrics == pytest.approx(wanted.metrics)


def test_one_document_of_the_model_serves_all_clients() -> None:
    run = run_file()
    grid = LocalGrid(client_app, partitions())
    federation = GridFederation(grid, run, sites=CLIENTS)
    list(federation.train(plan(prepare(run))))
    sent = [m.content[MODEL].object_id for m in grid.pushed if trained(m)]
    assert len(sent) == CLIENTS
    assert len(set(sent)) == 1


def test_who_does_not_answer_in_time_is_named_and_its_late_reply_is_never_read() -> None:
    run = run_file()
    prepared = prepare(run)
    grid = LocalGrid(client_app, partitions())
    federation = GridFederation(grid, run, sites=CLIENTS)
    late = "c1"
    grid.delay = {1001: 4.0}
    found = by_client(federation.train(plan(prepared, deadline=2.0)))
    assert found[late] == Failure(late, "no reply within 2 s")
    assert [type(found[c]) for c in ("c0", "c2")] == [Updates, Updates]
    assert all(m.metadata.ttl == 2.0 for m in grid.pushed if trained(m))
    time.sleep(2.1)  # now it is there
    grid.delay = {}
    again = by_client(federation.train(plan(prepared, deadline=60.0, number=2)))
    assert {u.round for u in again.values() if isinstance(u, Updates)} == {2}
    assert len(again) == CLIENTS


def test_a_round_waits_where_all_are_lost_and_for_those_who_come_back_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("umbel.server.flower.grid.SLOWEST_POLL", 0.01)
    run = run_file()
    grid = LocalGrid(client_app, partitions())
    federation = GridFederation(grid, run, sites=CLIENTS)
    everybody = list(grid.nodes)
    online = iter([[], [], everybody[:1], everybody])
    monkeypatch.setattr(grid, "get_node_ids", lambda: next(online))
    found = by_client(federation.train(plan(prepare(run))))
    assert next(online, None) is None
    assert len(found) == CLIENTS
    assert all(isinstance(one, Updates) for one in found.values())


def test_a_round_goes_on_without_those_who_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_file()
    grid = LocalGrid(client_app, partitions())
    federation = GridFederation(grid, run, sites=CLIENTS)
    monkeypatch.setattr(grid, "get_node_ids", lambda: list(grid.nodes)[:1])
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    federation._somebody()


def test_replies_are_yielded_as_they_come() -> None:
    run = run_file()
    grid = LocalGrid(client_app, partitions())
    federation = GridFederation(grid, run, sites=CLIENTS)
    grid.delay = {1000: 0.6}
    order = [u.clients[0] for u in federation.train(plan(prepare(run))) if isinstance(u, Updates)]
    assert order[-1] == "c0"
    assert set(order) == {"c0", "c1", "c2"}


def answer_text(**changes: Any) -> str:
    table = {"client": "c1", "round": 1, "examples": 10.0, "metrics": {}} | changes
    return json.dumps(table)


BAD = "sent a malformed reply"
MALFORMED = {
    "no records": (None, None, BAD),
    "no tensors": (answer_text(), None, BAD),
    "tensors are text": (answer_text(), "abc", BAD),
    "not JSON": ("{", b"", BAD),
    "JSON of another kind": ("[1]", b"", BAD),
    "nested beyond reason": ("[" * 100_000, b"", BAD),
    "manifest is a number": (7, b"", BAD),
    "no examples": (json.dumps({"client": "c1", "round": 1, "metrics": {}}), b"", BAD),
    "examples are text": (answer_text(examples="many"), b"", BAD),
    "examples are NaN": (answer_text(examples=float("nan")), b"", BAD),
    "a metric is infinite": (answer_text(metrics={"loss": float("inf")}), b"", BAD),
    "unknown key": (answer_text(secret=1), b"", BAD),
    "unknown problem": (json.dumps({"error": "boo", "exception": "E"}), b"", BAD),
    "a problem that talks": (
        json.dumps({"error": "data", "exception": "no file /data/anna.csv"}),
        b"",
        BAD,
    ),
    "another client's name": (
        answer_text(client="c2"),
        b"",
        "answered under another client's name",
    ),
    "another round": (answer_text(round=9), b"", "answered round 9"),
    "not safetensors": (answer_text(), b"123", "sent tensors that are not a safetensors document"),
    "too large": (answer_text(), bytes(3 << 20), "sent 3145728 bytes, at most 1048"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_reply_is_a_failure_of_that_client_alone(case: str) -> None:
    manifest, document, reason = MALFORMED[case]
    run = run_file()
    prepared = prepare(run)

    def tamper(request: Message, answer: Callable[[], Message]) -> Message:
        if trained(request) and to_client(request) == "c1":
            return reply_with(request, manifest, document)
        return answer()

    federation = GridFederation(LocalGrid(client_app, partitions(), tamper), run, sites=CLIENTS)
    found = by_client(federation.train(plan(prepared, deadline=60.0)))
    spoiled = found["c1"]
    assert isinstance(spoiled, Failure)
    assert spoiled.reason.startswith(reason)
    assert isinstance(found["c0"], Updates)
    assert isinstance(found["c2"], Updates)


def test_what_is_well_formed_and_absurd_is_left_for_the_gate() -> None:
    run = run_file(run={"rounds": 1})
    prepared = prepare(run)
    model = prepared.model()
    nan = pack({n: torch.full_like(t, torch.nan) for n, t in model.tensors().items()})

    def tamper(request: Message, answer: Callable[[], Message]) -> Message:
        if trained(request) and to_client(request) == "c1":
            return reply_with(request, answer_text(metrics={"loss": None}), nan)
        return answer()

    federation = GridFederation(LocalGrid(client_app, partitions(), tamper), run, sites=CLIENTS)
    update = by_client(federation.train(plan(prepared)))["c1"]
    assert isinstance(update, Updates)
    assert update.metrics["loss"].isnan().all()


def test_flowers_errors_are_named_and_their_text_is_not_passed_on() -> None:
    run = run_file()
    secret = "FileNotFoundError: /data/patients/anna.csv"

    def tamper(request: Message, answer: Callable[[], Message]) -> Message:
        if trained(request):
            code = {"c0": 2, "c1": 5, "c2": 99}[to_client(request)]
            return Message(Error(code, secret), reply_to=request)
        return answer()

    federation = GridFederation(LocalGrid(client_app, partitions(), tamper), run, sites=CLIENTS)
    found = by_client(federation.train(plan(prepare(run))))
    reasons = {c: f.reason for c, f in found.items() if isinstance(f, Failure)}
    assert reasons == {
        "c0": "crashed in Umbel's client app",
        "c1": "is not connected",
        "c2": "failed in Flower's runtime",
    }


def test_an_exception_at_a_site_stays_there(caplog: pytest.LogCaptureFixture) -> None:
    secret = "/data/patients/anna.npz"
    run = run_file(data={"name": "npz", "path": "elsewhere.npz"})
    grid = LocalGrid(client_app, [{"client": "a", "data": secret}])
    with (
        caplog.at_level(logging.ERROR, "umbel.client"),
        pytest.raises(RunError, match=r"cannot read its data \(InputError\)") as caught,
    ):
        GridFederation(grid, run, sites=1, wait=5.0)
    assert "anna" not in str(caught.value)
    assert "anna" in caplog.text
    for reply in (grid.answer(m) for m in grid.pushed):
        assert "anna" not in str(reply)


def test_a_site_never_opens_a_path_that_the_server_names(tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "d.npz", x=np.zeros((9, 3)), y=np.arange(9) % 2)
    split = {"kind": "iid", "clients": 3}  # of a simulation
    run = run_file(data={"name": "npz", "path": str(tmp_path / "d.npz"), "split": split})
    own = LocalGrid(client_app, [{"client": "a", "data": str(tmp_path / "d.npz")}])
    assert GridFederation(own, run, sites=1).clients() == ["a"]
    with pytest.raises(RunError, match="cannot read its data"):
        GridFederation(LocalGrid(client_app, [{"client": "a"}]), run, sites=1)


def test_a_site_runs_no_code_that_the_server_names(tmp_path: Path) -> None:
    import numpy as np

    data, told = tmp_path / "d.npz", tmp_path / "executed"
    np.savez(data, x=np.zeros((9, 3)), y=np.arange(9) % 2)
    hostile = {"name": "subprocess:call", "args": ["touch", str(told)]}
    run = run_file(data={"name": "npz"}, task={"kind": "classification", "model": hostile})
    site = {"client": "a", "data": str(data)}
    problem = r"does not allow what the run asks for \(InputError\)"
    with pytest.raises(RunError, match=problem):
        GridFederation(LocalGrid(client_app, [site]), run, sites=1)
    assert not told.exists()
    allowed = run_file(
        data={"name": "npz"},
        task={"kind": "classification", "model": "umbel.tasks.models.logistic:logistic"},
    )
    with pytest.raises(RunError, match=problem):
        GridFederation(LocalGrid(client_app, [site]), allowed, sites=1)
    site["allow"] = "umbel.tasks.models.logistic:logistic other:thing"
    assert GridFederation(LocalGrid(client_app, [site]), allowed, sites=1).clients() == ["a"]


def test_a_model_that_is_not_the_tasks_is_refused_by_the_client() -> None:
    run = run_file()
    prepared = prepare(run)
    federation = GridFederation(LocalGrid(client_app, partitions()), run, sites=CLIENTS)
    params = {name: t[..., :-1] for name, t in prepared.model().params.items() if t.ndim > 1}
    wrong = TrainPlan(1, ["c0"], Model(params, {}), 1)
    failure = next(federation.train(wrong))
    assert isinstance(failure, Failure)
    assert failure.reason.startswith(messages.PROBLEMS["model"])


def test_a_frozen_base_that_is_not_the_servers_is_refused_by_the_client(tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    pairs = {"name": "synthetic-preferences", "clients": 2, "pairs": 4, "test_pairs": 2}
    tables: dict[str, Any] = {
        "data": {**pairs, "symbols": 4, "prompt": 1, "length": 2},
        "task": {"kind": "dpo", "model": {"name": "gpt", "layers": 1, "width": 4, "heads": 1}},
        "client": {"local_steps": 1, "device": "cpu"},
    }
    module = prepare(resolve(tables)).module
    tensors = {n: t.clone() for n, t in module.state_dict().items() if n.startswith("policy.")}
    file.write_bytes(pack(tensors))
    tables["task"]["init_from"] = str(file)
    run = resolve(tables)
    prepared = prepare(run)
    grid = LocalGrid(client_app, [{"partition-id": i, "num-partitions": 2} for i in range(2)])
    federation = GridFederation(grid, run, sites=2)
    assert all(isinstance(u, Updates) for u in federation.train(plan(prepared)))
    file.write_bytes(pack({n: t + 1 for n, t in tensors.items()}))
    client_folder = importlib.import_module("umbel.client.flower.app")
    client_folder._build.cache_clear()  # another process, which reads the file anew
    failure = next(federation.train(plan(prepared, number=2)))
    assert isinstance(failure, Failure)
    assert failure.reason.startswith(messages.PROBLEMS["model"])


def test_a_node_that_is_asked_in_anothers_name_refuses() -> None:
    run = run_file()
    grid = LocalGrid(client_app, partitions())
    federation = GridFederation(grid, run, sites=CLIENTS)
    grid.nodes[1000], grid.nodes[1001] = grid.nodes[1001], grid.nodes[1000]
    found = by_client(federation.train(plan(prepare(run))))
    problem = messages.PROBLEMS["client"]
    assert {c for c, f in found.items() if isinstance(f, Failure) and problem in f.reason} == {
        "c0",
        "c1",
    }


def test_two_nodes_of_one_name_are_an_error() -> None:
    nodes = [{"partition-id": 0}, {"partition-id": 0}]
    with pytest.raises(RunError, match="two nodes say that they are client 'c0'"):
        GridFederation(LocalGrid(client_app, nodes), run_file(), sites=2)


def test_too_few_nodes_are_an_error_that_names_who_is_there() -> None:
    grid = LocalGrid(client_app, partitions())
    with pytest.raises(RunError, match=r"3 of 4 clients are ready after at most 0\.5 s: 'c0'"):
        GridFederation(grid, run_file(), sites=4, wait=0.5)


@pytest.mark.parametrize(("why", "kind"), [(NOT_NOW, NotNowError), ("tasks", RunError)])
def test_what_is_only_a_matter_of_hours_is_told_from_what_is_not(why: str, kind: type) -> None:
    def tamper(request: Message, answer: Callable[[], Message]) -> Message:
        reply, node = answer(), request.metadata.dst_node_id
        if node > 1000:
            rule = "hours" if node == 1001 or why == NOT_NOW else why
            refusal = messages.write_reply(Problem(error="policy", exception=rule))
            reply.content[MANIFEST] = ConfigRecord({MANIFEST: refusal})
        return reply

    with pytest.raises(RunError, match=r"1 of 3 clients .*\(hours\)") as found:
        GridFederation(LocalGrid(client_app, partitions(), tamper), run_file(), sites=CLIENTS)
    assert type(found.value) is kind


def test_clients_that_describe_their_data_differently_are_an_error(tmp_path: Path) -> None:
    import numpy as np

    nodes = []
    for name, width in (("a", 3), ("b", 4)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "d.npz", x=np.zeros((9, width)), y=np.arange(9) % 2)
        nodes.append({"client": name, "data": str(tmp_path / name)})
    run = run_file(data={"name": "npz", "split": {"kind": "iid", "clients": 1}})
    with pytest.raises(RunError, match="'a' and 'b' hold different data: input_shape"):
        GridFederation(LocalGrid(client_app, nodes), run, sites=2)


def test_buffers_travel_as_parameters_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "umbel_test_batchnorm.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Linear(30, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = run_file(task={"model": "umbel_test_batchnorm:net"})
    prepared = prepare(run)
    federation = GridFederation(LocalGrid(client_app, partitions()), run, sites=CLIENTS)
    update = by_client(federation.train(plan(prepared)))["c0"]
    assert isinstance(update, Updates)
    assert update.delta["1.num_batches_tracked"].tolist() == [3]
    assert update.delta["1.num_batches_tracked"].dtype is torch.int64
    assert update.delta["1.running_mean"].abs().sum() > 0


def test_the_server_app_makes_the_model_of_the_simulation_and_resumes(tmp_path: Path) -> None:
    def serve(rounds: int, store: str, resume: str = "") -> str:
        run = run_file(run={"rounds": rounds, "store": str(tmp_path / store)})
        config: dict[str, Any] = {
            "run": run.model_dump_json(),
            "sites": CLIENTS,
            "wait": 10,
            "resume": resume,
        }
        server_app(LocalGrid(client_app, partitions()), Context(1, 1, {}, RecordDict(), config))
        entry = RunStore(tmp_path / store).list()[0]
        assert entry.status == "finished"
        return entry.run_id

    store = RunStore(tmp_path / "deployed")
    first = serve(1, "deployed")
    assert serve(3, "deployed", resume=first) == first
    run = run_file(run={"rounds": 3, "store": str(tmp_path / "simulated")})
    simulated = simulate(run, engine="sequential")
    twin = RunStore(tmp_path / "simulated").latest(simulated.run_id)
    own = store.latest(first)
    assert own is not None
    assert twin is not None
    for name, tensor in twin.model.tensors().items():
        torch.testing.assert_close(own.model.tensors()[name], tensor)
    assert store.history(first)[-1].metrics == pytest.approx(simulated.metrics)
    assert len(store.history(first)) == 3
