"""DP-SGD of many clients at once trains each as the runtime does alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from umbel.core import registry
from umbel.core.errors import InputError
from umbel.core.payloads import TrainPlan, Updates
from umbel.core.run_file import resolve
from umbel.core.trees import norm, subtract
from umbel.datasets.federated import FederatedData, Holdings, Info, Numbered
from umbel.server.records import Scores
from umbel.server.rounds import Start, rounds
from umbel.simulations import private_trial
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.engines.vectorised import vectorised
from umbel.simulations.kernels.private import Bound, pieces
from umbel.strategies.parts import ClientRule
from umbel.strategies.parts.rule import clip_gradient, proximal
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.task import Task

SIZES = [9, 3, 14, 1, 6, 14]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def even_kernel():
    """Padding that is not the same on both sides, and a frozen layer."""
    made = nn.Sequential(
        nn.Conv2d(1, 3, 2, padding="same"),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, dilation=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
        nn.Linear(4, 3),
    )
    made[5].requires_grad_(False)
    return made


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 7), nn.LayerNorm(7), nn.SiLU(), nn.Linear(7, 3)
    )


def dropping():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Dropout(0.4), nn.Linear(7, 3))


class Twice(nn.Module):
    """One layer used twice: no books can be kept of it."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(64, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.twice(torch.tanh(self.first(torch.flatten(x, start_dim=1))))
        return self.head(self.twice(torch.tanh(x)))


class Words(nn.Module):
    """An embedding, a product over places, and a scale that belongs to no layer."""

    def __init__(self, scaled=False):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4)) if scaled else None

    def forward(self, x):
        x = torch.tanh(self.mix(self.table(x)))
        return self.head(x.mean(1) if self.scale is None else x.mean(1) * self.scale)


def losses(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def federated(words=False):
    draw = np.random.default_rng(5)
    count = sum(SIZES)
    x = draw.standard_normal((count, 1, 8, 8)).astype(np.float32)
    train = {"x": draw.integers(0, 11, (count, 6)) if words else x, "y": draw.integers(0, 3, count)}
    parts = np.split(draw.permutation(count), np.cumsum(SIZES)[:-1])
    info, names = Info("x", train["x"].shape[1:], 3), Numbered(len(SIZES))
    return FederatedData(info, names, train, Holdings.of(parts), None, None, None)


def run_file(privacy, client, **run):
    privacy = {"unit": "example", "noise_multiplier": 0.0, "clip_norm": 0.7, **privacy}
    length = {} if "local_steps" in client else {"local_epochs": 2}
    client = {"lr": 0.3, "batch_size": 3, **length, "device": "cpu", **client}
    return resolve(
        {
            "run": {"rounds": 4, "processes": 0, **run},
            "data": {"name": "x"},
            "task": {"kind": "x"},
            "client": client,
            "privacy": privacy,
        }
    )


@pytest.fixture
def kept_books(monkeypatch):
    """Whether the kernels that were made keep books, in the order of the runs."""
    found, make = [], private_trial.make

    def noting(*arguments):
        found.append(kernel := make(*arguments))
        return kernel

    monkeypatch.setattr(private_trial, "make", noting)
    return found


def trained(build, rule=ClientRule(), data=None, privacy={}, client={}, plan=None, **engine):  # noqa: B006, B008
    """Both engines' updates by client, the record of the plan, and what was announced."""
    data = federated() if data is None else data
    task = Task(build, losses, lambda model, batch: {})
    run, said = run_file(privacy, client), []
    model = model_of(initial_module(task, 0))
    slow = sequential(run, data, task, rule)
    fast = vectorised(run, data, task, rule, said.append, plan=plan, **engine)
    found = []
    for federation in (slow, fast):
        own = {}
        for item in federation.train(TrainPlan(2, list(data.names), model, len(SIZES))):
            assert isinstance(item, Updates), item
            assert not item.metrics
            for row, client_name in enumerate(item.clients):
                own[client_name] = {n: d[row] for n, d in item.delta.items()}
        found.append(own)
    record = fast.plan_record()
    fast.close()
    assert found[0].keys() == found[1].keys() == set(data.names)
    return *found, record, said


def assert_same(slow, fast):
    assert sum(norm(delta) for delta in slow.values()) > 0.1
    for client, delta in slow.items():
        assert norm(subtract(delta, fast[client])) <= 1e-5 * (norm(delta) + 1e-3), client


@pytest.mark.parametrize("noise", [0.0, 0.8])
@pytest.mark.parametrize("clipping", ["flat", "per-layer", "adaptive"])
@pytest.mark.parametrize("build", [cnn, mlp])
def test_ways_to_clip(build, clipping, noise, kept_books):
    privacy = {"clipping": clipping, "noise_multiplier": noise}
    kernel = "grouped:chunk=2" if build is cnn else "stacked"
    slow, fast, record, said = trained(build, privacy=privacy, plan=kernel)
    assert_same(slow, fast)
    assert record["plan"] == kernel
    assert [made.by_layer for made in kept_books] == [True]
    assert not said


@pytest.mark.parametrize(
    ("build", "by_layer"), [(even_kernel, True), (dropping, True), (Twice, False)]
)
def test_models(build, by_layer, kept_books):
    slow, fast, record, said = trained(build, privacy={"noise_multiplier": 0.5})
    assert_same(slow, fast)
    assert not record["plan"].startswith("lean")
    assert [made.by_layer for made in kept_books] == [by_layer]
    assert not said


@pytest.mark.parametrize("scaled", [False, True])
def test_words(scaled, kept_books):
    """With a parameter that belongs to no layer, each example is a client of its own."""
    slow, fast, record, _ = trained(lambda: Words(scaled), data=federated(words=True))
    assert_same(slow, fast)
    assert record["plan"].startswith("stacked")
    assert [made.by_layer for made in kept_books] == [not scaled]


@pytest.mark.parametrize(
    "client",
    [
        {"batch_size": "full", "local_epochs": 3},
        {"local_steps": 4, "momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "adam", "lr": 0.01, "accumulation": 2},
    ],
)
def test_lengths_and_optimizers(client):
    slow, fast, *_ = trained(mlp, client=client, plan="stacked:chunk=3")
    assert_same(slow, fast)


def test_rules_see_the_noised_gradient():
    rule = ClientRule(loss_terms=(proximal(0.5),), grad_transforms=(clip_gradient(0.4),))
    slow, fast, *_ = trained(cnn, rule, privacy={"noise_multiplier": 0.3}, plan="grouped:chunk=4")
    assert_same(slow, fast)


def test_memory_cuts_batches():
    slow, fast, *_ = trained(mlp, client={"batch_size": "full"}, plan="stacked", memory=20_000)
    assert_same(slow, fast)


def test_an_infinite_example_is_left_out_of_its_client_and_of_no_other():
    data = federated()
    data.train["x"][data.train_holdings.of_client(2)[3]] = float("inf")
    slow, fast, *_ = trained(cnn, data=data, plan="grouped:chunk=3")
    assert_same(slow, fast)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(torch.flatten(x, start_dim=1)) * (2 if x.mean() > 100 else 1)


def test_what_no_kernel_knows_goes_one_by_one_and_is_announced():
    slow, fast, record, said = trained(Branching)
    assert_same(slow, fast)
    assert record["plan"] == "lean:chunk=8"
    assert len(said) == 1
    assert "cannot be traced" in said[0]


def test_vmap_is_no_private_plan():
    with pytest.raises(InputError, match="no per-example gradients"):
        trained(mlp, plan="vmap")


def test_pieces_hold_every_example_once_and_little_padding():
    counts = np.random.default_rng(1).poisson(10, 40)
    counts[:3] = 0
    seen = np.zeros((40, int(counts.max())), int)
    computed = 0
    for some, columns in pieces(counts, Bound(5, 60), True):
        assert len(some) <= 5
        assert len(some) * (columns.stop - columns.start) <= 60
        seen[some, columns] += 1
        computed += len(some) * (columns.stop - columns.start)
    assert all((seen[i, :n] == 1).all() for i, n in enumerate(counts))
    assert computed <= 1.2 * counts.sum()


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "fedper"])
def test_strategies_whose_clients_keep_or_send_more(name):
    """Two rounds, so that what was kept is used; equal models on both engines."""
    data, task = federated(), Task(mlp, losses, lambda model, batch: {})
    run = run_file({"noise_multiplier": 0.4}, {}, rounds=2, engine_plan="stacked:chunk=4")
    run = run.model_copy(update={"strategy": run.strategy.model_copy(update={"name": name})})
    strategy = registry.find("strategies", name, "[strategy]")()
    model = model_of(initial_module(task, 0))
    ended = []
    for make in (sequential, vectorised):
        federation = make(run, data, task, strategy.client)
        start = Start(0, model, strategy.init(strategy.travelling(model).params))
        *_, last = rounds(run, strategy, federation, start, lambda number, model: Scores({}, {}))
        assert not last.record.failures
        ended.append(last.model.params)
        federation.close()
    moved = norm(subtract(ended[0], model.params))
    assert moved > 0.05
    assert norm(subtract(*ended)) <= 1e-5 * moved


def test_workers_do_not_change_a_bit():
    found = []
    for processes in (0, 2):
        _, fast, *_ = trained(
            mlp,
            privacy={"noise_multiplier": 0.6},
            plan="stacked:chunk=2",
            largest_chunk=2,
            processes=processes,
        )
        found.append(fast)
    for client, delta in found[0].items():
        assert all(torch.equal(t, found[1][client][name]) for name, t in delta.items())
