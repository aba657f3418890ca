"""Layers that mix examples or places, each trained for many clients as for one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from umbel.core.payloads import Failure, TrainPlan, Updates
from umbel.core.run_file import resolve
from umbel.core.trees import norm, subtract
from umbel.datasets.federated import FederatedData, Holdings, Info, Numbered
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.engines.vectorised import vectorised
from umbel.strategies.parts import ClientRule
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.task import Task

SIZES = [7, 4, 12, 5, 8, 9, 4, 12]


def losses(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model, batch):
    return {"accuracy": (model(batch["x"]).argmax(-1) == batch["y"]).float()}


def federated(words, sizes):
    draw = np.random.default_rng(5)
    count = sum(sizes)
    x = draw.integers(0, 11, (count, 6)) if words else draw.standard_normal((count, 1, 8, 8))
    train = {"x": x if words else x.astype(np.float32), "y": draw.integers(0, 3, count)}
    parts = np.split(draw.permutation(count), np.cumsum(sizes)[:-1])
    info = Info("x", x.shape[1:], 3)
    return FederatedData(info, Numbered(len(sizes)), train, Holdings.of(parts), None, None, None)


def both(build, plan, words, sizes=SIZES, said=pytest.fail, **client):
    """One round of both engines: client -> update or failure."""
    table = {"lr": 0.1, "batch_size": 4, "local_epochs": 2, "device": "cpu", **client}
    run = resolve({"data": {"name": "x"}, "task": {"kind": "x"}, "client": table})
    task, data = Task(build, losses, accuracy), federated(words, sizes)
    model = model_of(initial_module(task, 0))
    asked = TrainPlan(2, list(data.names), model, len(sizes))
    fast = vectorised(run, data, task, ClientRule(), said, None, None, plan).train(asked)
    return [by_client(s) for s in (sequential(run, data, task, ClientRule()).train(asked), fast)]


def by_client(stream):
    found = {}
    for item in stream:
        if isinstance(item, Failure):
            found[item.client] = item
        else:
            found |= {c: item.take([i]) for i, c in enumerate(item.clients)}
    return found


def assert_same(slow, fast):
    assert list(slow) == list(fast)
    errors = []
    for client, expected in slow.items():
        found = fast[client]
        assert {n: (d.shape, d.dtype) for n, d in found.delta.items()} == {
            n: (d.shape, d.dtype) for n, d in expected.delta.items()
        }
        for name, value in expected.metrics.items():
            torch.testing.assert_close(found.metrics[name], value, rtol=1e-4, atol=1e-5)
        errors.append(float(norm(subtract(found.delta, expected.delta)) / norm(expected.delta)))
    assert np.median(errors) < 1e-5
    truth, other = (
        {
            n: sum(u.delta[n].double() * float(u.weights) for u in side.values())
            for n in next(iter(side.values())).delta
        }
        for side in (slow, fast)
    )
    assert float(norm(subtract(other, truth))) < 1e-4 * float(norm(truth))


class Words(nn.Module):
    """An embedding, something between, a linear layer on what comes out."""

    def __init__(self, between, width, pick):
        super().__init__()
        self.embedding, self.between, self.pick = nn.Embedding(11, 8), between, pick
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.pick(self.between(self.embedding(x))))


def lstm():
    return Words(nn.LSTM(8, 5, 2, batch_first=True), 5, lambda out: out[0][:, -1])


def lstm_state():
    return Words(nn.LSTM(8, 5, bidirectional=True, batch_first=True), 10, join_last)


def join_last(out):
    _, (h, c) = out
    return torch.cat([h[-2], c[-1]], dim=1)


def gru():
    def pick(out):
        return out[0].mean(dim=1) + out[1][-1]

    return Words(nn.GRU(8, 5, bias=False, batch_first=True), 5, pick)


def rnn():
    def pick(out):
        return out[1].squeeze(0)

    return Words(nn.RNN(8, 5, nonlinearity="relu", batch_first=True), 5, pick)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **options)
    made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Words(made, 8, lambda out: out.mean(1))


def plain_encoder():
    return encoder(dropout=0.0)


def early_encoder():
    return encoder(dropout=0.0, norm_first=True, activation="gelu")


def dropping_encoder():
    return encoder(dropout=0.2)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.places = nn.Embedding(11, 8), nn.Parameter(torch.randn(6, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("later", torch.ones(6, 6, dtype=torch.bool).triu(1), persistent=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embedding(x) + self.places
        seen, _ = self.attention(x, x, x, attn_mask=self.later)
        return self.head((x + seen)[:, -1])


class Written(nn.Module):
    """A transformer's block as people write it: shapes, views, and attention by a function."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.drop, self.dropout = nn.LayerNorm(8), nn.Dropout(dropout), dropout
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        batch, length = x.shape
        x = self.tokens(x) + self.places(torch.arange(length, device=x.device))
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.view(batch, length, 2, 4).transpose(1, 2) for t in (q, k, v))
        seen = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout, is_causal=True
        )
        scores = torch.softmax(q @ k.transpose(-2, -1) / 2, dim=-1)
        seen = 0.5 * seen + (scores @ v).contiguous()
        x = x + self.drop(self.out(seen.transpose(1, 2).reshape(batch, length, -1)))
        x = x + self.down(functional.gelu(self.up(x), approximate="tanh"))
        return self.head(x.mean(1))


def dropping_written():
    return Written(0.3)


def lora():
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.GELU(), nn.Linear(9, 3))
    config = peft.LoraConfig(r=2, target_modules=["1"], lora_dropout=0.2, init_lora_weights=False)
    return peft.get_peft_model(plain, config)


@pytest.mark.parametrize(
    "build",
    [lstm, lstm_state, gru, rnn, plain_encoder, early_encoder, SelfAttention, Written],
    ids=lambda b: b.__name__,
)
def test_words(build):
    assert_same(*both(build, "stacked", words=True))


@pytest.mark.parametrize(
    ("build", "words"), [(dropping_encoder, True), (dropping_written, True), (lora, False)]
)
def test_dropout_takes_each_clients_own_draws(build, words):
    assert_same(*both(build, "stacked:chunk=3", words=words, momentum=0.5))


def images(**options):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def table(**options):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6, **options), nn.ReLU(), nn.Linear(6, 3)
    )


def sequences():
    turned = nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(1), nn.Flatten(), nn.Linear(64, 3))
    return nn.Sequential(nn.Unflatten(1, (1, 1)), nn.Flatten(1, 2), *turned)


@pytest.mark.parametrize(
    "client",
    [{}, {"batch_size": "full"}, {"local_epochs": None, "local_steps": 3, "momentum": 0.5}],
    ids=str,
)
@pytest.mark.parametrize(("build", "plan"), [(images, "grouped"), (table, "stacked")])
def test_batch_norm_and_its_running_statistics(build, plan, client):
    sizes = [8, 4, 12, 6, 8, 6, 4, 12]  # a short batch has two, the least that torch normalises
    slow, fast = both(build, plan, words=False, sizes=sizes, **client)
    assert_same(slow, fast)
    for name in slow["c0"].delta:
        for client_name, expected in slow.items():
            if "num_batches" in name:
                assert torch.equal(fast[client_name].delta[name], expected.delta[name])
            else:
                torch.testing.assert_close(
                    fast[client_name].delta[name], expected.delta[name], rtol=1e-4, atol=2e-6
                )


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"track_running_stats": False}, {"affine": False, "momentum": 0.3}],
    ids=str,
)
def test_options_of_batch_norm(options):
    for build, plan in ((images, "grouped"), (table, "stacked")):
        assert_same(*both(lambda b=build: b(**options), plan, words=False, sizes=[8, 6, 4, 6]))


def test_a_batch_of_one_fails_its_client_alone():
    said = []
    slow, fast = both(table, "stacked", words=False, sizes=[8, 5, 4], said=said.append)
    assert isinstance(slow["c1"], Failure)
    assert fast["c1"] == slow["c1"]
    assert_same(*({c: u for c, u in s.items() if isinstance(u, Updates)} for s in (slow, fast)))
    assert len(said) == 1


def test_clients_with_batches_of_one_size_are_one_computation():
    seen = []

    def watched(model, batch):
        seen.append(len(batch["x"]))
        return losses(model, batch)

    table_ = {"lr": 0.1, "batch_size": 4, "device": "cpu"}
    run = resolve({"data": {"name": "x"}, "task": {"kind": "x"}, "client": table_})
    task, data = Task(images, watched, accuracy), federated(False, [8, 6, 4, 8, 6])
    engine = vectorised(run, data, task, ClientRule(), pytest.fail, plan="grouped")
    model = model_of(initial_module(task, 0))
    plan = TrainPlan(1, list(data.names), model, 5)
    list(engine.train(plan))
    seen.clear()
    list(engine.train(plan))
    assert seen == [12, 8, 8, 4]  # three of 4, the two of 8 once more; then 4 and 2 of two
