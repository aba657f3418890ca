"""Asynchronous runs: the server steps when a few clients are back, and nobody waits for the slow.

A round is a server step. In virtual time (``server/clock.py``) who is back when is known before;
each client is trained from the version of the model that it was given, and counts for less the more
steps were taken since.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from umbel.core.errors import InputError
from umbel.core.payloads import Failure, Federation, States, TrainPlan, Updates
from umbel.core.run_file import RunFile
from umbel.core.trees import Model
from umbel.server.clock import candidates, course
from umbel.server.gate import Gate, weight_cap
from umbel.server.in_flight import own_models, restored, stored, weighed
from umbel.server.records import RoundRecord, RoundResult, Scores
from umbel.server.rounds import (
    EMPTY_ROUNDS,
    Cohort,
    Evaluate,
    Start,
    broadcast,
    is_finite,
    nobody,
    step,
    uniform,
)
from umbel.server.sampling import cohort_size
from umbel.strategies.parts import ServerState, Strategy
from umbel.strategies.parts.asynchronous import Asynchronous

FLIGHT = "in-flight"
"""The letter of the server's state that holds what clients have sent and nobody was given yet."""

SHORTEST, LONGEST = 0.01, 1.0
"""Seconds between two looks for replies."""


def asynchronous(
    run: RunFile,
    strategy: Strategy,
    federation: Federation,
    start: Start,
    evaluate: Evaluate,
    run_id: str = "",
    states: States | None = None,
) -> Iterator[RoundResult]:
    """Runs the server steps after ``start`` and yields each when it is done; as ``rounds``.

    What is in flight is part of the state, so that a run killed anywhere goes on, bit for bit.

    Raises:
        InputError: more clients in training than there are, or fewer than the buffer; privacy or
            secure aggregation, which need whole cohorts.
        RunError: three steps in a row, or all, without one valid update.
    """
    rule, concurrency = checked(run, strategy, len(federation.clients()))
    work = Work(run, strategy, federation, evaluate, run_id, states, rule)
    if rule.speed == "real":
        yield from live(work, start, concurrency)
        return
    _, model, state = start
    flight = restored(state.get(FLIGHT, {}))
    state = {letter: part for letter, part in state.items() if letter != FLIGHT}
    course_of_run = course(federation.clients(), rule, concurrency, run.run.seed)
    empty = Empty(run)
    for period in itertools.islice(course_of_run, start.round, run.run.rounds):
        began = time.perf_counter()
        if period.starts:
            plan = work.plan(period.version, period.starts, model, state)
            back = work.gated(plan, federation.train(plan))
            silent = {client: Failure(client, "did not answer") for client in period.starts}
            flight |= {(client, period.version): i for client, i in {**silent, **back}.items()}
        came = [
            (period.version - a.version, flight.pop((a.client, a.version))) for a in period.arrivals
        ]
        record, model, state = work.step(period.version, came, model, state)
        seconds = time.perf_counter() - began
        now = period.arrivals[-1].time
        record = replace(record, seconds=seconds, virtual_time=now)
        yield RoundResult(record, model, {**state, FLIGHT: stored(flight)})
        empty.check(record)


def live(work: Work, start: Start, concurrency: int) -> Iterator[RoundResult]:
    """Server steps as replies come. What is in flight when the server dies is asked for anew.

    Raises:
        InputError: the federation has no replies to wait for: its clients are simulated.
        RunError: as :func:`asynchronous`.
    """
    attend = getattr(work.federation, "attend", None)
    if attend is None:
        raise InputError(
            "speed = 'real' waits for remote clients, and these live in this process",
            where="[strategy]",
            fix="choose 'lognormal', or --engine flower",
        )
    version, model, state = start
    names, seed = work.federation.clients(), work.run.run.seed
    away: set[str] = set()
    asked: list[tuple[TrainPlan, Iterator[Updates | Failure | None]]] = []
    came: list[tuple[int, Updates | Failure]] = []
    line = candidates(names, concurrency, seed, version)
    empty = Empty(work.run)
    began, pause = time.perf_counter(), SHORTEST
    while version < work.run.run.rounds:
        room = concurrency - len(away)
        if fresh := sorted(itertools.islice((c for c in line if c not in away), room)):
            plan = work.plan(version, fresh, model, state)
            asked.append((plan, attend(plan)))
            away.update(fresh)
        still, before = [], len(came)
        for plan, replies in asked:
            for item in replies:
                if item is None:  # nobody else is back yet
                    still.append((plan, replies))
                    break
                for client, found in work.gated(plan, iter([item])).items():
                    away.discard(client)
                    came.append((version - plan.round + 1, found))
        asked = still
        if len(came) < work.rule.buffer:
            time.sleep(pause)
            pause = SHORTEST if len(came) > before else min(1.5 * pause, LONGEST)
            continue
        due, came = came[: work.rule.buffer], came[work.rule.buffer :]
        record, model, state = work.step(version, due, model, state)
        came = [(age + 1, item) for age, item in came]
        yield RoundResult(replace(record, seconds=time.perf_counter() - began), model, state)
        empty.check(record)
        version, began = version + 1, time.perf_counter()
        line = candidates(names, concurrency, seed, version)


class Work(NamedTuple):
    """What every server step of an asynchronous run needs; as ``rounds``.

    Args:
        run: the run file.
        strategy: what it names.
        federation: where the clients live.
        evaluate: (round, model) -> scores.
        run_id: under which clients keep their own tensors.
        states: where clients in process do.
        rule: when the server steps.
    """

    run: RunFile
    strategy: Strategy
    federation: Federation
    evaluate: Evaluate
    run_id: str
    states: States | None
    rule: Asynchronous

    def plan(
        self, version: int, clients: Sequence[str], model: Model, state: ServerState
    ) -> TrainPlan:
        """What clients are given who begin at this version."""
        travelling = self.strategy.travelling(model)
        return TrainPlan(
            version + 1,
            clients,
            travelling,
            len(clients),
            self.run.strategy.deadline,
            None,
            broadcast(self.strategy, travelling, state),
            self.strategy.upload_template(travelling.params),
            self.run_id,
            self.states,
        )

    def gated(self, plan: TrainPlan, stream: Iterator[Any]) -> dict[str, Updates | Failure]:
        """Valid updates of a plan's clients, one each, or why not.

        Where the strategy pulls towards the clients' own models, these stand in the place of their
        deltas: they will be compared with another version than the one that they began from.
        """
        cap = weight_cap(self.federation.examples(), self.run.strategy.max_weight)
        gate = Gate(plan.round, plan.clients, plan.expected(), cap)
        found: dict[str, Updates | Failure] = {}
        for item in stream:
            if isinstance(item, Failure):
                found[item.client] = item
                continue
            passed = gate.check(item)
            found |= {failure.client: failure for failure in passed.failures}
            updates = passed.updates
            updates = own_models(updates, plan.model) if self.rule.towards else updates
            found |= {client: updates.take([i]) for i, client in enumerate(updates.clients)}
        return found

    def step(
        self,
        version: int,
        came: Sequence[tuple[int, Updates | Failure]],
        model: Model,
        state: ServerState,
    ) -> tuple[RoundRecord, Model, ServerState]:
        """The server step on those who came, each with its staleness."""
        strategy, combiner, number = self.strategy, self.strategy.combine, version + 1
        travelling = strategy.travelling(model)
        template = {**travelling.tensors(), **strategy.upload_template(travelling.params)}
        cohort, ages = Cohort(combiner.zero(template)), []
        for age, item in came:
            if isinstance(item, Failure):
                cohort.failures.append(item)
                continue
            due = weighed(item, self.rule, age, travelling)
            cohort.add(uniform(due) if self.run.strategy.weights == "uniform" else due, combiner)
            ages.append(age)
        note = "nobody in the buffer; the model stays"
        if cohort.participants:
            population = len(self.federation.clients())
            combined = combiner.finish(cohort.sums)._replace(population=population)
            stepped, new_state = step(strategy, model, state, combined)
            note = "the step would overflow; the model stays"
            if is_finite(stepped):
                model, state, note = stepped, new_state, ""
        every = self.run.evaluate.every
        last = number == self.run.run.rounds
        due_now = last or (every > 0 and number % every == 0)
        scores = self.evaluate(number, model) if due_now else Scores({}, {})
        record = RoundRecord(
            round=number,
            seconds=0.0,
            participants=cohort.participants,
            failures=[*cohort.failures, *scores.failures],
            training=cohort.training(),
            metrics=scores.metrics,
            per_client=scores.per_client,
            note=note,
            staleness=ages,
        )
        return record, model, state


class Empty:
    """Ends a run in which nobody delivers.

    Args:
        run: how many rounds it has.
    """

    def __init__(self, run: RunFile) -> None:
        self._most = min(EMPTY_ROUNDS, run.run.rounds)
        self._count = 0

    def check(self, record: RoundRecord) -> None:
        """Raises RunError where this was one step too many without a valid update."""
        self._count = 0 if record.participants else self._count + 1
        if self._count == self._most:
            raise nobody(record.round, self._count, record.failures)


def checked(run: RunFile, strategy: Strategy, clients: int) -> tuple[Asynchronous, int]:
    """When the server steps, and how many clients train at any time.

    Raises:
        InputError: as :func:`asynchronous`.
    """
    rule = strategy.asynchronous
    assert rule is not None
    where = "[strategy]"
    for table, on in (
        ("privacy", run.privacy.unit != "none"),
        ("secure_aggregation", run.secure_aggregation.enabled),
    ):
        if on:
            raise InputError(
                f"{run.strategy.name} steps on whoever is back, and [{table}] needs whole cohorts",
                where=where,
                fix=f"choose a synchronous strategy, or remove [{table}]",
            )
    concurrency = rule.concurrency or cohort_size(run.strategy, clients)
    if concurrency > clients:
        raise InputError(
            f"concurrency = {concurrency} is more than the {clients} clients",
            where=where,
            fix=f"set concurrency to {clients} or less",
        )
    if not strategy.combine.fewest <= rule.buffer <= concurrency:
        raise InputError(
            f"buffer = {rule.buffer}, and it must be at least {strategy.combine.fewest} and at "
            f"most the {concurrency} clients in training",
            where=where,
            fix="change buffer or concurrency",
        )
    return rule, concurrency
