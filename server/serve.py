"""A whole run where the clients are remote and the server holds no data."""

from __future__ import annotations

from collections.abc import Callable

import torch

from umbel.core.errors import RefusedError
from umbel.core.payloads import Federation
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, map_tree
from umbel.datasets.federated import Info
from umbel.server.conduct import conduct
from umbel.server.evaluation import evaluation
from umbel.server.records import RoundRecord
from umbel.server.resume import same_run
from umbel.server.store import RunStore
from umbel.strategies.build import build_strategy
from umbel.tasks.begin import base_hash
from umbel.tasks.build import build_task, initial_module, model_of


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
        RefusedError: the run simulates an attack, or experiences.
        UmbelError: what ended the run; its committed rounds stay in the store.
    """
    if run.attack.kind != "none":
        raise RefusedError(
            f"kind = '{run.attack.kind}' is a simulated adversary, and these sites are real",
            where="[attack]",
            fix="remove [attack], or umbel simulate",
        )
    if run.continual.experiences > 1:
        raise RefusedError(
            f"experiences = {run.continual.experiences} are dealt in simulation only, and these "
            "sites are real",
            where="[continual]",
            fix="remove [continual], or umbel simulate",
        )
    strategy = build_strategy(run.strategy)
    task = build_task(run.task, info)
    module = initial_module(task, run.run.seed)
    params, buffers = model_of(module)
    store = RunStore(run.run.store)
    if resume is None:
        run_id = store.create(run, engine=engine, text=text, base_model=base_hash(module))
    else:
        entry = store.get(resume)
        run_id = entry.run_id
        same_run(run, entry.run, run_id)
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
        remark=task.remark,
    )
    if status == "interrupted":
        raise KeyboardInterrupt
    return run_id
