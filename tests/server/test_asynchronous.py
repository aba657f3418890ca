"""Asynchronous runs: limits, the clock, staleness worked out by hand, and going on bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from umbel.core.errors import InputError, RunError
from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, TrainPlan, Updates
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model
from umbel.server.asynchronous import asynchronous
from umbel.server.clock import Period, course
from umbel.server.in_flight import restored, stored
from umbel.server.records import RoundRecord, RoundResult, Scores
from umbel.server.rounds import Start
from umbel.simulations.simulate import Outcome, simulate
from umbel.strategies.build import build_strategy
from umbel.strategies.parts.asynchronous import Asynchronous, Speed, discount


def digits(store: Path, strategy: dict[str, Any], clients: int = 8, **run: Any) -> RunFile:
    return resolve(
        {
            "run": {"rounds": 6, "seed": 4, "store": str(store), "checkpoint_seconds": 0, **run},
            "data": {"name": "digits", "split": {"kind": "iid", "clients": clients}},
            "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [16]}},
            "client": {"lr": 0.2},
            "strategy": strategy,
            "evaluate": {"every": 0},
        }
    )


def model(outcome: Outcome) -> bytes:
    assert outcome.model is not None
    return Path(outcome.model).read_bytes()


PINNED = {"processes": 0, "engine_plan": "lean"}


def test_fedbuff_of_whole_cohorts_at_equal_speed_is_fedavg(tmp_path: Path) -> None:
    common = {"cohort": 4, "server_lr": 0.5}
    alike = {"name": "fedbuff", "buffer": 4, "speed": "equal", **common}
    buffered = simulate(digits(tmp_path, alike, **PINNED))
    averaged = simulate(digits(tmp_path, {"name": "fedavg", **common}, **PINNED))
    one, other = load(model(buffered)), load(model(averaged))
    for name, tensor in one.items():  # a round's groups are summed apart: other last bits
        torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=1e-7)
    both = zip(buffered.history, averaged.history, strict=True)
    assert all(b.participants == a.participants for b, a in both)
    assert [r.virtual_time for r in buffered.history] == [1, 2, 3, 4, 5, 6]
    assert all(set(r.staleness) == {0} for r in buffered.history)


def test_fedasync_of_one_client_that_replaces_the_model_is_plain_training(tmp_path: Path) -> None:
    alone = {"name": "fedasync", "alpha": 1.0}
    replaced = simulate(digits(tmp_path, alone, clients=1, **PINNED))
    trained = simulate(digits(tmp_path, {"name": "fedavg"}, clients=1, **PINNED))
    assert model(replaced) == model(trained)


class Scripted:
    """Clients that move the model by their number, whatever they are given."""

    def __init__(self, clients: int, failing: Sequence[str] = ()) -> None:
        self.names = [f"c{k}" for k in range(clients)]
        self.failing = failing
        self.plans: list[TrainPlan] = []

    def clients(self) -> Sequence[str]:
        return self.names

    def examples(self) -> Sequence[int]:
        return [1] * len(self.names)

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure]:
        self.plans.append(plan)
        for client in plan.clients:
            if client in self.failing:
                yield Failure(client, "out of memory")
            else:
                delta = {"w": torch.tensor([[float(client[1:])]])}
                yield Updates(plan.round, [client], delta, torch.ones(1, dtype=torch.float64))

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        yield from ()

    def plan_record(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


def go(federation: Scripted, rounds: int, **strategy: Any) -> list[RoundResult]:
    run = resolve(
        {
            "run": {"rounds": rounds},
            "data": {"name": "digits"},
            "task": {"kind": "classification"},
            "strategy": strategy,
        }
    )
    start = Start(0, Model({"w": torch.zeros(1)}, {}), {})
    built = build_strategy(run.strategy)
    return list(asynchronous(run, built, federation, start, lambda r, m: Scores({}, {})))


def test_stale_deltas_count_for_less_by_the_papers_rule() -> None:
    common = {"name": "fedbuff", "buffer": 2, "speed": "exponential"}
    results = go(Scripted(6), 30, **common)
    w = 0.0
    for result in results:
        record = result.record
        came = zip(record.participants, record.staleness, strict=True)
        w += sum(int(client[1:]) * (1 + late) ** -0.5 for client, late in came) / 2
        torch.testing.assert_close(result.model.params["w"], torch.tensor([w]), rtol=1e-5, atol=0)
    assert max(max(r.record.staleness) for r in results) > 2


def test_fedasync_pulls_towards_the_model_that_the_client_made() -> None:
    common = {"name": "fedasync", "alpha": 0.5, "staleness": "hinge", "a": 1.0, "b": 1}
    federation = Scripted(4)
    results = go(federation, 25, speed="exponential", **common)
    given = {p.round - 1: float(p.model.params["w"]) for p in federation.plans}
    versions, w = [0.0], 0.0
    for number, result in enumerate(results):
        (client,) = result.record.participants
        (late,) = result.record.staleness
        alpha = 0.5 * (1.0 if late <= 1 else 1 / late)
        w = (1 - alpha) * w + alpha * (versions[number - late] + int(client[1:]))
        versions.append(w)
        torch.testing.assert_close(float(result.model.params["w"]), w, rtol=1e-4, atol=1e-5)
    assert all(versions[v] == pytest.approx(w, rel=1e-4) for v, w in given.items())


@settings(max_examples=40)
@given(
    st.integers(1, 12),
    st.data(),
    st.sampled_from(["equal", "lognormal", "exponential"]),
    st.integers(0, 5),
)
def test_the_clock_is_fair_and_whole(n: int, data: st.DataObject, speed: Speed, seed: int) -> None:
    concurrency = data.draw(st.integers(1, n))
    buffer = data.draw(st.integers(1, concurrency))
    rule = Asynchronous(None, buffer, lambda t: 1.0, False, speed, 1.0)
    names = [f"c{i:02d}" for i in range(n)]
    periods = list(itertools.islice(course(names, rule, concurrency, seed), 30))
    assert periods == list(itertools.islice(course(names, rule, concurrency, seed), 30))
    away: set[tuple[str, int]] = set()
    time = 0.0
    for period in periods:
        begun = {(client, period.version) for client in period.starts}
        assert len(begun) == len(period.starts)
        away |= begun
        assert len(away) <= concurrency + len(period.arrivals)
        assert len(period.arrivals) == buffer
        for arrival in period.arrivals:
            away.remove((arrival.client, arrival.version))
            assert arrival.time >= time
            time = arrival.time
        assert len(away) <= concurrency
        assert len({client for client, _ in away}) == len(away)


def test_fast_clients_come_back_more_often_and_equal_ones_as_often() -> None:
    names = [f"c{i}" for i in range(10)]

    def counts(speed: Speed) -> list[int]:
        rule = Asynchronous(None, 2, lambda t: 1.0, False, speed, 1.0)
        periods: list[Period] = list(itertools.islice(course(names, rule, 10, 1), 200))
        back = [a.client for p in periods for a in p.arrivals]
        return sorted(back.count(name) for name in names)

    assert counts("equal") == [40] * 10
    slow, *_, fast = counts("lognormal")
    assert fast > 4 * slow


@pytest.mark.parametrize(("kind", "late"), [("constant", 1.0), ("polynomial", 0.5), ("hinge", 0.4)])
def test_discounts_begin_at_one(kind: Any, late: float) -> None:
    rule = discount(kind, 0.5, 0)
    assert rule(0) == 1.0
    assert rule(3) == late


@pytest.mark.parametrize("name", ["fedbuff", "fedasync"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    strategy = {"name": name, "cohort": 5, "speed": "exponential"}
    strategy |= {"buffer": 2} if name == "fedbuff" else {}
    run = digits(tmp_path, strategy, **PINNED)
    whole = simulate(run)

    def stop(record: RoundRecord, rounds: int) -> None:
        if record.round == 3:
            raise KeyboardInterrupt

    stopped = simulate(run, on_round=stop)
    assert stopped.status == "interrupted"
    resumed = simulate(run, resume=stopped.run_id)
    assert resumed.status == "finished"
    assert model(resumed) == model(whole)
    shown = [{**r.as_json(), "seconds": 0} for r in resumed.history]
    assert shown == [{**r.as_json(), "seconds": 0} for r in whole.history]


def test_what_is_in_flight_goes_through_tensors() -> None:
    delta = {"w": torch.randn(1, 2), "n": torch.tensor([3])}
    one = Updates(7, ["c1"], delta, torch.ones(1, dtype=torch.float64), {"loss": torch.rand(1)})
    flight = {("c1", 6): one, ("c0", 2): Failure("c0", "died"), ("c1", 4): one}
    back = restored(stored(flight))
    assert list(back) == list(flight)
    assert back["c0", 2] == Failure("c0", "died")
    same = back["c1", 4]
    assert isinstance(same, Updates)
    assert (same.round, same.clients) == (7, ["c1"])
    assert torch.equal(same.delta["w"], delta["w"])
    assert torch.equal(same.metrics["loss"], one.metrics["loss"])
    assert stored({}) == {}


def test_a_failure_takes_its_place_in_the_buffer_and_is_named() -> None:
    results = go(Scripted(3, failing=["c1"]), 9, name="fedbuff", buffer=3, speed="equal")
    for result in results:
        assert result.record.participants == ["c0", "c2"]
        assert result.record.failures == [Failure("c1", "out of memory")]
    assert float(results[0].model.params["w"]) == 1.0


def test_a_run_in_which_nobody_delivers_ends() -> None:
    with pytest.raises(RunError, match="no valid update in 3 round"):
        go(Scripted(2, failing=["c0", "c1"]), 9, name="fedbuff", buffer=1)


class Remote(Scripted):
    """Clients whose replies come after as many looks as their number says."""

    def attend(self, plan: TrainPlan) -> Iterator[Updates | Failure | None]:
        left = {client: int(client[1:]) for client in plan.clients}
        replies = {}
        for item in self.train(plan):
            replies[item.client if isinstance(item, Failure) else item.clients[0]] = item
        while left:
            for client in [c for c, looks in left.items() if looks <= 0]:
                del left[client]
                yield replies[client]
            left = {client: looks - 1 for client, looks in left.items()}
            if left:
                yield None


def test_in_real_time_the_server_takes_replies_as_they_come() -> None:
    federation = Remote(4, failing=["c3"])
    results = go(federation, 12, name="fedbuff", buffer=2, speed="real", staleness="constant")
    assert [r.record.round for r in results] == list(range(1, 13))
    w = 0.0
    for result in results:
        came = result.record.participants
        assert len(came) + len(result.record.failures) == 2
        w += sum(int(client[1:]) for client in came) / len(came)
        assert float(result.model.params["w"]) == pytest.approx(w)
    ages = [age for r in results for age in r.record.staleness]
    assert 0 in ages
    assert max(ages) > 0
    assert any(r.record.failures == [Failure("c3", "out of memory")] for r in results)
    assert all(r.record.virtual_time is None for r in results)


def test_real_time_needs_remote_clients() -> None:
    with pytest.raises(InputError, match="waits for remote clients"):
        go(Scripted(2), 2, name="fedbuff", buffer=1, speed="real")


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"buffer": 5}, "buffer = 5, and it must be at least 1 and at most the 4 clients"),
        ({"buffer": 1, "concurrency": 9}, "concurrency = 9 is more than the 4 clients"),
    ],
)
def test_what_cannot_be_is_refused(strategy: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        go(Scripted(4), 2, name="fedbuff", **strategy)


def test_many_slow_clients_still_find_the_optimum(tmp_path: Path) -> None:
    strategy = {"name": "fedbuff", "buffer": 3, "concurrency": 8}
    run = digits(tmp_path, strategy, **{**PINNED, "rounds": 40})
    assert simulate(run).metrics["accuracy"] > 0.7
