"""Means over a data set, and figures that cost no second forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from umbel.core.errors import InputError
from umbel.tasks.evaluate import evaluate, per_example
from umbel.tasks.task import Task


def losses(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model, batch):
    return {"accuracy": model(batch["x"]).argmax(-1) == batch["y"]}


TASK = Task(lambda: nn.Linear(4, 3), losses, accuracy)


def examples(n):
    draw = np.random.default_rng(0)
    return {"x": draw.standard_normal((n, 4)).astype(np.float32), "y": draw.integers(0, 3, n)}


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_means_do_not_depend_on_the_batches(batch_size):
    module, arrays = nn.Linear(4, 3), examples(23)
    count, found = evaluate(TASK, module, arrays, batch_size)
    logits = module(torch.from_numpy(arrays["x"])).detach()
    y = torch.from_numpy(arrays["y"])
    assert count == 23
    assert found["loss"] == pytest.approx(float(functional.cross_entropy(logits, y)), rel=1e-6)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == y).double().mean()))


def test_evaluates_in_evaluation_mode_and_restores_the_mode():
    module = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3)).train()
    assert evaluate(TASK, module, examples(50)) == evaluate(TASK, module, examples(50))
    assert module.training


def test_reads_memory_that_may_not_be_written():
    arrays = examples(5)
    for column in arrays.values():
        column.setflags(write=False)
    assert evaluate(TASK, nn.Linear(4, 3), arrays)[0] == 5


def test_metrics_reuse_the_forward_pass_only_for_the_same_input():
    calls = []
    module = nn.Linear(4, 3)

    def forward(x):
        calls.append(x)
        return module(x)

    batch = {k: torch.from_numpy(v) for k, v in examples(6).items()}
    value, figures = per_example(TASK, forward, batch)
    assert len(calls) == 1
    assert value.requires_grad
    assert not any(f.requires_grad for f in figures.values())

    doubled = Task(TASK.build, losses, lambda m, b: {"mean": m(2 * b["x"]).mean(-1)})
    found = per_example(doubled, forward, batch)[1]["mean"]
    assert len(calls) == 3
    torch.testing.assert_close(found, module(2 * batch["x"]).mean(-1).detach())
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("task", "what"),
    [
        (TASK._replace(losses=lambda m, b: losses(m, b).mean()), "losses .*shape"),
        (TASK._replace(metrics=lambda m, b: {"top": m(b["x"])}), "metric 'top'"),
    ],
)
def test_a_wrong_shape_is_an_input_error(task, what):
    with pytest.raises(InputError, match=what):
        evaluate(task, nn.Linear(4, 3), examples(6))
