"""Parts of a cohort that were gated and summed elsewhere."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence

import pytest
import torch

from umbel.core.payloads import Failure, Folded, TrainPlan, Updates
from umbel.core.run_file import Strategy
from umbel.core.trees import Model
from umbel.server.gate import Gate
from umbel.server.rounds import Cohort, Fold, collect
from umbel.strategies.build import build_strategy

SECTION = Strategy(name="fedadam", max_weight=4.0)
COMBINER = build_strategy(SECTION).combine
MODEL = Model({"w": torch.zeros(3)}, {})
CLIENTS = ["c0", "c1", "c2", "c3", "c4"]


def plan(clients: Sequence[str] = CLIENTS) -> TrainPlan:
    return TrainPlan(2, clients, MODEL, len(clients), fold=Fold(SECTION, 4.0))


def update(client: str, value: float | None = None) -> Updates:
    number = int(client[1:])
    delta = {"w": torch.full((1, 3), float(number) if value is None else value)}
    weights = torch.tensor([number + 1.0], dtype=torch.float64)
    return Updates(2, [client], delta, weights, {"loss": weights + 0.5})


def folded(clients: Sequence[str], items: Sequence[Updates | Failure] | None = None) -> Folded:
    whole = plan()
    assert whole.fold is not None
    # As a worker gets it.
    fold = pickle.loads(pickle.dumps(whole.fold))
    stream = iter([update(c) for c in clients] if items is None else items)
    return fold(whole.part(clients), stream)


def collected(stream: Iterator[Updates | Failure | Folded]) -> Cohort:
    gate = Gate(2, CLIENTS, MODEL.tensors(), 4.0)
    return collect(stream, gate, COMBINER, plan(), "examples")


def test_parts_come_to_what_the_whole_does_in_the_order_of_the_plan() -> None:
    whole = collected(iter([update(c) for c in CLIENTS]))
    # Through pickle, as from a worker.
    parts = [pickle.loads(pickle.dumps(folded(c))) for c in (["c4", "c0"], ["c3"], ["c2", "c1"])]
    merged = collected(iter(parts))
    assert merged.participants == whole.participants == CLIENTS
    assert merged.capped == whole.capped == ["c4"]
    assert merged.training() == pytest.approx(whole.training())
    left, right = COMBINER.finish(merged.sums), COMBINER.finish(whole.sums)
    assert (left.weight, left.clients) == (right.weight, right.clients)
    torch.testing.assert_close(left.delta["w"], right.delta["w"])


def test_parts_and_single_updates_may_come_together() -> None:
    mixed = collected(iter([folded(["c3", "c4"]), update("c1"), Failure("c0", "gone")]))
    assert mixed.participants == ["c1", "c3", "c4"]
    assert mixed.failures == [Failure("c0", "gone")]


def test_the_gate_stands_before_the_sum_of_a_part() -> None:
    items = [update("c0"), update("c1", float("nan")), update("c4"), update("c0", 9.0)]
    part = folded(["c0", "c1"], items)
    assert part.participants == ["c0"]
    cohort = collected(iter([part]))
    assert {f.client: f.reason for f in cohort.failures} == {
        "c1": "delta 'w' has 3 value(s) NaN or infinite",
        "c4": "was not asked in this round",
        "c0": "answered twice; the first answer stands",
    }
    assert torch.equal(COMBINER.finish(cohort.sums).delta["w"], torch.zeros(3).double())


def test_a_part_that_was_not_asked_for_is_a_defect() -> None:
    with pytest.raises(ValueError, match="round 2: not a part of the cohort"):
        collected(iter([folded(CLIENTS), folded(["c1"])][::-1]))
