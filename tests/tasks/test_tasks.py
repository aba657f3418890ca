from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from umbel.core import registry
from umbel.core.errors import InputError
from umbel.core.run_file import resolve
from umbel.datasets.federated import Info
from umbel.tasks.build import build_task, initial_module, model_of
from umbel.tasks.task import Task

MNIST = Info("mnist", (1, 28, 28), classes=10)
CIFAR = Info("cifar10", (3, 32, 32), classes=10)
TABLE = Info("table", (13,), classes=2)
HOUSES = Info("houses", (5,), targets=3)
TEXT = Info("text", (80,), classes=65, vocabulary=65)


def task(info: Info, kind: str = "classification", **table: Any) -> Task:
    base = {"data": {"name": "digits"}, "task": {"kind": kind, **table}}
    return build_task(resolve(base).task, info)


def parameters(task: Task) -> int:
    return sum(p.numel() for p in initial_module(task, 0).parameters())


@pytest.mark.parametrize(
    ("info", "model", "count"),
    [
        (MNIST, "2nn", 199_210),  # McMahan et al. 2017, section 3
        (MNIST, "cnn", 1_663_370),  # ditto
        (MNIST, "logistic", 7_850),
        (TABLE, "logistic", 14),
        (MNIST, {"name": "cnn", "channels": [16, 32], "kernel": 3, "hidden": 40}, 67_970),
        (TABLE, {"name": "mlp", "hidden": [8, 4]}, 13 * 8 + 8 + 8 * 4 + 4 + 4 + 1),
        (TEXT, "char-lstm", 65 * 8 + 4 * 256 * (8 + 256 + 2 + 256 + 256 + 2) + 257 * 65),
    ],
)
def test_models_have_the_size_they_should(info: Info, model: Any, count: int) -> None:
    assert parameters(task(info, model=model)) == count


@pytest.mark.parametrize("model", sorted(registry.known("models")))
def test_every_model_gives_one_loss_and_one_metric_an_example(model: str) -> None:
    info = TEXT if model in ("char-lstm", "gpt", "transformers") else CIFAR
    needed: dict[str, dict[str, Any]] = {
        "transformers": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 24}},
        "encoder": {"of": "logistic"},
    }
    built = task(info, model={"name": model, **needed.get(model, {})})
    module = initial_module(built, 0)
    x = torch.randint(65, (3, 80)) if info is TEXT else torch.randn(3, 3, 32, 32)
    batch = {"x": x, "y": torch.tensor([0, 3, 9])}
    assert built.losses(module, batch).shape == (3,)
    assert built.metrics(module, batch)["accuracy"].shape == (3,)


def test_initial_models_are_a_function_of_the_seed_alone() -> None:
    built = task(MNIST, model="2nn")
    torch.manual_seed(5)
    one = model_of(initial_module(built, 1)).params
    state = torch.get_rng_state()
    two = model_of(initial_module(built, 1)).params
    assert torch.equal(state, torch.get_rng_state())
    other = model_of(initial_module(built, 2)).params
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["1.weight"], other["1.weight"])


def test_classification_losses_are_torchs() -> None:
    out, y = torch.randn(6, 10), torch.randint(10, (6,))
    built = task(MNIST, label_smoothing=0.1)
    losses = built.losses(lambda x: out, {"x": y, "y": y})
    torch.testing.assert_close(losses.mean(), F.cross_entropy(out, y, label_smoothing=0.1))
    accuracy = built.metrics(lambda x: out, {"x": y, "y": y})["accuracy"]
    assert accuracy.tolist() == (out.argmax(1) == y).float().tolist()


def test_two_classes_are_one_logit() -> None:
    z, y = torch.tensor([[-1.0], [2.0], [0.5]]), torch.tensor([0, 1, 0])
    built = task(TABLE)
    losses = built.losses(lambda x: z, {"x": z, "y": y})
    both = F.cross_entropy(torch.cat([-z / 2, z / 2], 1), y, reduction="none")
    torch.testing.assert_close(losses, both)
    assert built.metrics(lambda x: z, {"x": z, "y": y})["accuracy"].tolist() == [1, 1, 0]


def test_regression_losses_are_squared_errors() -> None:
    out, y = torch.randn(4, 3), torch.randn(4, 3)
    built = task(HOUSES, kind="regression")
    batch = {"x": y, "y": y}
    torch.testing.assert_close(built.losses(lambda x: out, batch).mean(), F.mse_loss(out, y))
    torch.testing.assert_close(built.metrics(lambda x: out, batch)["mae"].mean(), F.l1_loss(out, y))


def test_a_column_of_targets_is_not_broadcast() -> None:
    info = Info("houses", (5,))
    built = task(info, kind="regression")
    out, y = torch.randn(4, 1), torch.randn(4)
    losses = built.losses(lambda x: out, {"x": y, "y": y})
    torch.testing.assert_close(losses, (out[:, 0] - y).square())


@pytest.mark.parametrize(
    ("info", "table", "message"),
    [
        (HOUSES, {"kind": "classification"}, "real-valued targets"),
        (MNIST, {"kind": "regression"}, "10 classes"),
        (MNIST, {"kind": "clasification"}, "did you mean 'classification'"),
        (MNIST, {"kind": "classification", "model": "cn"}, "unknown model 'cn'.*did you mean"),
        (MNIST, {"kind": "classification", "smoothing": 1}, "unknown key 'smoothing'"),
        (
            MNIST,
            {"kind": "classification", "model": {"name": "mlp", "widht": 3}},
            "unknown key 'widht' of model 'mlp'",
        ),
        (
            MNIST,
            {"kind": "classification", "model": {"name": "mlp", "hidden": [0]}},
            r"hidden\[0\] = 0: must be a whole number at least 1",
        ),
        (TABLE, {"kind": "classification", "model": "cnn"}, "takes images"),
        (TEXT, {"kind": "classification", "model": "mlp"}, "takes numbers"),
        (MNIST, {"kind": "classification", "model": "char-lstm"}, "takes symbols"),
        (MNIST, {"kind": "classification", "model": "no_such_module:Net"}, "cannot import"),
        (MNIST, {"kind": "classification", "model": "math:no_such"}, "has no 'no_such'"),
        (MNIST, {"kind": "classification", "model": "math:pi"}, "not callable"),
    ],
)
def test_wrong_tasks_and_models_are_one_clear_error(
    info: Info, table: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        initial_module(task(info, **table), 0)


def test_a_user_s_own_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, outputs, width=3):\n"
        "        super().__init__(nn.Linear(13, width), nn.Linear(width, outputs))\n"
        "def none():\n"
        "    return 7\n"
        "def frozen():\n"
        "    return nn.Linear(13, 1).requires_grad_(False)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    assert parameters(task(TABLE, model="own_models:Net")) == 13 * 3 + 3 + 3 + 1
    assert parameters(task(TABLE, model={"name": "own_models:Net", "width": 5})) == 13 * 5 + 11
    with pytest.raises(InputError, match="unknown key 'widht'"):
        task(TABLE, model={"name": "own_models:Net", "widht": 5})
    with pytest.raises(InputError, match="is a int, not a module"):
        parameters(task(TABLE, model="own_models:none"))
    with pytest.raises(InputError, match="nothing to train"):
        parameters(task(TABLE, model="own_models:frozen"))


def test_a_model_of_the_wrong_width_is_named() -> None:
    built = task(MNIST)
    batch = {"x": torch.zeros(2, 1, 28, 28), "y": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(
        InputError, match=r"gives shape \(2, 3\) for 2 examples, expected \(2, 10\)"
    ):
        built.losses(lambda x: torch.zeros(2, 3), batch)


def test_frozen_parameters_do_not_travel_and_buffers_do() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    module[0].weight.requires_grad_(False)
    model = model_of(module)
    assert set(model.params) == {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
    assert set(model.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
