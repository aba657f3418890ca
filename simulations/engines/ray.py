"""The vectorised engine, spread over a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from umbel.core.errors import InputError
from umbel.core.extras import extra
from umbel.core.payloads import Federation
from umbel.core.run_file import RunFile
from umbel.datasets.federated import FederatedData
from umbel.strategies.parts import ClientRule
from umbel.tasks.task import Task

KINDS: dict[str, Literal["CPU", "GPU"]] = {"cpu": "CPU", "cuda": "GPU"}
"""What a worker has to itself, by the type of the device."""


def ray(
    run: RunFile,
    data: FederatedData,
    task: Task,
    rule: ClientRule,
    announce: Callable[[str], None] = lambda message: None,
) -> Federation:
    """As vectorised, on a Ray cluster's CPUs or GPUs; the same bits under the same engine plan.

    This process picks the plan and deals the cohort to groups, as the vectorised engine does; Ray's
    workers, of one CPU or one GPU each, train and sum them. The bits are the same where these are
    of one kind.

    Args:
        run: the run file; ``[run] ray_address`` names a cluster, ``processes`` bounds the workers.
        data: who holds what.
        task: what is learned.
        rule: what clients do besides.
        announce: told what a user should know.

    Raises:
        InputError: as :func:`~umbel.simulations.engines.vectorised.vectorised`; the device is
            neither a CPU nor a CUDA device; Ray is not installed; no cluster answers at the
            address; the user's own parts cannot be sent.
        RunError: no node has a CPU, or a GPU where that is the device.
    """
    from dataclasses import replace

    import torch

    from umbel.server.sampling import cohort_size
    from umbel.simulations.dispatch import Dispatch, Dispatcher
    from umbel.simulations.engines.vectorised import Vectorised
    from umbel.simulations.plan import EnginePlan
    from umbel.simulations.residents import Residents
    from umbel.simulations.workers import cores

    with extra("ray", "--engine ray"):
        from umbel.simulations.ray_cluster import join
        from umbel.simulations.ray_dispatch import RayDispatch
        from umbel.simulations.ray_worker import Subject

    residents = Residents(run, data, task, rule)
    device = residents.runtime.device
    if device.type not in KINDS:
        raise InputError(
            f"Ray's workers train on CPUs and CUDA devices, and the device is '{device}'",
            where="[client] device",
            fix="set device = 'cpu', or use --engine vectorised, which trains on this GPU",
        )
    kind = KINDS[device.type]
    if run.run.processes == 0:
        raise InputError(
            "processes = 0 leaves Ray no worker",
            where="[run] processes",
            fix="leave it out, or use --engine vectorised",
        )
    pinned = None if run.run.engine_plan is None else EnginePlan.parse(run.run.engine_plan)
    # Test examples stay here, and the device is not looked for again on every node.
    train = replace(data, test=None, client_test=None, client_test_holdings=None)
    # Ray shows each worker its own GPU alone.
    there = run.model_copy(update={"client": run.client.model_copy(update={"device": device.type})})
    cohort = cohort_size(run.strategy, len(data.names))
    announce("starting Ray's workers: some seconds until the first round")
    cluster = join(run.run.ray_address)

    def dispatch(engine: Vectorised) -> Dispatcher:
        local = Dispatch(engine.compute, 0, device, announce)
        return RayDispatch(
            cluster,
            local,
            lambda: str(engine.plan_record()["plan"]),
            Subject(there, task, rule),
            train,
            kind,
            run.run.processes,
            0 if local.wide(cohort) else cohort,
            announce,
        )

    try:
        parts = 2 * cores() if kind == "CPU" else 2 * torch.cuda.device_count()
        return Vectorised(residents, announce, None, None, pinned, 0, dispatch, parts)
    except BaseException:
        cluster.close()
        raise
