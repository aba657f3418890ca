"""Whose figures an evaluation shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from torch import nn

from umbel.core.payloads import EvaluatePlan, Evaluation
from umbel.core.run_file import resolve
from umbel.core.trees import Model
from umbel.server.evaluation import MANY, evaluation
from umbel.tasks.task import Task


class Fleet:
    """Clients whose accuracy is their number."""

    def __init__(self, clients: int) -> None:
        self._names = [f"c{k:04}" for k in range(clients)]

    def clients(self) -> Sequence[str]:
        return self._names

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation]:
        for number, client in enumerate(plan.clients):
            yield Evaluation(client, 2, {"accuracy": float(number)})


@pytest.mark.parametrize(
    ("clients", "asked", "shown"),
    [(MANY, None, MANY), (MANY + 1, None, 0), (MANY + 1, True, MANY + 1), (3, False, 0)],
)
def test_each_client_is_listed_where_they_are_few_or_asked_for(
    clients: int, asked: bool | None, shown: int
) -> None:
    table: dict[str, Any] = {"data": {"name": "digits"}, "task": {"kind": "classification"}}
    run = resolve({**table, "evaluate": {} if asked is None else {"per_client": asked}})
    task = Task(nn.Identity, lambda forward, batch: batch["x"], lambda forward, batch: {})
    scores = evaluation(run, Fleet(clients), task, nn.Identity(), None, "cpu")(1, Model({}, {}))  # type: ignore[arg-type]
    assert len(scores.per_client) == shown
    assert scores.metrics == {"accuracy": (clients - 1) / 2}
