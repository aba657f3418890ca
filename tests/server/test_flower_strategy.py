"""Each defect of Flower's own strategies that was measured is a case here."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from helpers.local_grid import LocalGrid

import umbel
from umbel.core.errors import InputError
from umbel.strategies.fedadam import fedadam
from umbel.strategies.fedavg import fedavg
from umbel.strategies.fedavgm import fedavgm
from umbel.strategies.fedprox import fedprox
from umbel.strategies.parts import ClientRule
from umbel.strategies.parts.rule import clip_gradient

ROOT = Path(__file__).parents[2]


Arrays = dict[str, Any]


def start() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(2, 3), "b": torch.ones(3)}


def client(steps: dict[int, float]) -> ClientApp:
    """Node -> what it adds to every floating-point tensor; 10 examples each."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content["arrays"]
        assert isinstance(record, ArrayRecord)
        arrays = umbel.from_arrays(record)
        step = steps[context.node_id]
        moved = {n: t + step if t.is_floating_point() else t for n, t in arrays.items()}
        metrics = MetricRecord({"num-examples": 10, "loss": step})
        content = RecordDict({"arrays": umbel.to_arrays(moved), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 10, "accuracy": steps[context.node_id] / 10})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def grid(steps: dict[int, float], spoil: Callable[[Message], Message] | None = None) -> Any:
    """Nodes with these steps; ``spoil`` makes the reply of node 1000."""

    def tamper(request: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        return spoil(reply) if spoil and request.metadata.dst_node_id == 1000 else reply

    return LocalGrid(client(steps), [{} for _ in steps], tamper)


def reply(request: Message, arrays: Any, **metrics: Any) -> Message:
    records: dict[str, Any] = {"metrics": MetricRecord(metrics)}
    if arrays is not None:
        records["arrays"] = ArrayRecord(arrays)
    made = Message(RecordDict(records), reply_to=request)
    # A reply to the reply would go back to the node: name the node that it comes from.
    made.metadata.__dict__["_src_node_id"] = request.metadata.src_node_id
    made.metadata.__dict__["_reply_to_message_id"] = request.metadata.reply_to_message_id
    return made


def train(strategy: Any, where: Any, tensors: Any = None, number: int = 1) -> Any:
    arrays = umbel.to_arrays(tensors or start())
    requests = strategy.configure_train(number, arrays, ConfigRecord(), where)
    return strategy.aggregate_train(number, where.send_and_receive(requests))


FULL: Arrays = {"w": torch.ones(2, 3), "b": torch.ones(3)}
NAN = {**FULL, "w": torch.full((2, 3), torch.nan)}
BROADCAST = {**FULL, "b": torch.ones(1)}
SPOILED: dict[str, tuple[Callable[[Message], Message], str]] = {
    "a NaN": (lambda m: reply(m, NAN, **{"num-examples": 10}), "NaN or infinite"),
    "examples below zero": (lambda m: reply(m, FULL, **{"num-examples": -5}), "is not positive"),
    "no examples": (lambda m: reply(m, FULL, loss=1.0), "sent no single num-examples"),
    "a list of examples": (
        lambda m: reply(m, FULL, **{"num-examples": [1, 2]}),
        "sent no single num-examples",
    ),
    "NaN examples": (
        lambda m: reply(m, FULL, **{"num-examples": float("nan")}),
        "is not finite",
    ),
    "a shape that would broadcast": (
        lambda m: reply(m, BROADCAST, **{"num-examples": 10}),
        "'b' has shape (1,), expected (3,)",
    ),
    "a wrong shape": (
        lambda m: reply(m, {**FULL, "w": torch.ones(3, 2)}, **{"num-examples": 10}),
        "'w' has shape (3, 2), expected (2, 3)",
    ),
    "a wrong dtype": (
        lambda m: reply(m, {**FULL, "w": torch.ones(2, 3).double()}, **{"num-examples": 10}),
        "'w' is float64, expected float32",
    ),
    "a missing array": (
        lambda m: reply(m, {"w": torch.ones(2, 3)}, **{"num-examples": 10}),
        "lacks 'b'",
    ),
    "an unknown array": (
        lambda m: reply(m, {**FULL, "z": torch.ones(1)}, **{"num-examples": 10}),
        "unknown 'z'",
    ),
    "no arrays": (lambda m: reply(m, None, **{"num-examples": 10}), "sent 0 ArrayRecords"),
    "damaged arrays": (
        lambda m: reply(
            m,
            {"w": Array("float32", (2, 3), "numpy.ndarray", b"x"), "b": Array(FULL["b"].numpy())},
            **{"num-examples": 10},
        ),
        "sent arrays that cannot be read",
    ),
    "an exception's text": (
        lambda m: _error(m, "/data/patients/anna.csv"),
        "crashed in Umbel's client app",
    ),
}


def _error(message: Message, text: str) -> Message:
    made = Message(Error(2, text), reply_to=message)
    made.metadata.__dict__["_src_node_id"] = message.metadata.src_node_id
    return made


@pytest.mark.parametrize("case", SPOILED)
def test_one_bad_reply_neither_kills_nor_poisons_the_round(case: str) -> None:
    spoil, reason = SPOILED[case]
    strategy = umbel.as_flower(fedavg())
    arrays, metrics = train(strategy, grid({1000: 9.0, 1001: 1.0, 1002: 3.0}, spoil))
    found = umbel.from_arrays(arrays)
    torch.testing.assert_close(found["w"], torch.full((2, 3), 2.0))
    torch.testing.assert_close(found["b"], torch.full((3,), 3.0))
    assert metrics["loss"] == pytest.approx(2.0)
    [(number, failure)] = strategy.failures
    assert (number, failure.client) == (1, "1000")
    assert reason in failure.reason
    assert "anna" not in failure.reason


@pytest.mark.parametrize("others", [1, 2])
def test_an_absurd_number_of_examples_does_not_take_the_mean_over(others: int) -> None:
    claim = {"num-examples": 10**12}
    spoil = lambda m: reply(m, {n: t + 11.0 for n, t in start().items()}, **claim)  # noqa: E731
    nodes = {1000: 0.0} | {1001 + i: 0.0 for i in range(others)}
    found = umbel.from_arrays(train(umbel.as_flower(fedavg()), grid(nodes, spoil))[0])
    # Ten times the lower median of 10 is 100: 100 of 110, or 100 of 120.
    expected = 11.0 * 100 / (100 + 10 * others)
    torch.testing.assert_close(found["w"], torch.full((2, 3), expected))
    strict = umbel.as_flower(fedavg(), max_weight=10)
    found = umbel.from_arrays(train(strict, grid(nodes, spoil))[0])
    torch.testing.assert_close(found["w"], torch.full((2, 3), 11.0 / (1 + others)))


def test_an_extra_metric_is_averaged_over_those_that_report_it() -> None:
    extra = {"num-examples": 10, "loss": 9.0, "auc": 0.5, "curve": [0.1, 0.2]}
    where = grid({1000: 1.0, 1001: 1.0}, lambda m: reply(m, FULL | {"b": FULL["b"] + 1}, **extra))
    arrays, metrics = train(umbel.as_flower(fedavg()), where)
    torch.testing.assert_close(umbel.from_arrays(arrays)["w"], torch.ones(2, 3))
    assert dict(metrics) == {"loss": pytest.approx(5.0), "auc": pytest.approx(0.5)}


def test_nobody_valid_leaves_the_model() -> None:
    strategy = umbel.as_flower(fedavg(), min_nodes=1)
    assert train(strategy, grid({1000: 1.0}, SPOILED["a NaN"][0])) == (None, None)


def test_dtypes_come_back_as_they_went() -> None:
    tensors = {
        "w": torch.zeros(2, dtype=torch.bfloat16),
        "steps": torch.tensor(41),
        "h": torch.zeros(2, dtype=torch.float16),
    }
    app = ClientApp()

    @app.train()
    def train_(message: Message, context: Context) -> Message:
        record = message.content["arrays"]
        assert isinstance(record, ArrayRecord)
        arrays = umbel.from_arrays(record)
        moved = {n: t + (1 if context.node_id == 1000 else 2) for n, t in arrays.items()}
        metrics = MetricRecord({"num-examples": 1})
        return Message(
            RecordDict({"arrays": umbel.to_arrays(moved), "metrics": metrics}), reply_to=message
        )

    where = LocalGrid(app, [{}, {}, {}])
    arrays, _ = train(umbel.as_flower(fedavg()), where, tensors)
    found = umbel.from_arrays(arrays)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in tensors.items()}
    assert found["steps"].item() == 43  # 41 + 5/3, to the nearest
    torch.testing.assert_close(found["w"], torch.full((2,), 5 / 3, dtype=torch.bfloat16))


def test_flowers_own_records_are_read() -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    found = umbel.from_arrays(ArrayRecord(state))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor)


def test_an_adaptive_step_leaves_running_statistics_alone() -> None:
    tensors = {"w": torch.zeros(3), "bn.running_var": torch.ones(3)}
    strategy = umbel.as_flower(fedadam(server_lr=1.0, tau=1e-8))
    found = umbel.from_arrays(train(strategy, grid({1000: -0.5, 1001: -0.5}), tensors)[0])
    torch.testing.assert_close(found["bn.running_var"], torch.full((3,), 0.5))  # the mean
    # With no bias correction, m = 0.1 d and v = 0.01 d^2: a step of one server_lr.
    torch.testing.assert_close(found["w"], torch.full((3,), -1.0), atol=1e-5, rtol=0)


def test_the_state_is_kept_between_rounds() -> None:
    strategy = umbel.as_flower(fedavgm(momentum=0.5))
    where = grid({1000: 1.0, 1001: 1.0})
    first = umbel.from_arrays(train(strategy, where)[0])
    second = umbel.from_arrays(train(strategy, where, first, 2)[0])
    torch.testing.assert_close(second["w"] - first["w"], torch.full((2, 3), 1.5))


def test_sampling_is_a_function_of_seed_and_round() -> None:
    where = grid({1000 + i: 0.0 for i in range(20)})
    before = random.getstate()

    def cohorts(seed: int) -> list[list[int]]:
        strategy = umbel.as_flower(fedavg(), cohort=5, seed=seed)
        arrays = umbel.to_arrays(start())
        rounds = [strategy.configure_train(r, arrays, ConfigRecord(), where) for r in (1, 2, 3)]
        return [[m.metadata.dst_node_id for m in messages] for messages in rounds]

    assert cohorts(1) == cohorts(1)
    assert cohorts(1) != cohorts(2)
    assert len({tuple(c) for c in cohorts(1)}) == 3
    assert all(len(set(c)) == 5 for c in cohorts(1))
    assert random.getstate() == before


def test_fedprox_sends_mu_as_flowers_does() -> None:
    strategy = umbel.as_flower(fedprox(mu=0.25))
    where = grid({1000: 0.0, 1001: 0.0})
    [message, _] = strategy.configure_train(7, umbel.to_arrays(start()), ConfigRecord(), where)
    assert dict(message.content["config"]) == {"proximal-mu": 0.25, "server-round": 7}


def test_what_a_plain_client_does_not_do_is_refused() -> None:
    clipped = fedavg()._replace(client=ClientRule(grad_transforms=(clip_gradient(1.0),)))
    with pytest.raises(InputError, match="a plain ClientApp does not"):
        umbel.as_flower(clipped)


def test_an_impossible_cohort_is_refused() -> None:
    with pytest.raises(InputError, match="cohort"):
        umbel.as_flower(fedavg(), cohort=0)


def test_evaluation_is_a_mean_over_examples_and_survives_bad_replies() -> None:
    spoil = lambda m: reply(m, None, **{"num-examples": -3, "accuracy": 9.0})  # noqa: E731
    where = grid({1000: 0.0, 1001: 4.0, 1002: 8.0}, spoil)
    strategy = umbel.as_flower(fedavg())
    requests = strategy.configure_evaluate(1, umbel.to_arrays(start()), ConfigRecord(), where)
    found = strategy.aggregate_evaluate(1, where.send_and_receive(requests))
    assert found is not None
    assert dict(found) == {"accuracy": pytest.approx(0.6)}
    assert strategy.failures[0][1].reason == "evaluation: num-examples is -3"


def test_it_agrees_with_flowers_own_fedavg_where_nothing_is_wrong() -> None:
    where = grid({1000: 1.0, 1001: 2.0, 1002: 6.0})
    ours, theirs = train(umbel.as_flower(fedavg()), where), train(FedAvg(), where)
    for name, tensor in umbel.from_arrays(theirs[0]).items():
        torch.testing.assert_close(umbel.from_arrays(ours[0])[name], tensor)
    assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"])


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = ROOT / "examples" / "flower_app"
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [n for n in sys.modules if n.partition(".")[0] == "flower_app"]:
        del sys.modules[name]


def test_the_example_learns(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib
    import tomllib

    flower = tomllib.loads((example / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    apps = {}
    for part, reference in flower["components"].items():
        module, _, name = reference.partition(":")
        apps[part] = getattr(importlib.import_module(module), name)
    nodes = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
    where = LocalGrid(apps["clientapp"], nodes, run_config=flower["config"])
    torch.manual_seed(0)
    apps["serverapp"](where, Context(1, 1, {}, RecordDict(), flower["config"]))
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("accuracy after round 5: ")
    assert float(line.split()[-1]) > 0.8
