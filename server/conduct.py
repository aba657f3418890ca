"""From the first round to the last, every one committed: what a simulation and a server share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from umbel.core.errors import NotNowError, RefusedError, UmbelError
from umbel.core.payloads import Federation, States
from umbel.core.run_file import RunFile
from umbel.core.trees import Model
from umbel.server.asynchronous import asynchronous
from umbel.server.entries import Ended
from umbel.server.records import RoundRecord, RoundResult
from umbel.server.rounds import Evaluate, Start, rounds
from umbel.server.stopping import Patience, Until
from umbel.server.store import RunStore
from umbel.strategies.parts import Strategy
from umbel.tasks.task import no_remark

if TYPE_CHECKING:
    from umbel.privacy.sources import Sources
    from umbel.server.private import Guard


def never(record: RoundRecord) -> str:
    """No reason to end a run."""
    return ""


def conduct(
    store: RunStore,
    run_id: str,
    run: RunFile,
    strategy: Strategy,
    federation: Federation,
    model: Model,
    evaluate: Evaluate,
    on_round: Callable[[RoundRecord], None],
    commit_seconds: float,
    until: Until = never,
    sources: Sources | None = None,
    states: States | None = None,
    course: Callable[[Start], Iterator[RoundResult]] | None = None,
    remark: Callable[[Mapping[str, float]], str] = no_remark,
) -> Ended:
    """Runs what is left of a run, and ends it in the store, however it ends.

    Args:
        store: holds ``run_id``, created or reopened by the caller.
        run_id: the run.
        run: its configuration.
        strategy: what it names.
        federation: where the clients live. It is not closed here.
        model: the initial global model, for a run without a committed round.
        evaluate: (round, model) -> scores.
        on_round: called after each round.
        commit_seconds: at least this long between two commits; 0 commits every round.
        until: asked after each round, before it is committed, besides the run file's own
            ``early_stopping``; a reason ends the run as finished.
        sources: of the server's own noise, where ``[privacy]`` asks for it; ``None``: the operating
            system.
        states: where clients in process keep what they keep.
        course: the rounds after a start, where they are not those of one federation.
        remark: figures of a round -> what its note should warn of.

    Returns:
        ``finished``; ``interrupted`` by Ctrl-C; ``budget_exhausted``: the next round would pass the
        privacy budget, and the model is that of the last.
    Raises:
        UmbelError: what ended the run; its committed rounds stay in the store.
    """
    status: Ended = "failed"
    error = ""
    guard: Guard | None = None
    try:
        guard = _guard(store, run_id, run, strategy, federation, model, sources)
        saved = store.latest(run_id)
        if saved is None:
            start = Start(0, model, strategy.init(strategy.travelling(model).params))
        else:
            start = Start(saved.round, saved.model, saved.state)
        if states is not None:
            states.rewind(start.round)
        last = time.monotonic()
        plan: Mapping[str, Any] | None = None
        patience, stopped = never, ""
        if run.evaluate.early_stopping is not None:
            patience = Patience(run.evaluate.early_stopping)
            for record in store.history(run_id):
                stopped = patience(record)
        if course is not None:
            going_on = course(start)
        elif strategy.asynchronous is not None:
            going_on = asynchronous(run, strategy, federation, start, evaluate, run_id, states)
        else:
            going_on = rounds(run, strategy, federation, start, evaluate, run_id, states, guard)
        for result in () if stopped else going_on:
            now = time.monotonic()
            why = patience(result.record) or until(result.record)
            warning = remark({**result.record.training, **result.record.metrics})
            if why or warning:
                note = "; ".join(filter(None, [result.record.note, warning, why]))
                result = result._replace(record=replace(result.record, note=note))
            final = bool(why) or result.record.round == run.run.rounds
            if plan is None:
                plan = federation.plan_record()
                store.keep_plan(run_id, plan)
            due = final or now - last >= commit_seconds
            if due and states is not None:
                states.settle(result.record.round)
            store.commit(run_id, result, checkpoint=due)
            last = now if due else last
            on_round(result.record)
            if why:
                break
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
    except RefusedError as refusal:
        if guard is None or not guard.exhausted:
            error = str(refusal)
            raise
        status, error = "budget_exhausted", str(refusal)
    except UmbelError as problem:
        if isinstance(problem, NotNowError):
            status = "interrupted"
        error = str(problem)
        raise
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
        raise
    finally:
        store.finish(run_id, status, error=error)
        if guard is not None:
            store.keep_privacy(run_id, guard.report())
            if status == "finished":
                guard.end()
    return status


def _guard(
    store: RunStore,
    run_id: str,
    run: RunFile,
    strategy: Strategy,
    federation: Federation,
    model: Model,
    sources: Sources | None,
) -> Guard | None:
    if run.privacy.unit == "none":
        return None
    from umbel.privacy.sources import system_sources
    from umbel.server.private import Guard  # accountants take seconds to load

    return Guard(
        run,
        strategy,
        strategy.travelling(model),
        federation.clients(),
        federation.examples(),
        sources or system_sources(),
        store.folder / run_id,
        run_id,
    )
