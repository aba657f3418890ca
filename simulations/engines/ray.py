"""The vectorised engine, spread over a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable

from umbel.core.errors import InputError
from umbel.core.extras import extra
from umbel.core.payloads import Federation
from umbel.core.run_file import RunFile
from umbel.datasets.federated import FederatedData
from umbel.strategies.parts import ClientRule
from umbel.tasks.task import Task


def ray(
    run: RunFile,
    data: FederatedData,
    task: Task,
    rule: ClientRule,
    announce: Callable[[str], None] = lambda message: None,
) -> Federation:
    """As vectorised, on the CPUs of a Ray cluster; the same bits under the same engine plan.

    This process picks the plan and deals the cohort to groups, as the vectorised engine does; Ray's
    workers train and sum them. The bits are the same where the CPUs are of one kind.

    Args:
        run: the run file; ``[run] ray_address`` names a cluster, ``processes`` bounds the workers.
        data: who holds what.
        task: what is learned.
        rule: what clients do besides.
        announce: told what a user should know.

    Raises:
        InputError: as :func:`~umbel.simulations.engines.vectorised.vectorised`; the device is not
            the CPU; Ray is not installed; no cluster answers at the address; the user's own parts
            cannot be sent.
        RunError: no node has a CPU.
    """
    from dataclasses import replace

    from umbel.server.sampling import cohort_size
    from umbel.simulations.dispatch import Dispatch, Dispatcher
    from umbel.simulations.engines.vectorised import Vectorised
    from umbel.simulations.plan import EnginePlan
    from umbel.simulations.residents import Residents

    with extra("ray", "--engine ray"):
        from umbel.simulations.ray_cluster import join
        from umbel.simulations.ray_dispatch import RayDispatch
        from umbel.simulations.ray_worker import Subject

    residents = Residents(run, data, task, rule)
    device = residents.runtime.device
    if device.type != "cpu":
        raise InputError(
            f"Ray's workers train on CPUs, and the device is '{device}'",
            where="[client] device",
            fix="set device = 'cpu', or use --engine vectorised, which trains on this GPU",
        )
    if run.run.processes == 0:
        raise InputError(
            "processes = 0 leaves Ray no worker",
            where="[run] processes",
            fix="leave it out, or use --engine vectorised",
        )
    pinned = None if run.run.engine_plan is None else EnginePlan.parse(run.run.engine_plan)
    # Test examples stay here, and the device is not looked for again on every node.
    train = replace(data, test=None, client_test=None, client_test_holdings=None)
    on_cpu = run.model_copy(update={"client": run.client.model_copy(update={"device": "cpu"})})
    cohort = cohort_size(run.strategy, len(data.names))
    announce("starting Ray's workers: some seconds until the first round")
    cluster = join(run.run.ray_address)

    def dispatch(engine: Vectorised) -> Dispatcher:
        local = Dispatch(engine.compute, 0, device, announce)
        return RayDispatch(
            cluster,
            local,
            lambda: str(engine.plan_record()["plan"]),
            Subject(on_cpu, task, rule),
            train,
            run.run.processes,
            0 if local.wide(cohort) else cohort,
            announce,
        )

    try:
        return Vectorised(residents, announce, None, None, pinned, 0, dispatch)
    except BaseException:
        cluster.close()
        raise
