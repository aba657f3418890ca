"""A whole run where the clients are remote and the server holds no data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from umbel.core.errors import InputError, RefusedError
from umbel.core.payloads import Federation
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, map_tree
from umbel.datasets.federated import Info
from umbel.server.conduct import conduct
from umbel.server.continual import keep_report
from umbel.server.course import Course
from umbel.server.evaluation import evaluation
from umbel.server.records import RoundRecord
from umbel.server.remote_ground import Remote, Staged
from umbel.server.resume import same_run, same_stages
from umbel.server.store import RunStore
from umbel.strategies.build import build_strategy
from umbel.strategies.parts import Strategy
from umbel.tasks.begin import base_hash
from umbel.tasks.build import build_task, initial_module, model_of
from umbel.tasks.task import Task

log = logging.getLogger("umbel.server")


def serve(
    run: RunFile,
    federation: Federation,
    info: Info,
    *,
    engine: str,
    resume: str | None = None,
    text: str | None = None,
    on_start: Callable[[str], None],
    on_round: Callable[[RoundRecord], None],
) -> str:
    """Runs ``run`` to its end; evaluates where the data live; commits each round.

    The initial model is a function of the run file and of ``info``: the same as in a simulation.

    Args:
        run: the run file.
        federation: the clients. It is not closed here.
        info: what the sites say of their data.
        engine: what the store calls the federation.
        resume: id of a run in the store to go on with, from its last committed round.
        text: the run file as the user wrote it, kept with the run.
        on_start: called with the run's id.
        on_round: called after each committed round.

    Returns:
        the run's id in the store.
    Raises:
        InputError: the stored run has another configuration.
        RefusedError: the run simulates an attack, or has experiences of which the clients know
            nothing.
        UmbelError: what ended the run; its committed rounds stay in the store.
    """
    if run.attack.kind != "none":
        raise RefusedError(
            f"kind = '{run.attack.kind}' is a simulated adversary, and these sites are real",
            where="[attack]",
            fix="remove [attack], or umbel simulate",
        )
    strategy = build_strategy(run.strategy)
    task = build_task(run.task, info)
    module = initial_module(task, run.run.seed)
    base = base_hash(module)
    course = None
    if run.continual.experiences > 1:
        course = _course(run, federation, task, strategy, module)
        task, strategy, module = course.task, course.strategy, course.module
        federation = course
    params, buffers = model_of(module)
    store = RunStore(run.run.store)
    if resume is None:
        run_id = store.create(run, engine=engine, text=text, base_model=base)
    else:
        entry = store.get(resume)
        run_id = entry.run_id
        same_run(run, entry.run, run_id)
        if course is not None:
            same_stages(run, entry)
        store.reopen(run_id)
    on_start(run_id)
    status = conduct(
        store,
        run_id,
        run,
        strategy,
        federation,
        Model(map_tree(torch.clone, params), map_tree(torch.clone, buffers)),
        evaluation(run, federation, task, module, None, "cpu", strategy, run_id),
        on_round,
        commit_seconds=0.0,  # people's machines have worked for it
        course=None
        if course is None
        else partial(course.rounds, run_id=run_id, folder=store.folder / run_id, states=None),
        remark=task.remark,
    )
    if status == "interrupted":
        raise KeyboardInterrupt
    if course is not None:
        keep_report(store.folder / run_id, course.report(store.history(run_id), run_id))
    return run_id


def _course(
    run: RunFile, federation: Federation, task: Task, strategy: Strategy, module: nn.Module
) -> Course:
    """The stages of a run over experiences."""
    if not isinstance(federation, Staged):
        raise RefusedError(
            f"experiences = {run.continual.experiences}, and these clients know none",
            where="[continual]",
            fix="remove [continual], or umbel simulate",
        )
    if run.continual.by == "column" and run.continual.values is None:
        raise InputError(
            f"nobody sees all values of column '{run.continual.column}'",
            where="[continual]",
            fix="values = [2019, 2020, …], in order",
        )
    return Course(run, task, strategy, module, Remote(federation, run), log.info)
