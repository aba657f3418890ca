"""Local training is what anyone would write in a few lines of PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from umbel.client.batches import schedule
from umbel.client.training import ClientRuntime
from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model, norm
from umbel.strategies.parts import ClientRule
from umbel.strategies.parts.rule import proximal
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.task import Task


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def losses(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model, batch):
    return {"accuracy": (model(batch["x"]).argmax(-1) == batch["y"]).float()}


def task(build=mlp) -> Task:
    return Task(build, losses, accuracy)


def run_file(**client) -> RunFile:
    table = {"lr": 0.1, "batch_size": 4, "device": "cpu", **client}
    return resolve({"data": {"name": "x"}, "task": {"kind": "x"}, "client": table})


def examples(n=11):
    draw = np.random.default_rng(3)
    return {"x": draw.standard_normal((n, 6)).astype(np.float32), "y": draw.integers(0, 3, n)}


def initial(build=mlp) -> Model:
    return model_of(initial_module(task(build), 0))


def train(build=mlp, rule=ClientRule(), client="c0", **section):  # noqa: B008 - immutable
    runtime = ClientRuntime(run_file(**section), task(build), rule)
    return runtime.train(2, client, examples(), initial(build))


def same(left, right, **tolerance):
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance)


def test_equals_a_bare_pytorch_loop():
    arrays, model = examples(), mlp()
    start = initial()
    model.load_state_dict(start.params)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    total, right = 0.0, 0
    for batch in schedule(0, 2, "c0", 11, 4, 3, None):
        x, y = torch.from_numpy(arrays["x"][batch]), torch.from_numpy(arrays["y"][batch])
        optimizer.zero_grad()
        logits = model(x)
        loss = functional.cross_entropy(logits, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        total += float(loss.detach()) * len(batch)
        right += int((logits.argmax(-1) == y).sum())

    found = train(momentum=0.9, max_grad_norm=0.5, local_epochs=3)
    assert list(found.clients) == ["c0"]
    assert found.round == 2
    assert found.weights.tolist() == [11.0]
    for name, p in model.named_parameters():
        expected = (p.detach() - start.params[name])[None]
        torch.testing.assert_close(found.delta[name], expected, rtol=1e-5, atol=1e-7)
    assert float(found.metrics["loss"]) == pytest.approx(total / 33, rel=1e-5)
    assert float(found.metrics["accuracy"]) == pytest.approx(right / 33)


def test_the_global_model_is_left_alone():
    model = initial()
    kept = {n: t.clone() for n, t in model.tensors().items()}
    ClientRuntime(run_file(), task(), ClientRule()).train(1, "c0", examples(), model)
    same(model.tensors(), kept, rtol=0, atol=0)


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_accumulation_does_not_change_the_step(parts):
    rule = ClientRule((proximal(0.5),))
    options = {"rule": rule, "local_epochs": 2, "max_grad_norm": 0.5}
    whole = train(**options)
    accumulated = train(accumulation=parts, **options)
    same(accumulated.delta, whole.delta, rtol=1e-4, atol=1e-6)
    same(accumulated.metrics, whole.metrics, rtol=1e-5, atol=0)


def test_max_grad_norm_bounds_what_the_strategy_made_of_the_gradient():
    rule = ClientRule((), (lambda g, local: {n: 100 * t for n, t in g.items()},))
    clipped = train(rule=rule, local_steps=1, max_grad_norm=0.25)
    assert float(norm(clipped.delta)) == pytest.approx(0.1 * 0.25, rel=1e-4)


def test_a_proximal_term_holds_the_client_back():
    free = train(local_epochs=4)
    held = train(local_epochs=4, rule=ClientRule((proximal(3.0),)))
    assert float(norm(held.delta)) < 0.8 * float(norm(free.delta))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_dropout_repeats_and_depends_on_the_client():
    before = torch.get_rng_state()
    first, again = train(dropout, batch_size="full"), train(dropout, batch_size="full")
    other = train(dropout, client="c1", batch_size="full")
    same(first.delta, again.delta, rtol=0, atol=0)
    assert not torch.allclose(first.delta["2.weight"], other.delta["2.weight"], rtol=1e-2)
    assert torch.equal(torch.get_rng_state(), before)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def test_buffers_move_and_keep_their_dtypes():
    delta = train(normed, local_epochs=1).delta
    assert delta["1.num_batches_tracked"].tolist() == [3]
    assert delta["1.num_batches_tracked"].dtype is torch.int64
    assert float(delta["1.running_var"].abs().sum()) > 0


class Partial(nn.Module):
    """A frozen layer, one that the loss does not reach, and a boolean buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 8).requires_grad_(False)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x):
        return self.head(self.frozen(x))


def test_frozen_parameters_stay_at_home_and_unused_ones_only_decay():
    delta = train(Partial, local_steps=1, weight_decay=0.5).delta
    assert set(delta) == {"head.weight", "head.bias", "unused", "mask"}
    torch.testing.assert_close(delta["unused"][0], torch.full((2,), -0.05))
    assert not delta["mask"].any()


def test_bfloat16_trains_nearly_the_same_model_in_float32():
    half, single = train(precision="bfloat16"), train()
    assert half.delta["0.weight"].dtype is torch.float32
    error = norm({n: half.delta[n] - d for n, d in single.delta.items()})
    assert 0 < float(error) < 0.05 * float(norm(single.delta))


def test_the_rate_follows_the_schedule():
    schedule_ = {"kind": "step", "step": 1, "factor": 0.5}
    same(train(lr=0.2, schedule=schedule_).delta, train(lr=0.1).delta, rtol=1e-6, atol=0)


def test_evaluation_counts_examples():
    runtime = ClientRuntime(run_file(), task(), ClientRule())
    count, metrics = runtime.evaluate(examples(), initial())
    assert count == 11
    assert set(metrics) == {"loss", "accuracy"}


def test_a_model_that_does_not_fit_is_named():
    runtime, model = ClientRuntime(run_file(), task(), ClientRule()), initial()
    short = Model({n: t for n, t in model.params.items() if n != "0.bias"}, {})
    with pytest.raises(InputError, match=r"'0\.bias'"):
        runtime.train(1, "c0", examples(), short)
    wide = Model({**model.params, "2.bias": torch.zeros(5)}, {})
    with pytest.raises(InputError, match=r"'2\.bias' has shape \(5,\).*expected \(3,\)"):
        runtime.evaluate(examples(), wide)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        ClientRuntime(run_file(), task(lambda: mlp().requires_grad_(False)), ClientRule())
