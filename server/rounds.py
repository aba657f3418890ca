"""The round loop. It reads top to bottom, and knows neither where clients live nor who watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from umbel.core import run_file
from umbel.core.errors import NotNowError, RunError
from umbel.core.messages import NOT_NOW
from umbel.core.payloads import Failure, Federation, Folded, States, TrainPlan, Updates
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, Tree, add_cast, flatten, unflatten
from umbel.server.gate import Gate, weight_cap, weight_of_all
from umbel.server.private_sum import Parts, Terms, private_sum
from umbel.server.records import RoundRecord, RoundResult, Scores
from umbel.server.sampling import cohort_size, sample
from umbel.strategies.build import build_strategy
from umbel.strategies.parts import Combined, Combiner, ServerState, Strategy

if TYPE_CHECKING:  # accountants take seconds to load
    from umbel.server.private import Guard

Evaluate: TypeAlias = Callable[[int, Model], Scores]
"""(round, model) -> scores."""

# A run in which nobody delivers is broken, not unlucky.
EMPTY_ROUNDS = 3


class Start(NamedTuple):
    """Where a run begins, or goes on: after ``round``, with this model and server state."""

    round: int
    model: Model
    state: ServerState


def rounds(
    run: RunFile,
    strategy: Strategy,
    federation: Federation,
    start: Start,
    evaluate: Evaluate,
    run_id: str = "",
    states: States | None = None,
    guard: Guard | None = None,
) -> Iterator[RoundResult]:
    """Runs the rounds after ``start`` and yields each when it is done.

    The consumer commits a result before it asks for the next one, so that a run killed anywhere
    goes on from its last commit.

    Args:
        run: the run file.
        strategy: what it names.
        federation: where the clients live.
        start: where to begin.
        evaluate: (round, model) -> scores.
        run_id: under which clients keep their own tensors.
        states: where clients in process do.
        guard: keeps ``[privacy]``; ``None`` where there is none.

    Raises:
        InputError: the cohort is larger than the federation.
        RefusedError: the next round would pass the privacy budget.
        NotNowError: nobody takes part in a round, and of some their hours say so.
        RunError: three rounds in a row, or all, without one valid update.
    """
    clients = federation.clients()
    wanted = cohort_size(run.strategy, len(clients), strategy.combine.fewest)
    cap = weight_cap(federation.examples(), run.strategy.max_weight)
    whole = weight_of_all(federation.examples(), cap, run.strategy.weights)
    fold = None if strategy.combine.merge is None else Fold(run.strategy, cap)
    quorum = max(run.strategy.quorum or 1, strategy.combine.fewest)
    terms, epsilon = Terms(strategy.combine, None), None
    _, model, state = start
    if guard is not None:
        guard.restore(state)
    empty = 0
    for number in range(start.round + 1, run.run.rounds + 1):
        began = time.perf_counter()
        if guard is None:
            asked = sample(clients, run.strategy, run.run.seed, number)
        else:
            asked = guard.asked(number)
            epsilon = guard.spend(number, asked)
            terms = guard.terms(number)
            fold = None if fold is None else replace(fold, parts=terms.parts)
        travelling = strategy.travelling(model)
        plan = TrainPlan(
            number,
            asked,
            travelling,
            wanted if guard is None else guard.wanted(wanted, asked),
            run.strategy.deadline,
            fold,
            broadcast(strategy, travelling, state),
            strategy.upload_template(travelling.params),
            run_id,
            states,
        )
        gate = Gate(number, asked, plan.expected(), cap)
        cohort = collect(federation.train(plan), gate, terms.combine, plan, run.strategy.weights)
        if not cohort.participants and any(f.reason == NOT_NOW for f in cohort.failures):
            raise not_now(f"round {number}")  # the round is not spent: it can be had later
        note = "" if guard is None else guard.note(number)
        needed = quorum if guard is None else guard.quorum(quorum, number)
        if len(cohort.participants) < needed:
            why = {f.reason for f in cohort.failures}
            all_say = f" ({why.pop()})" if len(why) == 1 else ""
            note = (
                f"quorum missed: {len(cohort.participants)} of {needed}{all_say}; the model stays"
            )
        else:
            combined = terms.combine.finish(cohort.sums)
            share = combined.weight / whole
            combined = combined._replace(population=len(clients), share=share)
            stepped, new_state = step(strategy, model, state, combined)
            if is_finite(stepped):
                cohort.totals |= observed(strategy, model, combined)
                if run.task.adapter is not None:
                    require_moved(number, combined)
                model, state = stepped, new_state
            else:
                note = "the step would overflow; the model stays"
            if guard is not None:
                state = guard.keep(state)
        due = (
            number == run.run.rounds
            or (run.evaluate.every > 0 and number % run.evaluate.every == 0)
            or (guard is not None and guard.last(number))
        )
        scores = evaluate(number, model) if due else Scores({}, {})
        record = RoundRecord(
            round=number,
            seconds=time.perf_counter() - began,
            participants=cohort.participants,
            failures=[*cohort.failures, *scores.failures],
            capped=cohort.capped,
            # Means over training examples are a release that nobody paid for.
            training=cohort.training() if guard is None else {},
            metrics=scores.metrics,
            per_client=scores.per_client,
            note=note,
            epsilon=epsilon,
        )
        yield RoundResult(record, model, state)
        empty = 0 if cohort.participants or not asked else empty + 1
        if empty == min(EMPTY_ROUNDS, run.run.rounds):
            raise nobody(number, empty, cohort.failures)


@dataclass
class Cohort:
    """What came back in one round, or from a part of its clients: plain values, to be pickled."""

    sums: Any
    participants: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    capped: list[str] = field(default_factory=list)
    totals: dict[str, list[float]] = field(default_factory=dict)

    def add(self, updates: Updates, combiner: Combiner) -> None:
        """Folds valid updates in."""
        self.sums = combiner.add(self.sums, updates)
        self.participants.extend(updates.clients)
        weights = updates.weights.cpu().numpy()
        for name, metric in updates.metrics.items():
            values = metric.cpu().numpy()
            counted = np.where(np.isfinite(values), weights, 0.0)
            total = self.totals.setdefault(name, [0.0, 0.0])
            total[0] += float(np.dot(np.where(counted, values, 0.0), counted))
            total[1] += float(counted.sum())

    def merge(self, part: Cohort, combiner: Combiner) -> None:
        """Folds in what other clients came to."""
        if combiner.merge is not None:
            self.sums = combiner.merge(self.sums, part.sums)
        elif self.participants:
            raise ValueError("a rule that needs the whole cohort was given it in parts")
        else:  # secure aggregation in groups: one part, of the groups' sums
            self.sums = part.sums
        self.participants.extend(part.participants)
        self.failures.extend(part.failures)
        self.capped.extend(part.capped)
        for name, (total, weight) in part.totals.items():
            mine = self.totals.setdefault(name, [0.0, 0.0])
            mine[0] += total
            mine[1] += weight

    def arrange(self, clients: Sequence[str]) -> None:
        """Puts everybody in this order: parts need not be consecutive clients."""
        place = {client: i for i, client in enumerate(clients)}
        self.participants.sort(key=place.__getitem__)
        self.capped.sort(key=place.__getitem__)
        self.failures.sort(key=lambda f: place.get(f.client, len(place)))

    def training(self) -> dict[str, float]:
        """Means of the clients' training metrics, weighted as their updates were."""
        return {name: total / weight for name, (total, weight) in self.totals.items() if weight}


@dataclass(frozen=True)
class Fold:
    """Gates and sums the updates of some clients, in whichever process they were made.

    The same gate and the same combiner as in the round loop; it is data, so that it can be sent.

    Args:
        section: the strategy.
        cap: the most that one client may weigh.
        parts: of a private sum; ``None``: the strategy's own combiner.
    """

    section: run_file.Strategy
    cap: float
    parts: Parts | None = None

    def __call__(self, plan: TrainPlan, stream: Iterator[Updates | Failure]) -> Cohort:
        """What the clients of ``plan`` came to."""
        gate = Gate(plan.round, plan.clients, plan.expected(), self.cap)
        combiner = _combiner(self.section.model_dump_json(), self.parts)
        return collect(stream, gate, combiner, plan, self.section.weights)


@lru_cache(maxsize=8)
def _strategy(section: str) -> Combiner:
    return build_strategy(run_file.Strategy.model_validate_json(section)).combine


def _combiner(section: str, parts: Parts | None) -> Combiner:
    return _strategy(section) if parts is None else private_sum(parts)


def collect(
    stream: Iterator[Updates | Failure | Folded],
    gate: Gate,
    combiner: Combiner,
    plan: TrainPlan,
    weights: str,
) -> Cohort:
    """Gates and combines what the federation delivers, until enough clients have.

    No update is kept: a round needs memory for the sum and for what is under way. Clients that
    were not needed (over-selection) are neither participants nor failures. Parts that the plan's
    ``fold`` made were gated there; they are merged in the order that they come in.
    """
    cohort = Cohort(combiner.zero(plan.expected()))
    merged = False
    try:
        for item in stream:
            if isinstance(item, Failure):
                cohort.failures.append(item)
                continue
            room = plan.wanted - len(cohort.participants)
            if isinstance(item, Updates):
                passed = gate.check(item)
                cohort.failures.extend(passed.failures)
                updates = passed.updates
                if len(updates.clients) > room:
                    updates = updates.take(range(room))
                if passed.capped:
                    taken = set(updates.clients)
                    cohort.capped.extend(c for c in passed.capped if c in taken)
                if updates.clients:
                    cohort.add(uniform(updates) if weights == "uniform" else updates, combiner)
            elif isinstance(item, Cohort) and len(item.participants) <= room:
                cohort.merge(item, combiner)
                merged = True
            else:
                raise ValueError(f"round {plan.round}: not a part of the cohort that was asked for")
            if len(cohort.participants) == plan.wanted:
                break
    finally:
        if close := getattr(stream, "close", None):
            close()
    if merged:
        cohort.arrange(plan.clients)
    return cohort


def uniform(updates: Updates) -> Updates:
    """The same updates, each with weight 1."""
    ones = updates.weights.new_ones(len(updates.clients))
    return Updates(updates.round, updates.clients, updates.delta, ones, updates.metrics)


def broadcast(strategy: Strategy, model: Model, state: ServerState) -> Tree:
    """What clients are sent besides the model, ``letter/name`` -> (*shape)."""
    if strategy.broadcast is None:
        return {}
    return flatten(strategy.broadcast(model.params, state))


def step(
    strategy: Strategy, model: Model, state: ServerState, combined: Combined
) -> tuple[Model, ServerState]:
    """The server step on the parameters; buffers move by their mean delta.

    What is private stays as it is, and what clients sent besides their deltas is ``extra``.
    """
    delta = combined.delta
    given, trained = _trained(model, combined)
    params, state = strategy.server(given, state, trained)
    buffers = {
        name: add_cast(b, delta[name]) if name in delta else b for name, b in model.buffers.items()
    }
    if strategy.buffers is not None:
        buffers |= strategy.buffers(model, trained)
    return Model({**model.params, **params}, buffers), state


def _trained(model: Model, combined: Combined) -> tuple[Tree, Combined]:
    """The parameters that travelled, and what was combined of them, the rest as ``extra``."""
    delta = combined.delta
    given = {name: p for name, p in model.params.items() if name in delta}
    trained = combined._replace(
        delta={name: delta[name] for name in given},
        extra=unflatten({name: d for name, d in delta.items() if "/" in name}),
    )
    return given, trained


def observed(strategy: Strategy, model: Model, combined: Combined) -> dict[str, list[float]]:
    """The strategy's own figures of a round, as totals of a cohort."""
    if strategy.figures is None:
        return {}
    return {n: [v, 1.0] for n, v in strategy.figures(*_trained(model, combined)).items()}


def require_moved(number: int, combined: Combined) -> None:
    """An adapter that training leaves as it was is not connected to the model's output.

    Raises:
        RunError: no tensor moved at any client.
    """
    if not any(bool(d.any()) for d in combined.delta.values()):
        raise RunError(
            "the adapter did not move at any client: every delta is zero",
            where=f"round {number}",
            fix="choose targets that the model's output depends on, or a larger [client] lr",
        )


def is_finite(model: Model) -> bool:
    """Whether every floating-point value of the model is finite."""
    tensors = model.tensors().values()
    return all(bool(t.isfinite().all()) for t in tensors if t.dtype.is_floating_point)


def not_now(where: str) -> NotNowError:
    """The error of a run whose clients take part at other hours."""
    return NotNowError(
        "nobody takes part at this hour (hours in the clients' policies)",
        where=where,
        fix="wait, or ask the sites for other hours",
    )


def nobody(number: int, empty: int, failures: Sequence[Failure]) -> RunError:
    """The error of a run in which no client delivers."""
    first = f"; client '{failures[0].client}': {failures[0].reason}" if failures else ""
    return RunError(
        f"no valid update in {empty} round(s) in a row{first}",
        where=f"round {number}",
        fix="a diverging model needs a smaller [client] lr; else mend what the clients report",
    )
