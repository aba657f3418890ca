"""Where the groups of a round are computed: in this process, or in workers where it is worth it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from umbel.core.payloads import TrainPlan
from umbel.core.trees import Model
from umbel.simulations import workers
from umbel.simulations.chunks import Places
from umbel.simulations.groups import Group
from umbel.simulations.workers import Workers

WORTH = 0.1
"""Seconds of work in a round, from which on workers are started; four of them start in as much."""

FEW = 4
"""Where each client of a cohort has more cores than this, they are better used inside its steps."""

SLACK = 1 << 20
"""Bytes of shared memory beside what was counted: figures, alignment."""


class Dispatcher(Protocol):
    """What computes the groups of a round, wherever that is."""

    def threads(self, clients: int) -> AbstractContextManager[None]:
        """Torch's threads as the clients of a round are trained: where, shall not matter."""

    def run(self, plan: TrainPlan, groups: Sequence[Group]) -> Iterator[Any]:
        """The results of the groups, in their order; tensors of one are valid until the next."""

    def pids(self) -> list[int]:
        """The process ids of the workers."""

    def close(self) -> None:
        """Ends the workers."""


class Dispatch:
    """Computes groups, on one thread each: the same bits in this process and in any number of them.

    Args:
        work: (plan, chunks) -> result; a function of its arguments alone.
        processes: how many workers, 0 for none; ``None``: one for each core, or none where a round
            is too short for them.
        device: where clients are trained; workers are for the CPU.
        announce: told what a user should know.
    """

    def __init__(
        self,
        work: Callable[[TrainPlan, Sequence[Places]], Any],
        processes: int | None,
        device: torch.device,
        announce: Callable[[str], None],
    ) -> None:
        self._work = work
        self._asked = processes
        self._announce = announce
        self._possible = device.type == "cpu" and processes != 0 and workers.available()
        self._on_cpu = device.type == "cpu"
        self._workers: Workers | None = None
        if processes and not self._possible:
            announce(
                f"processes = {processes}: workers need Linux, device = 'cpu' and a torch without "
                "an accelerator; training in this process"
            )

    def wide(self, clients: int) -> bool:
        """Whether so few clients are trained that each step takes all cores, in this process."""
        return self._on_cpu and clients * FEW < workers.cores()

    @contextmanager
    def threads(self, clients: int) -> Iterator[None]:
        """Torch's threads as the clients of a round are trained: where, shall not matter."""
        before = torch.get_num_threads()
        if not self._on_cpu or before == 1 or self.wide(clients):
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def run(self, plan: TrainPlan, groups: Sequence[Group]) -> Iterator[Any]:
        """The results of the groups, in their order; tensors of one are valid until the next."""
        clients = sum(len(chunk) for group in groups for chunk in group.chunks)
        # Until the last result was used: threads of a sum, spinning, would take workers' cores.
        with self.threads(clients):
            yield from self._run(plan, groups, clients)

    def _run(self, plan: TrainPlan, groups: Sequence[Group], clients: int) -> Iterator[Any]:
        begun = 0
        if self._workers is None and self._possible and not self.wide(clients):
            seconds = float("inf")
            if self._asked is None and len(groups) > 1:
                # Of this thread alone: what other programs take says nothing about the round.
                start = time.thread_time()
                result = self._work(plan, groups[0].chunks)
                seconds = (time.thread_time() - start) * (len(groups) - 1)
                yield result
                begun = 1
            if self._asked or (len(groups) > 1 and seconds > WORTH):
                self._start(plan, groups)
        if self._workers is not None:
            left = groups[begun:]
            tasks, costs = [group.chunks for group in left], [group.cost for group in left]
            yield from self._workers.map(plan, tasks, costs)
            return
        for group in groups[begun:]:
            yield self._work(plan, group.chunks)

    def close(self) -> None:
        """Ends the workers."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [] if self._workers is None else self._workers.pids()

    def _start(self, plan: TrainPlan, groups: Sequence[Group]) -> None:
        model = plan.model
        if plan.fold is None:  # every update comes back
            clients = max(sum(map(len, group.chunks)) for group in groups)
            result = clients * model.bytes()
        else:
            result = _sum_bytes(model)
        count = min(self._asked or workers.cores(), len(groups))
        self._workers = Workers(
            self._work, count, model.bytes() + SLACK, result + SLACK, self._announce
        )


def _sum_bytes(model: Model) -> int:
    """Of one accumulator: float64, each tensor on a line of its own."""
    return sum(8 * t.numel() + 64 for t in model.tensors().values())
