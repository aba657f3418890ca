"""From the first round to the last, every one committed: what a simulation and a server share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from umbel.core.errors import UmbelError
from umbel.core.payloads import Federation
from umbel.core.run_file import RunFile
from umbel.core.trees import Model
from umbel.server.entries import Ended
from umbel.server.records import RoundRecord
from umbel.server.rounds import Evaluate, Start, rounds
from umbel.server.stopping import Patience, Until
from umbel.server.store import RunStore
from umbel.strategies.parts import Strategy


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

    Returns:
        ``finished``, or ``interrupted`` by Ctrl-C.
    Raises:
        UmbelError: what ended the run; its committed rounds stay in the store.
    """
    status: Ended = "failed"
    error = ""
    try:
        saved = store.latest(run_id)
        if saved is None:
            start = Start(0, model, strategy.init(model.params))
        else:
            start = Start(saved.round, saved.model, saved.state)
        last = time.monotonic()
        plan: Mapping[str, Any] | None = None
        patience, stopped = never, ""
        if run.evaluate.early_stopping is not None:
            patience = Patience(run.evaluate.early_stopping)
            for record in store.history(run_id):
                stopped = patience(record)
        going_on = rounds(run, strategy, federation, start, evaluate)
        for result in () if stopped else going_on:
            now = time.monotonic()
            why = patience(result.record) or until(result.record)
            if why:
                note = "; ".join(filter(None, [result.record.note, why]))
                result = result._replace(record=replace(result.record, note=note))
            final = bool(why) or result.record.round == run.run.rounds
            if plan is None:
                plan = federation.plan_record()
                store.keep_plan(run_id, plan)
            due = final or now - last >= commit_seconds
            store.commit(run_id, result, checkpoint=due)
            last = now if due else last
            on_round(result.record)
            if why:
                break
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
    except UmbelError as problem:
        error = str(problem)
        raise
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
        raise
    finally:
        store.finish(run_id, status, error=error)
    return status
