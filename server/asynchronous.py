"""Asynchronous runs: the server steps when a few clients are back, and nobody waits for the slow.

A round is a server step. In virtual time (``server/clock.py``) who is back when is known before;
each client is trained from the version of the model that it was given, and counts for less the more
steps were taken since.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.payloads import Failure, Federation, States, TrainPlan, Updates
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, Tree
from umbel.server.clock import course
from umbel.server.gate import Gate, weight_cap
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
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.asynchronous import Asynchronous

FLIGHT = "in-flight"
"""The letter of the server's state that holds what clients have sent and nobody was given yet."""


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
    clients = federation.clients()
    cap = weight_cap(federation.examples(), run.strategy.max_weight)
    _, model, state = start
    flight = restored(state.get(FLIGHT, {}))
    state = {letter: part for letter, part in state.items() if letter != FLIGHT}
    periods = course(clients, rule, concurrency, run.run.seed)
    empty = 0
    for period in itertools.islice(periods, start.round, run.run.rounds):
        number = period.version + 1
        began = time.perf_counter()
        travelling = strategy.travelling(model)
        plan = TrainPlan(
            number,
            period.starts,
            travelling,
            len(period.starts),
            run.strategy.deadline,
            None,
            broadcast(strategy, travelling, state),
            strategy.upload_template(travelling.params),
            run_id,
            states,
        )
        if period.starts:
            fresh = trained(federation, plan, cap, rule.towards)
            flight |= {(client, period.version): back for client, back in fresh.items()}
        sums, ages = Cohort(strategy.combine.zero(plan.expected())), []
        for arrival in period.arrivals:
            back = flight.pop((arrival.client, arrival.version))
            if isinstance(back, Failure):
                sums.failures.append(back)
                continue
            ages.append(period.version - arrival.version)
            due = weighed(back, rule, ages[-1], travelling)
            sums.add(uniform(due) if run.strategy.weights == "uniform" else due, strategy.combine)
        note = ""
        if sums.participants:
            combined = strategy.combine.finish(sums.sums)._replace(population=len(clients))
            stepped, new_state = step(strategy, model, state, combined)
            if is_finite(stepped):
                model, state = stepped, new_state
            else:
                note = "the step would overflow; the model stays"
        else:
            note = "nobody in the buffer; the model stays"
        due_now = number == run.run.rounds or (
            run.evaluate.every > 0 and number % run.evaluate.every == 0
        )
        scores = evaluate(number, model) if due_now else Scores({}, {})
        record = RoundRecord(
            round=number,
            seconds=time.perf_counter() - began,
            participants=sums.participants,
            failures=[*sums.failures, *scores.failures],
            training=sums.training(),
            metrics=scores.metrics,
            per_client=scores.per_client,
            note=note,
            virtual_time=period.arrivals[-1].time,
            staleness=ages,
        )
        yield RoundResult(record, model, {**state, FLIGHT: stored(flight)})
        empty = 0 if sums.participants else empty + 1
        if empty == min(EMPTY_ROUNDS, run.run.rounds):
            raise nobody(number, empty, sums.failures)


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


def trained(
    federation: Federation, plan: TrainPlan, cap: float, towards: bool
) -> dict[str, Updates | Failure]:
    """What each of the plan's clients will be back with: valid updates, or why not.

    Args:
        federation: where they live.
        plan: the version that they are given.
        cap: the most that one client may weigh.
        towards: whether deltas become the clients' own models, since they will be compared with
            another version than the one that they began from.
    """
    gate = Gate(plan.round, plan.clients, plan.expected(), cap)
    found: dict[str, Updates | Failure] = {}
    for item in federation.train(plan):
        if isinstance(item, Failure):
            found[item.client] = item
            continue
        assert isinstance(item, Updates)
        passed = gate.check(item)
        found |= {failure.client: failure for failure in passed.failures}
        updates = own_models(passed.updates, plan.model) if towards else passed.updates
        found |= {client: updates.take([i]) for i, client in enumerate(updates.clients)}
    return {c: found.get(c, Failure(c, "did not answer")) for c in plan.clients}


def own_models(updates: Updates, model: Model) -> Updates:
    """The clients' models in place of their deltas; booleans stay differences."""
    given = model.tensors()
    delta = {
        name: stack + given[name] if name in given and stack.dtype is not torch.bool else stack
        for name, stack in updates.delta.items()
    }
    return replace(updates, delta=delta)


def weighed(updates: Updates, rule: Asynchronous, stale: int, model: Model) -> Updates:
    """One client's updates for this step: seen from the model of now, times what they count for."""
    factor, now = rule.discount(stale), model.tensors()

    def due(name: str, stack: Tensor) -> Tensor:
        if rule.towards and name in now and stack.dtype is not torch.bool:
            stack = stack.double() - now[name].double()
        return stack if factor == 1 else stack.double() * factor

    delta = {name: due(name, stack) for name, stack in updates.delta.items()}
    return replace(updates, delta=delta)


Flight: TypeAlias = dict[tuple[str, int], Updates | Failure]
"""(client, version that it was given) -> what it will be back with. A client can be in it twice: it
is back, and gone again, in one period."""


def stored(flight: Flight) -> dict[str, Tensor]:
    """What is in flight as tensors by name, for a checkpoint."""
    found: dict[str, Tensor] = {}
    notes: list[Any] = []
    for i, ((client, version), back) in enumerate(flight.items()):
        if isinstance(back, Failure):
            notes.append([client, version, back.reason])
            continue
        notes.append([client, version, back.round])
        found |= {f"{i}/delta/{name}": stack for name, stack in back.delta.items()}
        found |= {f"{i}/metrics/{name}": values for name, values in back.metrics.items()}
        found[f"{i}/weights"] = back.weights
    if notes:
        text = json.dumps(notes).encode()
        found["notes"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return found


def restored(tensors: Tree) -> Flight:
    """The inverse of :func:`stored`."""
    if "notes" not in tensors:
        return {}
    flight: Flight = {}
    for i, (client, version, said) in enumerate(json.loads(bytes(tensors["notes"].tolist()))):
        if isinstance(said, str):
            flight[client, version] = Failure(client, said)
            continue

        def below(kind: str, start: str = f"{i}/") -> dict[str, Tensor]:
            whole = f"{start}{kind}/"
            return {n.removeprefix(whole): t for n, t in tensors.items() if n.startswith(whole)}

        delta, metrics = below("delta"), below("metrics")
        flight[client, version] = Updates(said, [client], delta, tensors[f"{i}/weights"], metrics)
    return flight
