"""A server of real sites commits every round, whatever a simulation may save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, TrainPlan, Updates
from umbel.core.run_file import resolve
from umbel.datasets.federated import Info
from umbel.server.records import RoundRecord
from umbel.server.serve import serve
from umbel.server.store import RunStore


class Sites:
    """Two sites whose updates are small and always the same."""

    def clients(self) -> Sequence[str]:
        return ["a", "b"]

    def examples(self) -> Sequence[int]:
        return [3, 5]

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure]:
        for client in plan.clients:
            delta = {n: torch.full((1, *t.shape), 0.1) for n, t in plan.model.tensors().items()}
            yield Updates(plan.round, [client], delta, torch.ones(1, dtype=torch.float64))

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        for client in plan.clients:
            yield Evaluation(client, 2, {"loss": 1.0})

    def plan_record(self) -> dict[str, object]:
        return {}

    def close(self) -> None: ...


def test_every_round_is_committed_before_it_is_shown(tmp_path: Path) -> None:
    run = resolve(
        {
            "run": {"rounds": 4, "store": str(tmp_path), "checkpoint_seconds": 3600.0},
            "data": {"name": "digits"},
            "task": {"kind": "classification", "model": {"name": "logistic"}},
        }
    )
    begun: list[str] = []
    committed: list[tuple[int, int]] = []
    reader = RunStore(tmp_path)

    def shown(record: RoundRecord) -> None:
        committed.append((record.round, len(reader.history(begun[0]))))

    shape = Info("x", (2, 2), 3)
    serve(run, Sites(), shape, engine="sites", on_start=begun.append, on_round=shown)
    reader.close()
    assert committed == [(n, n) for n in (1, 2, 3, 4)]
