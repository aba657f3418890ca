"""Codes, samples and groups: against plain formulas, and whole runs of a few rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from umbel.cli.main import run as command
from umbel.core.errors import InputError
from umbel.core.run_file import Part, RunFile, resolve
from umbel.core.trees import map_tree
from umbel.datasets.federated import Info
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import simulate
from umbel.tasks.build import initial_module
from umbel.tasks.generative.decode import discrepancy
from umbel.tasks.kinds.clip import clip
from umbel.tasks.kinds.gan import gan
from umbel.tasks.kinds.vae import vae

DIGITS = Info("digits", (1, 4, 4), classes=10)


def make(store: Path, rounds: int, task: dict[str, Any], **tables: Any) -> RunFile:
    base: dict[str, Any] = {
        "run": {"rounds": rounds, "store": str(store), "seed": 2},
        "data": {"name": "digits", "split": {"kind": "iid", "clients": 5}},
        "task": task,
        "client": {"optimizer": "adam", "lr": 2e-3, "batch_size": 32},
        "strategy": {"name": "fedavg", "cohort": 3},
        "evaluate": {"per_client": False, "every": 0},
    }
    return resolve(
        {name: {**base.get(name, {}), **table} for name, table in {**base, **tables}.items()}
    )


def test_a_vaes_loss_is_the_bound_by_numerical_integration() -> None:
    task = vae(Info("x", (2,)), "logistic", latent=1, decoder={"name": "mlp", "hidden": [3]})
    module = initial_module(task, 0)
    x = torch.tensor([[0.2, 0.9]])
    found = torch.stack([task.losses(module, {"x": x.expand(2000, 2)}).mean() for _ in range(5)])
    mean, log_variance = module(x, torch.zeros(1, 1))[0, :2]
    grid = torch.linspace(-8, 8, 4001)[:, None]
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    logits = module(None, grid)
    inside = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    ratio = q.log_prob(grid) - torch.distributions.Normal(0.0, 1.0).log_prob(grid)
    values = q.log_prob(grid).exp() * (inside.sum(1, keepdim=True) + ratio)
    want = torch.trapezoid(values[:, 0], grid[:, 0])
    assert float(found.mean()) == pytest.approx(float(want), abs=0.05)


def test_each_of_a_gans_trees_gets_the_gradient_of_its_own_loss() -> None:
    task = gan(DIGITS, Part(name="mlp", hidden=[6]), latent=3)
    module = initial_module(task, 0)
    x = torch.rand(5, 1, 4, 4)
    torch.manual_seed(4)
    task.losses(module, {"x": x}).mean().backward()
    torch.manual_seed(4)
    made = torch.sigmoid(module.generator(torch.randn(5, 3))).view_as(x)
    judge = module.discriminator
    of_judge = (F.softplus(-judge(x)) + F.softplus(judge(made.detach()))).mean()
    of_maker = F.softplus(-judge(made)).mean()
    for part, loss in ((judge, of_judge), (module.generator, of_maker)):
        params = list(part.parameters())
        for p, want in zip(params, torch.autograd.grad(loss, params), strict=True):
            torch.testing.assert_close(p.grad, want)


def test_the_discrepancy_tells_distributions_apart() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(400, 3), torch.randn(400, 3)
    assert abs(float(discrepancy(a, b)[0])) < 0.01
    assert float(discrepancy(a, b + 1)[0]) > 0.1
    assert float(discrepancy(a, b * 0.2)[0]) > 0.1


@pytest.mark.parametrize("kind", ["autoencoder", "vae", "gan"])
def test_makers_learn_and_are_drawn(tmp_path: Path, kind: str) -> None:
    task = {"kind": kind, "model": {"name": "mlp", "hidden": [32]}}
    run = make(tmp_path, 3, task)
    outcome = simulate(run, engine="sequential")
    first = simulate(make(tmp_path, 1, task, client={"lr": 1e-9}), engine="sequential")
    figure = "discrepancy" if kind == "gan" else "loss"
    assert outcome.metrics[figure] < first.metrics[figure]
    file = tmp_path / "samples.png"
    assert command(["plot", "--samples", outcome.run_id, str(file), "--store", str(tmp_path)]) == 0
    assert file.read_bytes()[1:4] == b"PNG"


def lloyd(x: np.ndarray[Any, Any], centroids: np.ndarray[Any, Any], rounds: int) -> Any:
    for _ in range(rounds):
        near = ((x[:, None] - centroids[None]) ** 2).sum(2).argmin(1)
        assert len(np.unique(near)) == len(centroids)
        centroids = np.stack([x[near == k].mean(0) for k in range(len(centroids))])
    return centroids


@pytest.mark.parametrize("private", [False, True])
def test_federated_k_means_is_lloyds(tmp_path: Path, private: bool) -> None:
    run = make(
        tmp_path,
        5,
        {"kind": "kmeans", "groups": 6, "centre": 0.3, "spread": 0.2},
        data={"split": {"kind": "shards", "clients": 4}},
        client={"batch_size": 50, "lr": 0.5},  # neither matters
        strategy={"name": "kmeans", "cohort": 4, "restart": 0.0, "max_weight": 400.0},
        secure_aggregation={"enabled": private},
    )
    prepared = prepare(run)
    x = prepared.data.train["x"].astype(np.float64).reshape(-1, 64)
    start = prepared.model().params["centroids"].double().numpy()
    want = lloyd(x, start, 5)
    outcome = simulate(run, engine="vectorised")
    found = _centroids(tmp_path, outcome.run_id)
    np.testing.assert_allclose(found, want, atol=1e-2 if private else 1e-5)


def _centroids(store: Path, run_id: str) -> Any:
    from umbel.server.store import RunStore

    saved = RunStore(str(store)).latest(run_id)
    assert saved is not None
    return map_tree(torch.Tensor.double, saved.model.params)["centroids"].numpy()


def test_empty_groups_restart_beside_the_largest(tmp_path: Path) -> None:
    run = make(
        tmp_path,
        8,
        {"kind": "kmeans", "groups": 10, "centre": 9.0, "spread": 0.1},
        client={"batch_size": "full"},
        strategy={"name": "kmeans", "cohort": 5},
    )
    outcome = simulate(run, engine="sequential")
    assert outcome.metrics["purity"] > 0.5


def test_clip_learns_what_sentences_mean(tmp_path: Path) -> None:
    task = {"kind": "clip", "model": {"name": "mlp", "hidden": [64]}}
    outcome = simulate(make(tmp_path, 6, task, client={"lr": 5e-3}), engine="sequential")
    assert outcome.metrics["zero_shot"] > 0.3


def test_names_and_symbols_are_asked_for() -> None:
    with pytest.raises(InputError, match="2 names for 10 classes"):
        clip(DIGITS, None, names=["a", "b"])
    with pytest.raises(InputError, match="holds symbols"):
        vae(Info("plays", (16,), vocabulary=60), None)
