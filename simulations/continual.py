"""The ground of a run over experiences whose clients' data are all here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from umbel.client.memory import Memory
from umbel.core import registry
from umbel.core.messages import Question
from umbel.core.payloads import Federation
from umbel.core.run_file import RunFile
from umbel.core.trees import Tree
from umbel.datasets import experiences
from umbel.datasets.experiences import Timetable
from umbel.datasets.federated import Arrays, FederatedData, Info
from umbel.server.course import Course
from umbel.server.course_ground import Models
from umbel.server.remote_ground import Remote, Staged
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import Prepared
from umbel.simulations.secure import SecureFederation
from umbel.strategies.build import build_defence
from umbel.strategies.parts import ClientRule, Strategy
from umbel.tasks.build import initial_module
from umbel.tasks.experiences import routed
from umbel.tasks.task import Task

MakeEngine = Callable[[RunFile, FederatedData, Task, ClientRule, Callable[[str], None]], Federation]


class Local:
    """Clients in process.

    Args:
        prepared: the run, as if it had no experiences.
        engine: its name.
        announce: told what a user should know.

    Raises:
        InputError: the data cannot be dealt to experiences.
    """

    def __init__(self, prepared: Prepared, engine: str, announce: Callable[[str], None]) -> None:
        run, task = prepared.run, prepared.task
        self._make: MakeEngine = registry.find("engines", engine, "--engine")
        self._announce = announce
        defence = build_defence(run.continual)
        self.stream = experiences.stream(prepared.data, run.continual, run.run.seed)
        if defence.model is not None:
            task = routed(task, defence.model, self.stream.times.count)
        seed = run.run.seed
        self.memory = Memory(self.stream, defence, task, lambda: initial_module(task, seed), seed)

    @property
    def info(self) -> Info:
        """What a task needs to know of the data."""
        return self.stream.data.info

    @property
    def names(self) -> Sequence[str]:
        """All clients."""
        return self.stream.data.names

    @property
    def times(self) -> Timetable:
        """When they meet the experiences."""
        return self.stream.times

    @property
    def test(self) -> Arrays | None:
        """The global test set."""
        return self.stream.data.test

    def sizes(self, question: Question, stage: int) -> Sequence[int]:
        """How many examples each client answers a question with."""
        return self.memory.sizes(question, stage)

    def learning(
        self,
        run: RunFile,
        question: Question,
        stage: int,
        task: Task,
        strategy: Strategy,
        models: Models | None,
    ) -> Federation:
        """Those who are asked a question in a stage; in training by the engine, else plainly."""
        make = self._make if question in ("train", "joint") else sequential
        data = self.memory.of(question, stage, models)
        made = make(run, data, task, strategy.client, self._announce)
        return SecureFederation(made, run, strategy) if run.secure_aggregation.enabled else made

    def evaluating(
        self,
        run: RunFile,
        question: Question,
        stage: int,
        task: Task,
        strategy: Strategy,
        shared: Callable[[], Mapping[str, Tree]],
    ) -> Federation:
        """All clients, with their own test parts; the task knows what is shared."""
        return sequential(run, self.stream.data, task, strategy.client)

    def close(self) -> None:
        """Nothing to end."""


def course(prepared: Prepared, engine: str, announce: Callable[[str], None]) -> Course:
    """The stages of a simulated run.

    Args:
        prepared: the run, as if it had no experiences.
        engine: its name.
        announce: told what a user should know.

    Raises:
        InputError: the run has what experiences do not go with.
    """
    run, data, task, strategy, module, _ = prepared
    if engine != "flower":
        return Course(run, task, strategy, module, Local(prepared, engine, announce), announce)
    make: MakeEngine = registry.find("engines", engine, "--engine")
    stream = experiences.stream(data, run.continual, run.run.seed)
    federation = make(run, data, task, strategy.client, announce)
    assert isinstance(federation, Staged)
    try:
        ground = Remote(federation, run, stream.data.test)
        return Course(run, task, strategy, module, ground, announce)
    except BaseException:
        federation.close()
        raise
