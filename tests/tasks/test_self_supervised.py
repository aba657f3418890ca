"""Losses against plain loops, targets that stand still, and what embeddings are worth."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from torch import nn

from umbel.core import registry
from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.datasets.federated import Info
from umbel.simulations.located import located
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import simulate
from umbel.tasks.kinds.self_supervised import self_supervised
from umbel.tasks.self_supervised.losses import barlow_twins, cosine, simclr
from umbel.tasks.self_supervised.networks import Around, follow
from umbel.tasks.self_supervised.views import Views
from umbel.tasks.self_supervised.worth import linear_probe, nearest, spread


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)


def test_simclr_is_the_papers_loop() -> None:
    a, b = pair()
    z = [row / row.norm() for row in (*a, *b)]
    for i, found in enumerate(simclr(a, b, 0.5)):
        terms = []
        for one, partner in ((i, i + 5), (i + 5, i)):
            likeness = [math.exp(float(z[one] @ z[k]) / 0.5) for k in range(10)]
            others = sum(likeness) - likeness[one]
            terms.append(-math.log(likeness[partner] / others))
        assert float(found) == pytest.approx(sum(terms) / 2, abs=1e-9)


def test_barlow_twins_is_the_papers_sum() -> None:
    a, b = pair()
    x, y = a.numpy(), b.numpy()
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
    want = 0.0
    for i in range(3):
        for j in range(3):
            c = sum(x[n, i] * y[n, j] for n in range(5)) / 5
            want += (1 - c) ** 2 if i == j else 0.1 * c**2
    assert barlow_twins(a, b, 0.1).tolist() == pytest.approx([want] * 5)


def test_cosine_is_the_squared_distance_and_stops_at_the_target() -> None:
    a, b = pair()
    a.requires_grad_()
    b.requires_grad_()
    found = cosine(a, b)
    unit = a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, unit.square().sum(1))
    found.sum().backward()
    assert a.grad is not None
    assert a.grad.abs().max() > 0
    assert b.grad is None


def test_the_slow_copy_follows_exactly_and_neither_travels_nor_stays() -> None:
    torch.manual_seed(0)
    encoder = nn.Linear(4, 3)
    module = Around(encoder, 3, 2, 5, predicts=True, momentum=0.9)
    assert not any(name.startswith("target") for name in module.state_dict())
    assert not any(name.startswith("target") for name, _ in module.named_parameters())
    slow = module.target.copy.get_buffer("0.weight")
    with torch.no_grad():
        encoder.weight.add_(1.0)
    follow(module, 0)
    assert torch.equal(slow, encoder.weight)
    before = slow.clone()
    with torch.no_grad():
        encoder.weight.add_(1.0)
    follow(module, 1)
    torch.testing.assert_close(slow, 0.9 * before + 0.1 * encoder.weight.detach())
    x = torch.randn(6, 4)
    target = slice(3 + 2 + 2, None)
    far = module(x)[:, target] - module.projector(encoder(x))
    assert far.abs().max() > 1e-3
    assert torch.equal(module.eval()(x)[:, target], module.projector(encoder(x)))
    twin = copy.deepcopy(module).train()
    with torch.no_grad():
        twin.encoder.weight.zero_()
    follow(twin, 0)
    assert not twin.target.copy.get_buffer("0.weight").any()
    assert module.target.copy.get_buffer("0.weight").any()


def test_views_repeat_with_the_seed_and_still_ones_are_the_image() -> None:
    x = torch.rand(7, 2, 8, 8)
    torch.manual_seed(3)
    first, other = Views(flip=True)(x), Views(flip=True)(x)
    torch.manual_seed(3)
    assert torch.equal(Views(flip=True)(x), first)
    assert not torch.allclose(first, other)
    still = Views(crop=1.0, rotate=0.0, jitter=0.0, noise=0.0, drop=0.0)
    torch.testing.assert_close(still(x), x, atol=1e-5, rtol=0)
    assert torch.equal(still(x[:, 0, 0]), x[:, 0, 0])


def test_the_probe_equals_a_fit_without_each_example() -> None:
    torch.manual_seed(1)
    y = torch.arange(24) % 3
    h = torch.randn(24, 4) + 1.0 * nn.functional.one_hot(y, 4)
    found = linear_probe(h, y, 3)
    x = h.double().numpy()
    x = (x - x.mean(0)) / (x.std(0) + 1e-8)
    x = np.concatenate([x, np.ones((24, 1))], 1)
    target = np.eye(3)[y.numpy()]
    for i in range(24):
        rest = np.arange(24) != i
        fit = Ridge(alpha=24 * 1e-2, fit_intercept=False).fit(x[rest], target[rest])
        assert float(found[i]) == float(fit.predict(x[[i]])[0].argmax() == int(y[i]))
    assert 0 < float(found.mean()) < 1


def test_collapse_shows_in_the_spread() -> None:
    torch.manual_seed(0)
    assert float(spread(torch.ones(50, 8))[0]) == pytest.approx(0, abs=1e-6)
    assert float(spread(torch.randn(500, 8))[0]) == pytest.approx(1, abs=0.05)
    y = torch.arange(40) // 20
    near = torch.randn(40, 3) * 0.01 + torch.eye(3)[y]
    assert nearest(near, y, 2).tolist() == [1.0] * 40


def make(store: Path, **task: Any) -> RunFile:
    return resolve(
        {
            "run": {"rounds": 1, "store": str(store), "seed": 2},
            "data": {"name": "digits", "split": {"kind": "shards", "clients": 30}},
            "task": {"embedding": 8, **task},
            "client": {"lr": 0.05, "batch_size": 16},
            "strategy": {"name": "fedavg", "cohort": 2},
            "evaluate": {"per_client": False},
        }
    )


VIT = {"name": "vit", "patch": 2, "layers": 1, "width": 8, "heads": 2}


@pytest.mark.parametrize("method", registry.known("methods"))
def test_every_method_runs_and_repeats(tmp_path: Path, method: str) -> None:
    model: Any = VIT if method in ("mae", "i-jepa") else "logistic"
    run = make(tmp_path, kind="self-supervised", method=method, model=model)
    first, again = (simulate(run, engine="sequential") for _ in range(2))
    assert {"loss", "spread", "probe", "knn"} == first.metrics.keys()
    assert first.metrics == again.metrics
    assert first.history[0].training["spread"] > 0


def test_collapse_is_noted_in_each_rounds_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_collapsed.py").write_text(
        "from torch import nn\n\n\ndef encoder(info, outputs):\n"
        "    last = nn.Linear(64, outputs)\n    nn.init.zeros_(last.weight)\n"
        "    return nn.Sequential(nn.Flatten(), last)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = make(tmp_path, kind="self-supervised", method="simsiam", model="own_collapsed:encoder")
    run = run.model_copy(update={"client": run.client.model_copy(update={"lr": 1e-9})})
    record = simulate(run, engine="sequential").history[0]
    assert record.training["spread"] < 0.01
    assert "collapse" in record.note


def test_the_encoder_hands_over(tmp_path: Path) -> None:
    before = simulate(make(tmp_path, kind="self-supervised", model={"name": "mlp", "hidden": [8]}))
    after = resolve(
        {
            "run": {"rounds": 1, "store": str(tmp_path)},
            "data": {"name": "digits", "split": {"kind": "iid", "clients": 4}},
            "task": {
                "kind": "classification",
                "init_from": before.run_id,
                "model": {
                    "name": "encoder",
                    "of": {"name": "mlp", "hidden": [8]},
                    "embedding": 8,
                    "frozen": True,
                },
            },
            "client": {"lr": 0.1},
        }
    )
    built = prepare(located(after)).module.state_dict()
    learned = load_file(str(before.model))
    assert torch.equal(built["encoder.1.weight"], learned["encoder.1.weight"])
    assert load_file(str(simulate(after).model)).keys() == {"head.weight", "head.bias"}


def test_text_has_no_views() -> None:
    with pytest.raises(InputError, match="holds symbols"):
        self_supervised(Info("plays", (16,), vocabulary=60), None)
