"""What a Ray actor does: it trains and sums the groups that it is given, as any worker does."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import torch

from umbel.core.errors import InputError
from umbel.core.payloads import TrainPlan
from umbel.core.run_file import RunFile
from umbel.core.versions import versions
from umbel.datasets.federated import FederatedData
from umbel.simulations.chunks import Places
from umbel.simulations.parcels import Parcel, pack, unpack
from umbel.strategies.parts import ClientRule
from umbel.tasks.task import Task

if TYPE_CHECKING:
    from umbel.simulations.engines.vectorised import Vectorised


class Subject(NamedTuple):
    """What every actor is told once, beside the data.

    Args:
        run: the run file.
        task: what is learned.
        rule: what clients do besides.
    """

    run: RunFile
    task: Task
    rule: ClientRule


class Greeting(NamedTuple):
    """What an actor says of itself when it is ready.

    Args:
        host: the name of its machine.
        pid: its process id there.
        versions: as :func:`umbel.core.versions.versions`.
        processor: the instructions that its torch uses, or the name of its GPU; others may round
            otherwise.
    """

    host: str
    pid: int
    versions: dict[str, Any]
    processor: str


class Worker:
    """The actor: one process, one thread, the vectorised engine with a plan that it is told."""

    def __init__(self) -> None:
        self._subject: Subject | None = None
        self._data: FederatedData | None = None
        self._engine: Vectorised | None = None
        self._built = ""
        self._number = 0
        self._shared: tuple[str, TrainPlan] | None = None

    def ready(self, folders: Sequence[str], refs: Sequence[Any]) -> Greeting:
        """Gets what it is told once.

        Args:
            folders: what the driver imports from, besides what is installed.
            refs: of a pickled :class:`Subject`, and of the data. In a sequence, so that Ray does
                not open them before the folders are known.

        Raises:
            InputError: a module is not here.
        """
        torch.set_num_threads(1)
        sys.path += [f for f in folders if f not in sys.path and Path(f).is_dir()]
        subject, data = refs
        try:
            self._subject = ray.cloudpickle.loads(ray.get(subject))
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"a Ray worker on {platform.node()} cannot load the run's parts: {error}",
                where="--engine ray",
                fix="install their module on every node, or keep it in a folder that all share",
            ) from None
        self._data = ray.get(data)
        return self.hello()

    def hello(self) -> Greeting:
        """That it is still there."""
        assert self._subject is not None
        return greeting(self._subject.run)

    def compute(self, number: int, refs: Sequence[Any], chunks: Sequence[Places]) -> Parcel:
        """The result of one group.

        Args:
            number: of the exchange, from 1; its shared value is read once.
            refs: of a parcel: the engine plan as text, and the plan of the round.
            chunks: the places of the clients, an array each.
        """
        if number != self._number:
            self._number, self._shared = number, unpack(ray.get(refs[0]))
        assert self._shared is not None
        text, plan = self._shared
        return pack(self._engine_of(text).compute(plan, chunks))

    def _engine_of(self, text: str) -> Vectorised:
        from umbel.simulations.engines.vectorised import Vectorised
        from umbel.simulations.plan import EnginePlan
        from umbel.simulations.residents import Residents

        if self._engine is None or text != self._built:
            assert self._subject is not None
            assert self._data is not None
            residents = Residents(self._subject.run, self._data, *self._subject[1:])
            pinned = EnginePlan.parse(text)
            # What a user should know of the model, the driver has said.
            self._engine = Vectorised(residents, _silent, None, None, pinned, 0)
            self._built = text
        return self._engine


def greeting(run: RunFile) -> Greeting:
    """What this process says of itself."""
    if run.client.device == "cpu":
        cpu = torch.backends.cpu.get_cpu_capability()
        processor = f"{platform.machine()} {cpu}"
    else:
        processor = torch.cuda.get_device_name()
    return Greeting(platform.node(), os.getpid(), versions(), processor)


def _silent(message: str) -> None:
    pass
