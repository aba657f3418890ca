"""Every kernel trains as the sequential engine does, or says why it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from umbel.core.errors import InputError
from umbel.core.payloads import TrainPlan, Updates
from umbel.core.run_file import resolve
from umbel.core.trees import map_tree, norm, subtract
from umbel.datasets.federated import FederatedData, Holdings, Info, Numbered
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.engines.vectorised import vectorised
from umbel.simulations.kernels import lean
from umbel.simulations.kernels.kernel import Obstacle
from umbel.simulations.kernels.rectify import rectify_late
from umbel.simulations.kernels.trace import trace
from umbel.strategies.parts import ClientRule
from umbel.strategies.parts.rule import proximal
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.task import Task

SIZES = [7, 3, 12, 5, 1, 9, 4, 12]


class Functional(nn.Module):
    """A convolutional network written with functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding="same", bias=False)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.first(x)), 2)
        x = torch.tanh(self.second(x))
        return self.head(x.view(x.size(0), -1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Sequential(
            nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.GELU()
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(functional.relu(x + self.body(x)).mean((-2, -1)))


class Shared(nn.Module):
    """One layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(64, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(torch.flatten(x, start_dim=1)))
        return self.head(torch.sigmoid(self.twice(torch.relu(self.twice(x)))))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )


def overlapping():
    """Windows that overlap and reach over the edge, and a frozen layer."""
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    made[3].requires_grad_(False)
    return made


class Strided(nn.Module):
    """Convolutions of every other kind of edge, step and reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, (2, 4), padding="same", bias=False)
        self.second = nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(2, 1))
        self.third = nn.Conv2d(3, 2, 2, padding="valid")
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        return self.head(x.flatten(1))


def logistic():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 9, bias=False), nn.LayerNorm(9), nn.SiLU(), nn.Linear(9, 3)
    )


def losses(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model, batch):
    return {"accuracy": (model(batch["x"]).argmax(-1) == batch["y"]).float()}


def squares(model, batch):
    return (model(batch["x"]) - batch["y"][:, None]).square().mean(1)


def halves(model, batch):
    """The task changes what it gives the model, and asks twice."""
    both = model(batch["x"] / 2) + model(batch["x"])
    return functional.cross_entropy(both, batch["y"], reduction="none")


def federated():
    draw = np.random.default_rng(5)
    count = sum(SIZES)
    # Every third pixel is background, as in pictures: windows with ties.
    x = draw.standard_normal((count, 1, 8, 8)).astype(np.float32)
    x[:, :, ::3] = 0
    train = {"x": x, "y": draw.integers(0, 3, count)}
    parts = np.split(draw.permutation(count), np.cumsum(SIZES)[:-1])
    info, names = Info("x", (1, 8, 8), 3), Numbered(len(SIZES))
    return FederatedData(info, names, train, Holdings.of(parts), None, None, None)


def train(engine, build, rule=ClientRule(), loss=losses, plan=None, **client):  # noqa: B008
    """One round: the updates in one stack."""
    table = {"lr": 0.1, "batch_size": 4, "local_epochs": 2, "device": "cpu", **client}
    run = resolve({"data": {"name": "x"}, "task": {"kind": "x"}, "client": table})
    task, data = Task(build, loss, accuracy), federated()
    made = engine(run, data, task, rule, *(() if plan is None else (pytest.fail, None, None, plan)))
    model = model_of(initial_module(task, 0))
    (updates,) = made.train(TrainPlan(2, list(data.names), model, len(SIZES)))
    assert isinstance(updates, Updates)
    return updates


def stack(engine, *args, **kwargs):
    """As :func:`train`, of an engine that answers one by one."""
    found = []

    def together(*given):
        made = engine(*given)
        train = made.train
        made.train = lambda plan: found.extend(train(plan)) or found[:1]
        return made

    train(together, *args, **kwargs)
    delta = {n: torch.cat([u.delta[n] for u in found]) for n in found[0].delta}
    metrics = {n: torch.cat([u.metrics[n] for u in found]) for n in found[0].metrics}
    weights = torch.cat([u.weights for u in found])
    return Updates(2, [c for u in found for c in u.clients], delta, weights, metrics)


def assert_same(expected, found):
    assert list(found.clients) == list(expected.clients)
    assert torch.equal(found.weights, expected.weights)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        torch.testing.assert_close(found.metrics[name], value, rtol=1e-4, atol=1e-5)
    assert found.delta.keys() == expected.delta.keys()
    for name, d in expected.delta.items():
        assert (found.delta[name].shape, found.delta[name].dtype) == (d.shape, d.dtype)
    rows = range(len(expected.clients))
    truths = [map_tree(lambda t, i=i: t[i], expected.delta) for i in rows]
    errors = [
        float(norm(subtract(map_tree(lambda t, i=i: t[i], found.delta), truth)) / norm(truth))
        for i, truth in enumerate(truths)
    ]
    assert np.median(errors) < 1e-5

    def mean(delta):
        return map_tree(lambda t: torch.einsum("c,c...->...", expected.weights, t.double()), delta)

    truth = mean(expected.delta)
    assert float(norm(subtract(mean(found.delta), truth))) < 1e-4 * float(norm(truth))


IMAGES = [cnn, Functional, Residual, overlapping]
TABLES = [logistic, mlp, Shared]
GROUPED = [(build, f"grouped:chunk={n}") for build in IMAGES for n in (1, 3)]
UNFOLDED = [(build, "unfolded:chunk=3") for build in (cnn, overlapping, Strided)]
STACKED = [(build, plan) for build in TABLES for plan in ("stacked", "stacked:chunk=3")]
OTHERS = [(build, plan) for build in IMAGES + TABLES for plan in ("vmap", "lean:chunk=3")]


@pytest.mark.parametrize(
    ("build", "plan"),
    GROUPED + UNFOLDED + STACKED + OTHERS,
    ids=lambda p: getattr(p, "__name__", p),
)
def test_models(build, plan):
    assert_same(stack(sequential, build), train(vectorised, build, plan=plan))


PLANS = [(cnn, "grouped:chunk=3"), (mlp, "stacked"), (cnn, "vmap"), (cnn, "lean")]


@pytest.mark.parametrize(("build", "plan"), PLANS, ids=lambda p: getattr(p, "__name__", p))
@pytest.mark.parametrize(
    "client",
    [
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"optimizer": "adam", "lr": 0.01, "eps": 1e-3},
        {"optimizer": "adamw", "lr": 0.01, "eps": 1e-3, "weight_decay": 0.1},
        {"max_grad_norm": 0.3},
        {"local_epochs": None, "local_steps": 5},
        {"batch_size": "full"},
        {"accumulation": 2},
    ],
    ids=str,
)
def test_settings(build, plan, client):
    assert_same(stack(sequential, build, **client), train(vectorised, build, plan=plan, **client))


@pytest.mark.parametrize("kept", [1, 3000], ids=["a step at a time", "some steps"])
@pytest.mark.parametrize("client", [{}, {"accumulation": 3}], ids=str)
def test_lean_gathers_what_there_is_room_for(monkeypatch, kept, client):
    monkeypatch.setattr(lean, "GATHERED", kept)
    assert_same(stack(sequential, cnn, **client), train(vectorised, cnn, plan="lean", **client))


@pytest.mark.parametrize(("build", "plan"), PLANS, ids=lambda p: getattr(p, "__name__", p))
def test_rules(build, plan):
    def lean_on(gradient, local):
        return map_tree(lambda g, p, a: g + 0.1 * (p - a), gradient, local.params, local.anchor)

    rule = ClientRule((proximal(0.7),), (lean_on,))
    options = {"rule": rule, "max_grad_norm": 0.5, "momentum": 0.5}
    assert_same(stack(sequential, build, **options), train(vectorised, build, plan=plan, **options))


@pytest.mark.parametrize(("build", "plan"), PLANS, ids=lambda p: getattr(p, "__name__", p))
@pytest.mark.parametrize("loss", [squares, halves], ids=lambda f: f.__name__)
def test_losses_are_the_tasks_own(build, plan, loss):
    slow, fast = stack(sequential, build, loss=loss), train(vectorised, build, loss=loss, plan=plan)
    assert_same(slow, fast)


class Dropping(nn.Module):
    """Draws in images and in rows, by a module and by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop = nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.3)
        self.second, self.head = nn.Conv2d(4, 2, 3, stride=2), nn.Linear(18, 3)

    def forward(self, x):
        x = self.second(self.drop(torch.relu(self.first(x)))).flatten(1)
        return self.head(functional.dropout(x, p=0.5, training=self.training))


def dropping_mlp():
    hidden = [nn.Linear(64, 9), nn.ReLU(), nn.Dropout(0.4), nn.Linear(9, 9), nn.Dropout(0.0)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(9, 3))


@pytest.mark.parametrize(
    ("build", "plan"),
    [(Dropping, "grouped:chunk=3"), (dropping_mlp, "stacked"), (dropping_mlp, "stacked:chunk=3")],
)
@pytest.mark.parametrize("client", [{}, {"batch_size": "full"}, {"momentum": 0.5}], ids=str)
def test_dropout_takes_each_clients_own_draws(build, plan, client):
    assert_same(stack(sequential, build, **client), train(vectorised, build, plan=plan, **client))


@pytest.fixture
def one_thread():
    """Sums of two threads round otherwise than those of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_lean_draws_and_counts_as_the_runtime_does():
    def build():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(144, 3),
        )

    options = {"batch_size": "full", "momentum": 0.5}
    slow, fast = (
        stack(sequential, build, **options),
        train(vectorised, build, plan="lean", **options),
    )
    assert int(fast.delta["1.num_batches_tracked"][0]) == 2
    for name, d in slow.delta.items():
        assert torch.equal(fast.delta[name], d), name


def pooling_mlp():
    return nn.Sequential(cnn(), nn.ReLU(), nn.Linear(3, 3))


def test_rectifying_late_gives_the_same_bits():
    torch.manual_seed(3)
    plain, late = pooling_mlp(), pooling_mlp()
    late.load_state_dict(plain.state_dict())
    rectify_late(late)
    kinds = [type(m).__name__ for m in late[0]]
    assert kinds[1:3] == ["MaxPool2d", "ReLU"]
    assert [m.inplace for m in late.modules() if isinstance(m, nn.ReLU)] == [
        True,
        True,
        True,
        False,
    ]
    x = torch.randn(5, 1, 8, 8)
    x[:, :, ::3] = 0
    left, right = (m(x).square().sum() for m in (plain, late))
    assert torch.equal(left, right)
    pairs = zip(
        *(torch.autograd.grad(v, list(m.parameters())) for v, m in ((left, plain), (right, late))),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_plan_does_not_depend_on_what_was_trained_before():
    table = {"lr": 0.1, "batch_size": 4, "local_epochs": 2, "device": "cpu"}
    run = resolve({"data": {"name": "x"}, "task": {"kind": "x"}, "client": table})
    task, data = Task(cnn, losses, accuracy), federated()
    model = model_of(initial_module(task, 0))
    plan = TrainPlan(2, list(data.names), model, len(SIZES))
    for text in ("grouped:chunk=3", "lean", "vmap"):
        fresh, used = (
            vectorised(run, data, task, ClientRule(), pytest.fail, plan=text) for _ in range(2)
        )
        moved = model._replace(params=map_tree(lambda p: p + 1, model.params))
        list(used.train(TrainPlan(1, list(data.names), moved, len(SIZES))))
        (first,), (second,) = fresh.train(plan), used.train(plan)
        for name, d in first.delta.items():
            assert torch.equal(second.delta[name], d)


class Sorted(nn.Module):
    def forward(self, x):
        return x.sort(-1)[0]


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)), "no kernel knows Softmax"),
        (nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), "padding_mode = 'circular'"),
        (nn.Embedding(4, 3, padding_idx=0), "an option of an embedding"),
        (nn.Dropout(1.0), "a dropout of everything"),
        (nn.Flatten(2), "a Flatten of some dimensions"),
        (Sorted(), "no kernel knows 'sort'"),
        (nn.LSTM(3, 4, proj_size=2), "a LSTM with a projection"),
        (nn.GRU(3, 4, 2, dropout=0.5), "a GRU that drops out between its layers"),
        (nn.MultiheadAttention(4, 2, add_zero_attn=True), "an option of a MultiheadAttention"),
        (Branching(), "its forward pass cannot be traced"),
        (nn.Bilinear(3, 3, 3), "no kernel knows Bilinear|takes more than one tensor"),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, nn.Module) else "",
)
def test_a_part_that_is_not_known_is_named(module, why):
    with pytest.raises(Obstacle, match=why):
        trace(module)


def test_a_plan_that_does_not_fit_the_model_is_refused():
    with pytest.raises(InputError, match="it has no convolution; leave the plan out"):
        train(vectorised, mlp, plan="grouped:chunk=2")


LONG = [pytest.mark.slow, pytest.mark.compiled]
COMPILED = [
    pytest.param(mlp, "stacked:chunk=3,compile", id="stacked", marks=LONG),
    pytest.param(cnn, "grouped:chunk=3,compile", id="grouped", marks=LONG),
    pytest.param(cnn, "vmap:chunk=3,compile", id="vmap", marks=LONG),
    pytest.param(cnn, "lean:compile", id="lean", marks=LONG),
]


@pytest.mark.parametrize(("build", "plan"), COMPILED)
def test_compiled_steps(build, plan):
    """With everything around them that a step may read; sizes and chunks are uneven."""

    def lean_on(gradient, local):
        return map_tree(lambda g, p, a: g + 0.1 * (p - a), gradient, local.params, local.anchor)

    rule = ClientRule((proximal(0.7),), (lean_on,))
    options = {"rule": rule, "max_grad_norm": 0.5, "momentum": 0.5}
    assert_same(stack(sequential, build, **options), train(vectorised, build, plan=plan, **options))


@pytest.mark.parametrize(
    ("build", "client", "why"),
    [
        (dropping_mlp, {}, "it would draw other random numbers"),
        (mlp, {"accumulation": 2}, "a step is of one piece"),
    ],
)
def test_what_is_not_compiled_is_refused(build, client, why):
    with pytest.raises(InputError, match=why):
        train(vectorised, build, plan="lean:compile", **client)
