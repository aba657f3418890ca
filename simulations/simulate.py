"""A whole run on one machine: prepare, run the rounds, commit each, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from umbel.client import own
from umbel.client.state import GIB, ClientStates
from umbel.core import registry
from umbel.core.errors import InputError
from umbel.core.payloads import Federation
from umbel.core.run_file import RunFile
from umbel.core.versions import versions
from umbel.privacy.sources import seeded_sources
from umbel.server.conduct import conduct, never
from umbel.server.continual import keep_report
from umbel.server.course import Course
from umbel.server.entries import RunEntry
from umbel.server.evaluation import evaluation
from umbel.server.records import RoundRecord
from umbel.server.resume import same_run, same_stages
from umbel.server.stopping import Until
from umbel.server.store import RunStore
from umbel.simulations.attacks.build import besiege
from umbel.simulations.continual import course as course_of
from umbel.simulations.located import located
from umbel.simulations.prepare import Prepared, plan, prepare
from umbel.simulations.secure import SecureFederation
from umbel.strategies.parts import Strategy
from umbel.tasks.begin import base_hash
from umbel.tasks.task import Task


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        run_id: in the store.
        status: ``finished``, ``interrupted``, ``failed`` or ``budget_exhausted``.
        rounds: committed rounds.
        seconds: wall time of this call; a resumed run's earlier time is in its records.
        metrics: of the final model on the global test set, or on the union of the clients'.
        per_client: each client's own figures.
        privacy: unit, epsilon, delta …; ``None`` without a budget.
        model: path of the final model, safetensors.
        history: one record a round.
        hostile: the clients that attacked; only where ``[attack]`` says so.
        continual: the accuracy matrix and its figures; empty without ``[continual]``.
    """

    run_id: str
    status: str
    rounds: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    per_client: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    privacy: Mapping[str, Any] | None = None
    model: str | None = None
    history: Sequence[RoundRecord] = ()
    hostile: Sequence[str] = ()
    continual: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The outcome as plain values."""
        table = {
            "run_id": self.run_id,
            "status": self.status,
            "rounds": self.rounds,
            "seconds": round(self.seconds, 3),
            "metrics": dict(self.metrics),
            "per_client": {c: dict(m) for c, m in self.per_client.items()},
            "privacy": self.privacy,
            "model": self.model,
            "history": [record.as_json() for record in self.history],
        }
        optional = {"hostile": list(self.hostile), "continual": dict(self.continual)}
        return {**table, **{name: value for name, value in optional.items() if value}}


def ignore(*args: object) -> None:
    """Takes anything, does nothing."""


def simulate(
    run: RunFile,
    *,
    engine: str = "vectorised",
    resume: str | None = None,
    text: str | None = None,
    on_round: Callable[[RoundRecord, int], None] = ignore,
    announce: Callable[[str], None] = ignore,
    until: Until = never,
) -> Outcome:
    """Runs ``run`` to its end, or until it is interrupted.

    Args:
        run: the run file.
        engine: where the clients live.
        resume: id of a run in the store to go on with, from its last committed round.
        text: the run file as the user wrote it, kept with the run.
        on_round: called after each committed round, with the number of rounds planned.
        announce: called with what a user should know, such as a fall-back.
        until: asked after each round whether the run ends with it.

    Raises:
        InputError: before anything is started or written.
        UmbelError: what ended a run; its committed rounds stay in the store.
    """
    began = time.monotonic()
    make_engine = registry.find("engines", engine, "--engine")
    run = located(run)
    store = RunStore(run.run.store)
    if resume is not None:
        entry = store.get(resume)
        run = _as_noisy(run, entry.run)
    prepared = prepare(run)
    run = prepared.run
    base = base_hash(prepared.module)
    if resume is not None:
        resume = entry.run_id
        same_run(run, entry.run, resume)
        _same_base(base, entry)
        run = _as_it_computed(run, entry)
        same_stages(run, entry)
    siege = besiege(run, prepared.data, prepared.task, prepared.strategy)
    course: Course | None = None
    if run.continual.experiences > 1:
        course = course_of(prepared, engine, announce)
        prepared = _staged(prepared, course)
        federation: Federation = course
    else:
        federation = make_engine(run, siege.data, prepared.task, prepared.strategy.client, announce)
        federation = siege.around(federation, engine)
        if run.secure_aggregation.enabled and engine != "flower":  # there it is in the messages
            federation = SecureFederation(federation, run, prepared.strategy)
    try:
        if resume is None:
            run_id = store.create(run, engine=engine, text=text, base_model=base)
        else:
            run_id = resume
            if note := store.reopen(run_id, run):
                announce(note)
            _same_versions(entry.versions, announce)
        folder = store.folder / run_id
        states = client_states(run, prepared.task, prepared.strategy, folder)
        status = conduct(
            store,
            run_id,
            run,
            prepared.strategy,
            federation,
            prepared.model(),
            siege.measured(
                evaluation(
                    run,
                    federation,
                    prepared.task,
                    prepared.module,
                    prepared.data.test,
                    "cpu",
                    prepared.strategy,
                    run_id,
                    states,
                ),
                prepared.module,
            ),
            lambda record: on_round(record, run.run.rounds),
            run.run.checkpoint_seconds,
            until,
            seeded_sources(run.run.seed) if run.privacy.unit != "none" else None,
            states,
            None
            if course is None
            else partial(course.rounds, run_id=run_id, folder=folder, states=states),
            prepared.task.remark,
        )
        report: Mapping[str, Any] = {}
        if course is not None:
            report = course.report(store.history(run_id), run_id)
            keep_report(folder, report)
    finally:
        federation.close()
    outcome = _outcome(store, run_id, status, time.monotonic() - began, siege.hostile)
    outcome = replace(outcome, continual=report)
    store.close()
    return outcome


def check(run: RunFile) -> dict[str, Any]:
    """The plan of a run, without running it.

    Raises:
        InputError: as :func:`simulate`.
    """
    prepared = prepare(located(run))
    if prepared.run.continual.experiences > 1:
        course = course_of(prepared, "sequential", ignore)
        course.close()
        prepared = _staged(prepared, course)
    return plan(prepared)


def _staged(prepared: Prepared, course: Course) -> Prepared:
    """The run, with what its defence makes of its strategy and its model."""
    return prepared._replace(strategy=course.strategy, task=course.task, module=course.module)


def _as_noisy(run: RunFile, stored: RunFile) -> RunFile:
    """The run with the noise that the stored one was calibrated to: more rounds do not change it,
    and end with the budget."""
    if run.privacy.unit == "none" or run.privacy.noise_multiplier is not None:
        return run
    noise = {"noise_multiplier": stored.privacy.noise_multiplier}
    return run.model_copy(update={"privacy": run.privacy.model_copy(update=noise)})


def client_states(
    run: RunFile, task: Task, strategy: Strategy, folder: Path
) -> ClientStates | None:
    """Where the clients of a run keep what they keep, if they keep anything."""
    if not own.keeps(strategy.client, task):
        return None
    limit = int(run.client.state_gib * GIB)
    return ClientStates(folder / "clients.db", own.algorithm(run, task), limit=limit)


def _same_base(base: str | None, entry: RunEntry) -> None:
    """Refuses to go on with an adapter on another base model."""
    if base != (was := entry.versions.get("base_model")):
        raise InputError(
            f"the base model has hash {base}, and the stored run began with {was}",
            where=f"--resume {entry.run_id}",
            fix="restore the files that [task] init_from and model.path name",
        )


def _as_it_computed(run: RunFile, entry: RunEntry) -> RunFile:
    """The run with the engine plan, and this process with the threads, that it had: same bits."""
    threads = entry.versions.get("threads")
    if isinstance(threads, int) and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    plan = run.run.engine_plan or entry.engine_plan.get("plan")
    return run.model_copy(update={"run": run.run.model_copy(update={"engine_plan": plan})})


def _same_versions(stored: Mapping[str, Any], announce: Callable[[str], None]) -> None:
    now = versions()
    changed = sorted(k for k in ("umbel", "torch", "numpy") if stored.get(k) != now.get(k))
    for name in changed:
        announce(
            f"{name} was {stored.get(name)} and is {now.get(name)}: "
            "the run goes on, but not bit for bit as it would have"
        )


def _outcome(
    store: RunStore, run_id: str, status: str, seconds: float, hostile: Sequence[str]
) -> Outcome:
    history = store.history(run_id)
    scored = [record for record in history if record.metrics]
    model = store.model_path(run_id)
    return Outcome(
        run_id=run_id,
        status=status,
        rounds=len(history),
        seconds=seconds,
        metrics=scored[-1].metrics if scored else {},
        per_client=scored[-1].per_client if scored else {},
        privacy=store.privacy(run_id),
        model=str(model) if Path(model).exists() else None,
        history=history,
        hostile=hostile,
    )
