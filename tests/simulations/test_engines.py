"""The vectorised engine is a drop-in for the sequential one."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from umbel.core.errors import InputError
from umbel.core.payloads import EvaluatePlan, Failure, TrainPlan, Updates
from umbel.core.run_file import resolve
from umbel.core.trees import add_cast, map_tree, norm, subtract
from umbel.datasets.federated import FederatedData, Holdings, Info, Numbered
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.engines.vectorised import vectorised
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule
from umbel.strategies.parts.rule import proximal
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.task import Task

SIZES = [7, 3, 12, 5, 1, 9, 4]


def losses(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model, batch):
    return {"accuracy": (model(batch["x"]).argmax(-1) == batch["y"]).float()}


def logistic():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Sequential(
            nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(functional.relu(x + self.body(x)).mean((2, 3)))


class Words(nn.Module):
    """Reads integers; holds a frozen layer and a constant buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 3)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return self.head(torch.tanh(self.frozen(self.embedding(x))).mean(1) * self.scale)


def federated(sizes=SIZES, words=False):
    """Clients of these sizes, who hold scattered rows; every second has a test part."""
    draw = np.random.default_rng(5)
    count = sum(sizes)
    x = draw.standard_normal((count, 1, 8, 8)).astype(np.float32)
    train = {
        "x": draw.integers(0, 11, (count, 5)) if words else x,
        "y": draw.integers(0, 3, count),
    }
    parts = np.split(draw.permutation(count), np.cumsum(sizes)[:-1])
    tested = [part if i % 2 == 0 else part[:0] for i, part in enumerate(parts)]
    info = Info("x", train["x"].shape[1:], 3)
    names = Numbered(len(sizes))
    return FederatedData(info, names, train, Holdings.of(parts), None, train, Holdings.of(tested))


def run_file(**client):
    table = {"lr": 0.1, "batch_size": 4, "device": "cpu", **client}
    return resolve({"data": {"name": "x"}, "task": {"kind": "x"}, "client": table})


def plan_of(data, build, clients=None, wanted=None):
    clients = list(data.names) if clients is None else clients
    model = model_of(initial_module(Task(build, losses, accuracy), 0))
    return TrainPlan(3, clients, model, len(clients) if wanted is None else wanted)


def both(build, rule=ClientRule(), data=None, plan=None, chunk=None, memory=None, **client):  # noqa: B008
    """The items of the sequential and of the vectorised engine, and what the latter announced."""
    data = data or federated()
    plan = plan or plan_of(data, build)
    task, run, said = Task(build, losses, accuracy), run_file(**client), []
    slow = list(sequential(run, data, task, rule).train(plan))
    engine = vectorised(run, data, task, rule, said.append, memory, chunk)
    return slow, list(engine.train(plan)), said


def singles(items):
    """The items by client, in the order that they came in."""
    found = {}
    for item in items:
        if isinstance(item, Failure):
            found[item.client] = item
        else:
            found |= {c: item.take([i]) for i, c in enumerate(item.clients)}
    return found


def aggregate(updates):
    total = sum(float(u.weights) for u in updates)
    names = updates[0].delta
    return {
        n: sum(u.delta[n][0].double() * float(u.weights) for u in updates) / total for n in names
    }


def assert_same(slow, fast):
    slow, fast = singles(slow), singles(fast)
    assert list(slow) == list(fast)
    errors = []
    for client, expected in slow.items():
        found = fast[client]
        assert found.round == expected.round
        assert found.delta.keys() == expected.delta.keys()
        for name, d in expected.delta.items():
            assert (found.delta[name].shape, found.delta[name].dtype) == (d.shape, d.dtype)
        assert torch.equal(found.weights, expected.weights)
        assert found.metrics.keys() == expected.metrics.keys()
        for name, value in expected.metrics.items():
            torch.testing.assert_close(found.metrics[name], value, rtol=1e-4, atol=1e-5)
        assert float(norm(expected.delta)) > 0
        errors.append(float(norm(subtract(found.delta, expected.delta)) / norm(expected.delta)))
    assert np.median(errors) < 1e-5
    truth, other = aggregate(list(slow.values())), aggregate(list(fast.values()))
    assert float(norm(subtract(other, truth))) < 1e-4 * float(norm(truth))


@pytest.mark.parametrize("build", [logistic, mlp, cnn, Residual], ids=lambda b: b.__name__)
@pytest.mark.parametrize(
    "length", [{"local_epochs": 2}, {"local_steps": 5}, {"batch_size": "full", "local_epochs": 2}]
)
def test_models_and_lengths(build, length):
    slow, fast, said = both(build, **length)
    assert_same(slow, fast)
    assert not said
    assert any(len(item.clients) > 1 for item in fast)


@pytest.mark.parametrize(
    "client",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        # A large eps: with the default, the sign of a gradient near zero decides its first step.
        {"optimizer": "adam", "lr": 0.01, "eps": 1e-3, "weight_decay": 0.1},
        {"optimizer": "adamw", "lr": 0.01, "eps": 1e-3, "weight_decay": 0.1},
        {"max_grad_norm": 0.3},
        {"schedule": "cosine"},
        {"accumulation": 2},
    ],
    ids=str,
)
def test_optimizers(client):
    slow, fast, said = both(mlp, local_epochs=2, **client)
    assert_same(slow, fast)
    assert not said


def test_rules():
    rule = ClientRule(
        (proximal(0.7),), (lambda g, local: map_tree(lambda t, p: t + 0.1 * p, g, local.params),)
    )
    slow, fast, said = both(mlp, rule, max_grad_norm=0.5, local_epochs=2)
    assert_same(slow, fast)
    assert not said


def test_integers_frozen_layers_and_constant_buffers():
    slow, fast, said = both(Words, data=federated(words=True), local_epochs=2)
    assert_same(slow, fast)
    assert not said
    assert set(singles(fast)["c0"].delta) == {
        "embedding.weight",
        "head.weight",
        "head.bias",
        "scale",
    }


class Tied(nn.Module):
    """One matrix under two names, as in language models."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x)).mean(1))


def test_a_shared_parameter_travels_once_and_gets_both_gradients():
    slow, fast, said = both(Tied, data=federated(words=True), local_epochs=2)
    assert_same(slow, fast)
    assert not said
    assert set(singles(fast)["c0"].delta) == {"embedding.weight"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_on_a_gpu(precision):
    slow, fast, said = both(mlp, device="cuda", precision=precision, momentum=0.5)
    assert_same(slow, fast)
    assert len(said) == (precision == "float16")
    assert all(d.device.type == "cpu" for item in fast for d in item.delta.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("build", [cnn, Residual], ids=lambda b: b.__name__)
@pytest.mark.parametrize(("precision", "far"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_images_on_a_gpu_with_the_data_there_or_brought(build, precision, far):
    for memory in (None, 6000):  # all data fit, or only those of a chunk
        slow, fast, said = both(build, device="cuda", precision=precision, memory=memory)
        assert not said
        truth, other = (aggregate(list(singles(side).values())) for side in (slow, fast))
        assert float(norm(subtract(other, truth))) < far * float(norm(truth))


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_chunks_do_not_matter(chunk):
    slow, fast, said = both(mlp, chunk=chunk, local_epochs=2, momentum=0.5)
    assert_same(slow, fast)
    assert not said


@pytest.mark.parametrize("memory", [1, 6000, 1 << 24])
def test_memory_cuts_the_stream_and_changes_nothing(memory):
    slow, fast, _ = both(mlp, memory=memory, local_epochs=2)
    assert_same(slow, fast)
    lengths = {1: [1] * 7, 6000: [2, 2, 2, 1], 1 << 24: [7]}  # mlp has 2460 bytes
    assert [len(item.clients) for item in fast] == lengths[memory]


def test_a_cohort_of_one_and_one_in_another_order():
    data = federated()
    for clients in (["c2"], ["c5", "c0", "c3"]):
        plan = plan_of(data, mlp, clients)
        assert_same(*both(mlp, data=data, plan=plan)[:2])


def test_reserves_are_trained_only_when_asked_for():
    data, seen = federated(), []

    def watched(model, batch):
        seen.append(len(batch["x"]))
        return losses(model, batch)

    task = Task(mlp, watched, accuracy)
    plan = plan_of(data, mlp, list(data.names), wanted=4)
    for engine in (sequential, vectorised):
        stream = engine(run_file(), data, task, ClientRule()).train(plan)
        answered = 0
        while answered < 4:
            answered += len(next(stream).clients)
        assert answered == 4
        before = len(seen)
        assert next(stream).clients == ["c4"]
        assert len(seen) > before
        stream.close()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(8, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        start = torch.zeros(1, len(x), 4)
        return self.head(self.cells(x.squeeze(1), (start, start))[0][:, -1])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, x):
        out = self.layer(x.flatten(1))
        return out if float(out.detach().sum()) > 0 else 2 * out


def instance_norm(**options):
    """Keeps running statistics, as BatchNorm does."""
    return nn.Sequential(
        nn.InstanceNorm2d(1, track_running_stats=True, **options), nn.Flatten(), nn.Linear(64, 3)
    )


class Centred(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, x):
        out = self.layer(x.flatten(1))
        return out - out.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (instance_norm, r"its buffer '0\.\w+' changes in training"),
        (Centred, "examples of a batch act on each other"),
        (lambda: nn.Sequential(mlp(), nn.AlphaDropout(0.5)), "it draws random numbers in training"),
        (Branching, r"RuntimeError: .*"),
        (Recurrent, r"torch has no batching rule for aten::\w+"),
    ],
    ids=["running statistics", "batch statistics", "dropout", "branch", "lstm"],
)
def test_what_cannot_be_vectorised_is_announced_once_and_trained_anyway(build, why):
    data = federated([6, 5, 9])
    plan, said = plan_of(data, build), []
    task, run = Task(build, losses, accuracy), run_file(batch_size=3)
    engine = vectorised(run, data, task, ClientRule(), said.append)
    oracle = sequential(run, data, task, ClientRule())
    for _ in range(2):
        slow, fast = singles(oracle.train(plan)), singles(engine.train(plan))
        for client, expected in slow.items():
            for name, d in expected.delta.items():
                assert torch.equal(fast[client].delta[name], d)
    assert len(said) == 1
    pattern = f"^cannot vectorise model: {why}; running one client after another$"
    assert re.match(pattern, said[0]), said[0]


def test_a_client_that_raises_is_a_failure_with_its_reason_and_the_others_go_on():
    data = federated()
    bad = data.train_holdings.of_client(3)
    data.train["y"][bad[0]] = 77  # a label that the model has no output for

    slow, fast, said = both(mlp, data=data)
    expected, found = singles(slow), singles(fast)
    assert list(expected) == list(found) == list(data.names)
    for items in (expected, found):
        assert [c for c, item in items.items() if isinstance(item, Failure)] == ["c3"]
        assert items["c3"].reason == "IndexError: Target 77 is out of bounds."
    assert_same(
        *[[u for u in side.values() if isinstance(u, Updates)] for side in (expected, found)]
    )
    assert len(said) <= 1


def test_a_model_that_always_raises_fails_every_client_by_name():
    def wrong():
        return nn.Sequential(nn.Flatten(), nn.Linear(63, 3))

    slow, fast, said = both(wrong)
    for items in (slow, fast):
        assert [item.client for item in items] == list(federated().names)
        assert all("RuntimeError: mat1 and mat2 shapes" in item.reason for item in items)
    assert len(said) == 1


@pytest.mark.parametrize("engine", [sequential, vectorised])
def test_an_input_error_is_everybodys(engine):
    data = federated()
    task = Task(mlp, lambda m, b: losses(m, b).mean(), accuracy)
    with pytest.raises(InputError, match="losses of a batch"):
        list(engine(run_file(), data, task, ClientRule()).train(plan_of(data, mlp)))


def test_padding_keeps_an_infinite_loss_to_its_client():
    data = federated()
    data.train["x"][data.train_holdings.of_client(1)[0]] = np.inf
    slow, fast, _ = both(logistic, data=data)
    slow, fast = singles(slow), singles(fast)
    for client in data.names:
        finite = [
            all(bool(t.isfinite().all()) for t in s[client].delta.values()) for s in (slow, fast)
        ]
        assert finite == [client != "c1"] * 2


def test_bfloat16_is_near():
    slow, fast, said = both(mlp, precision="bfloat16", local_epochs=1)
    assert not said
    slow, fast = singles(slow), singles(fast)
    truth, other = aggregate(list(slow.values())), aggregate(list(fast.values()))
    assert float(norm(subtract(other, truth))) < 0.03 * float(norm(truth))


@pytest.mark.parametrize("engine", [sequential, vectorised])
def test_one_full_batch_each_is_a_step_of_central_gradient_descent(engine):
    data = federated()
    run = run_file(batch_size="full", local_epochs=1, lr=0.1)
    plan = plan_of(data, mlp)
    items = engine(run, data, Task(mlp, losses, accuracy), ClientRule()).train(plan)
    strategy, sums = fedavg(), None
    sums = strategy.combine.zero(plan.model.params)
    for item in items:
        sums = strategy.combine.add(sums, item)
    params, _ = strategy.server(plan.model.params, {}, strategy.combine.finish(sums))

    central = mlp()
    central.load_state_dict(plan.model.params)
    x, y = torch.from_numpy(data.train["x"]), torch.from_numpy(data.train["y"])
    functional.cross_entropy(central(x), y).backward()
    for name, p in central.named_parameters():
        torch.testing.assert_close(params[name], add_cast(p.detach(), -0.1 * p.grad))


@pytest.mark.parametrize("engine", [sequential, vectorised])
def test_evaluation_skips_clients_without_a_test_part(engine):
    data = federated()
    made = engine(run_file(), data, Task(mlp, losses, accuracy), ClientRule())
    assert list(made.clients()) == list(data.names)
    assert list(made.examples()) == SIZES
    model = plan_of(data, mlp).model
    found = list(made.evaluate(EvaluatePlan(1, ["c4", "c1", "c0"], model)))
    made.close()
    assert [(e.client, e.examples) for e in found] == [("c4", 1), ("c0", 7)]
    assert set(found[0].metrics) == {"loss", "accuracy"}
