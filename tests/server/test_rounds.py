from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from umbel.core.errors import InputError, NotNowError, RunError
from umbel.core.messages import NOT_NOW
from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, TrainPlan, Updates
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model
from umbel.server.records import RoundRecord, RoundResult, Scores
from umbel.server.rounds import Start, rounds
from umbel.strategies.build import build_strategy


class Scripted:
    """A federation whose clients do what ``script(round, client)`` says.

    A number is a delta of that value, a string is a failure with that reason, an ``Updates`` is
    delivered as it is.
    """

    def __init__(self, script: Callable[[int, str], Any], sizes: Sequence[int]) -> None:
        self.script, self.sizes = script, sizes
        self.asked: list[str] = []
        self.closed = 0

    def clients(self) -> list[str]:
        return [f"c{k}" for k in range(len(self.sizes))]

    def examples(self) -> Sequence[int]:
        return self.sizes

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure]:
        try:
            for client in plan.clients:
                self.asked.append(client)
                what = self.script(plan.round, client)
                if isinstance(what, str):
                    yield Failure(client, what)
                elif isinstance(what, Updates):
                    yield what
                else:
                    yield update(plan.round, client, what, self.sizes[int(client[1:])])
        finally:
            self.closed += 1

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        yield from ()

    def close(self) -> None: ...


def update(number: int, client: str, value: float, weight: float) -> Updates:
    delta = {
        "w": torch.full((1, 2), value),
        "mean": torch.full((1, 3), value),
        "count": torch.full((1,), 2, dtype=torch.int64),
    }
    return Updates(
        number,
        [client],
        delta,
        torch.tensor([weight], dtype=torch.float64),
        {"loss": torch.tensor([value], dtype=torch.float64)},
    )


def start() -> Model:
    return Model(
        {"w": torch.zeros(2)}, {"mean": torch.ones(3), "count": torch.tensor(5, dtype=torch.int64)}
    )


def run_file(rounds: int = 1, **strategy: Any) -> RunFile:
    return resolve(
        {
            "run": {"rounds": rounds},
            "data": {"name": "digits"},
            "task": {"kind": "classification"},
            "strategy": strategy,
        }
    )


def loop(federation: Scripted, run: RunFile, scores: Any = None) -> Iterator[RoundResult]:
    strategy = build_strategy(run.strategy)
    evaluate = scores or (lambda r, m: Scores({}, {}))
    return rounds(run, strategy, federation, Start(0, start(), {}), evaluate)


def go(federation: Scripted, run: RunFile, scores: Any = None) -> list[RoundResult]:
    return list(loop(federation, run, scores))


def test_the_mean_is_weighted_by_examples_or_uniform() -> None:
    federation = Scripted(lambda r, c: {"c0": 1.0, "c1": 3.0}[c], [10, 30])
    [weighted] = go(federation, run_file())
    torch.testing.assert_close(weighted.model.params["w"], torch.full((2,), 2.5))
    [plain] = go(federation, run_file(weights="uniform"))
    torch.testing.assert_close(plain.model.params["w"], torch.full((2,), 2.0))
    assert weighted.record.training == {"loss": 2.5}
    assert weighted.record.participants == ["c0", "c1"]


def test_buffers_are_averaged_not_stepped_and_keep_their_dtype() -> None:
    federation = Scripted(lambda r, c: 2.0, [1, 1])
    [result] = go(federation, run_file(server_lr=0.5))
    torch.testing.assert_close(result.model.params["w"], torch.full((2,), 1.0))
    torch.testing.assert_close(result.model.buffers["mean"], torch.full((3,), 3.0))
    assert result.model.buffers["count"].dtype == torch.int64
    assert result.model.buffers["count"] == 7


def test_a_bad_client_is_named_and_the_round_goes_on() -> None:
    def script(r: int, c: str) -> Any:
        return {"c0": 1.0, "c1": float("nan"), "c2": "out of memory", "c3": 1.0}[c]

    [result] = go(Scripted(script, [5, 5, 5, 5]), run_file())
    assert result.record.participants == ["c0", "c3"]
    assert {f.client: f.reason for f in result.record.failures} == {
        "c1": "delta 'w' has 2 value(s) NaN or infinite",
        "c2": "out of memory",
    }
    torch.testing.assert_close(result.model.params["w"], torch.ones(2))


def test_a_claimed_weight_cannot_take_the_mean_over() -> None:
    def script(r: int, c: str) -> Any:
        return update(r, c, 100.0, 1e12) if c == "c0" else 0.0

    [result] = go(Scripted(script, [10] * 20), run_file())
    assert result.record.capped == ["c0"]
    assert result.model.params["w"][0] < 100 * 100 / (100 + 190) + 1e-4


def test_quorum_missed_leaves_the_model_and_the_run_goes_on() -> None:
    def script(r: int, c: str) -> Any:
        return "gone" if r == 1 and c != "c0" else 1.0

    first, second = go(Scripted(script, [1, 1, 1]), run_file(rounds=2, quorum=2))
    assert first.record.note == "quorum missed: 1 of 2 (gone); the model stays"
    assert first.record.participants == ["c0"]
    torch.testing.assert_close(first.model.params["w"], torch.zeros(2))
    torch.testing.assert_close(second.model.params["w"], torch.ones(2))


def test_reserves_are_asked_only_for_those_who_fail() -> None:
    run = run_file(cohort=4, over_selection=0.5)
    calm = Scripted(lambda r, c: 1.0, [1] * 10)
    [result] = go(calm, run)
    assert len(result.record.participants) == 4
    assert calm.asked == result.record.participants
    failing = Scripted(lambda r, c: "gone" if c in calm.asked[:2] else 1.0, [1] * 10)
    [result] = go(failing, run)
    assert len(result.record.participants) == 4
    assert len(result.record.failures) == 2
    assert len(failing.asked) == 6


def test_a_stack_of_more_clients_than_wanted_is_cut() -> None:
    class Stacked(Scripted):
        def train(self, plan: TrainPlan) -> Iterator[Updates | Failure]:
            one = update(plan.round, "x", 1.0, 1.0)
            n = len(plan.clients)
            delta = {k: t.expand(n, *t.shape[1:]) for k, t in one.delta.items()}
            yield Updates(plan.round, plan.clients, delta, torch.ones(n).double())

    [result] = go(Stacked(lambda r, c: 1.0, [1] * 10), run_file(cohort=4, over_selection=1.0))
    assert len(result.record.participants) == 4


def test_the_federation_s_stream_is_closed_every_round() -> None:
    federation = Scripted(lambda r, c: 1.0, [1] * 10)
    go(federation, run_file(rounds=3, cohort=2, over_selection=2.0))
    assert federation.closed == 3


def test_three_rounds_without_anybody_end_the_run_with_the_reason() -> None:
    federation = Scripted(lambda r, c: "disk full", [1, 1])
    seen: list[RoundRecord] = []
    with pytest.raises(
        RunError, match=r"no valid update in 3 round.s. in a row; client 'c0': disk"
    ):
        seen.extend(result.record for result in loop(federation, run_file(rounds=10)))
    assert [r.round for r in seen] == [1, 2, 3]


def test_a_round_at_an_hour_at_which_nobody_takes_part_is_not_spent() -> None:
    seen: list[RoundRecord] = []
    answers = {1: 1.0, 2: NOT_NOW}
    late = Scripted(lambda r, c: answers[r] if c == "c0" else "crashed", [1, 1])
    with pytest.raises(NotNowError, match="round 2: nobody takes part at this hour"):
        seen.extend(result.record for result in loop(late, run_file(rounds=3)))
    assert [r.round for r in seen] == [1]


def test_a_step_that_overflows_is_not_taken() -> None:
    [result] = go(Scripted(lambda r, c: 3e38, [1]), run_file(server_lr=10.0))
    assert result.record.note == "the step would overflow; the model stays"
    torch.testing.assert_close(result.model.params["w"], torch.zeros(2))


@pytest.mark.parametrize(("every", "when"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (0, [5])])
def test_evaluation_falls_due(every: int, when: list[int]) -> None:
    run = run_file(rounds=5)
    run = run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"every": every})})
    scores = lambda r, m: Scores({"round": float(r)}, {})  # noqa: E731
    results = go(Scripted(lambda r, c: 1.0, [1]), run, scores)
    assert [r.record.round for r in results if r.record.metrics] == when


def test_a_run_continued_from_any_round_is_the_run_itself() -> None:
    run = run_file(rounds=6, name="fedadam", cohort=3)
    strategy = build_strategy(run.strategy)

    def script(r: int, c: str) -> float:
        return (r * 7 + int(c[1:]) * 3) % 5 - 1.5

    def results(begin: Start) -> Iterator[RoundResult]:
        federation = Scripted(script, [3, 1, 4, 1, 5])
        return rounds(run, strategy, federation, begin, lambda r, m: Scores({}, {}))

    model = start()
    whole = list(results(Start(0, model, strategy.init(model.params))))
    for stop in range(1, 6):
        done = list(itertools.islice(results(Start(0, model, strategy.init(model.params))), stop))[
            -1
        ]
        rest = list(results(Start(done.record.round, done.model, done.state)))
        assert torch.equal(rest[-1].model.params["w"], whole[-1].model.params["w"])
        assert [r.record.participants for r in rest] == [
            r.record.participants for r in whole[stop:]
        ]


def test_a_cohort_above_the_federation_is_refused() -> None:
    with pytest.raises(InputError, match="cohort = 5 is more than the 2 clients"):
        go(Scripted(lambda r, c: 1.0, [1, 1]), run_file(cohort=5))


def test_records_go_through_json() -> None:
    def script(r: int, c: str) -> Any:
        return "gone" if c == "c0" else 1.0

    def scores(r: int, m: Model) -> Scores:
        return Scores({"accuracy": 0.5}, {"c1": {"accuracy": 0.25}})

    [result] = go(Scripted(script, [1, 1]), run_file(), scores)
    table = result.record.as_json()
    assert RoundRecord.from_json(table).as_json() == table
    assert table["failures"] == [{"client": "c0", "reason": "gone"}]
