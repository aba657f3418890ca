"""Episodes and the methods that learn from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model
from umbel.datasets.episodes import Classes, Episodes
from umbel.datasets.federated import Info
from umbel.server.records import Scores
from umbel.server.rounds import Start, rounds
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.engines.vectorised import vectorised
from umbel.simulations.prepare import prepare
from umbel.tasks.evaluate import evaluate
from umbel.tasks.kinds.few_shot import few_shot, matching, prototypical


def test_an_episode_has_its_order_and_no_example_twice() -> None:
    labels = np.random.default_rng(0).integers(0, 30, 400)
    episodes = Episodes(ways=5, shots=2, queries=3)
    classes = Classes.of(labels, episodes, "client 'c0'")
    seen = set()
    for number in range(200):
        rows = episodes.draw(randomness.key(1, "test", number), classes)
        assert len(set(rows.tolist())) == episodes.size == 25
        known, asked = labels[rows[:10]].reshape(5, 2), labels[rows[10:]].reshape(5, 3)
        assert (known == known[:, :1]).all()
        assert (asked == known[:, :1]).all()
        assert len(set(known[:, 0].tolist())) == 5
        seen.update(known[:, 0].tolist())
    assert len(seen) == sum(np.bincount(labels) >= 5)
    again = episodes.draw(randomness.key(1, "test", 199), classes)
    assert (again == rows).all()


def test_too_few_classes_are_refused() -> None:
    labels = np.repeat(np.arange(6), [9, 9, 9, 9, 2, 1])
    with pytest.raises(InputError, match="client 'c0': 4 of 6 classes have 4 examples"):
        Classes.of(labels, Episodes(5, 1, 3), "client 'c0'")


def test_the_comparisons_are_those_of_the_papers() -> None:
    torch.manual_seed(0)
    support, queries = torch.randn(3, 4, 5), torch.randn(7, 5)
    near, attended = prototypical(support, queries), matching(support, queries)
    for q, query in enumerate(queries):
        weights = torch.tensor(
            [[torch.cosine_similarity(query, s, dim=0).exp() for s in way] for way in support]
        )
        for way in range(3):
            distance = sum((query - support[way].mean(0)) ** 2)
            torch.testing.assert_close(near[q, way], -distance)
            torch.testing.assert_close(
                attended[q, way].exp(), weights[way].sum() / weights.sum(), rtol=1e-5, atol=1e-6
            )


INFO = Info("toy", (4,), classes=12)


@pytest.mark.parametrize("method", ["prototypical", "matching", "gradient"])
def test_figures_are_those_of_the_queries(method: Any) -> None:
    task = few_shot(INFO, "logistic", method=method, ways=3, shots=2, queries=4, test_queries=4)
    assert task.test is not None
    torch.manual_seed(2)
    model = nn.Linear(4, 3)
    batch = {"x": torch.randn(18, 4), "y": torch.zeros(18, dtype=torch.int64)}
    figures = task.test.losses(model, batch)
    assert (figures[:6] == 0).all()
    out, labels = model(batch["x"]), torch.arange(3).repeat_interleave(4)
    if method == "gradient":
        logits = out[6:]
    else:
        compare = {"prototypical": prototypical, "matching": matching}[method]
        logits = compare(out[:6].view(3, 2, 3), out[6:])
    loss = nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(figures.mean(), loss)
    right = (logits.argmax(1) == labels).float().mean()
    torch.testing.assert_close(task.test.metrics(model, batch)["accuracy"].mean(), right)


def test_evaluation_adapts_a_copy_to_each_episode() -> None:
    """Inputs tell the class exactly, but which logit it is only the support part says."""
    x = np.repeat(np.eye(12, dtype=np.float32), 8, axis=0)
    arrays = {"x": x, "y": np.repeat(np.arange(12), 8)}
    info = Info("toy", (12,), classes=12)
    shape: dict[str, Any] = {"method": "gradient", "ways": 4, "shots": 2, "test_queries": 3}
    shape["test_episodes"] = 40
    model = nn.Linear(12, 4)
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapted = few_shot(info, "logistic", **shape, adapt_steps=30, adapt_lr=1.0)
    count, metrics = evaluate(adapted, model, arrays)
    assert count == 40 * 20
    assert metrics["accuracy"] == pytest.approx(1.0)
    assert evaluate(adapted, model, arrays) == (count, metrics)
    plain = few_shot(info, "logistic", **shape, adapt_steps=1, adapt_lr=0.0)
    assert evaluate(plain, model, arrays)[1]["accuracy"] < 0.5
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def run_file(strategy: dict[str, Any], **task: Any) -> RunFile:
    return resolve(
        {
            "run": {"rounds": 2, "seed": 3},
            "data": {"name": "digits", "split": {"kind": "dirichlet", "alpha": 10.0, "clients": 5}},
            "task": {
                "kind": "few-shot",
                "model": {"name": "mlp", "hidden": [16]},
                "ways": 4,
                "shots": 2,
                "queries": 2,
                "test_queries": 5,
                "test_episodes": 20,
                **task,
            },
            "client": {"lr": 0.1, "device": "cpu"},
            "strategy": strategy,
        }
    )


def final(engine: Any, run: RunFile) -> Model:
    prepared = prepare(run)
    federation = engine(run, prepared.data, prepared.task, prepared.strategy.client)
    model, strategy = prepared.model(), prepared.strategy
    start = Start(0, model, strategy.init(model.params))
    try:
        found = list(rounds(run, strategy, federation, start, lambda r, m: Scores({}, {})))
    finally:
        federation.close()
    assert len(found[-1].record.participants) == 5
    return found[-1].model


@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ({"name": "fedavg"}, "prototypical"),
        ({"name": "reptile"}, "gradient"),
        ({"name": "maml", "support": 0.5, "inner_lr": 0.1}, "gradient"),
    ],
)
def test_both_engines_agree(strategy: dict[str, Any], method: str) -> None:
    run = run_file(strategy, method=method)
    left, right = final(sequential, run), final(vectorised, run)
    for name, tensor in left.params.items():
        torch.testing.assert_close(right.params[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_strategy_that_divides_batches_needs_the_method_for_it() -> None:
    with pytest.raises(InputError, match="is no episode of 16"):
        final(sequential, run_file({"name": "maml"}))
