"""What a run over experiences needs of the place where clients live: in process, or far away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from umbel.core.messages import Question
from umbel.core.payloads import Federation
from umbel.core.run_file import RunFile
from umbel.core.trees import Tree
from umbel.datasets.experiences import Timetable
from umbel.datasets.federated import Arrays, Info
from umbel.strategies.parts import Strategy
from umbel.tasks.task import Task

Models: TypeAlias = Callable[[int], Tree]
"""Stage -> the tensors of the model that it ended with."""


class Ground(Protocol):
    """Where clients live, who meet experiences in stages."""

    @property
    def info(self) -> Info:
        """What a task needs to know of the data."""

    @property
    def names(self) -> Sequence[str]:
        """All clients."""

    @property
    def times(self) -> Timetable:
        """When they meet the experiences."""

    @property
    def test(self) -> Arrays | None:
        """The test examples that are here, with a column ``experience``; ``None``: there are none,
        or not here."""

    def sizes(self, question: Question, stage: int) -> Sequence[int]:
        """How many examples each client answers a question with; 0: it is not asked. Under masks
        a remote client says 1 for any number."""

    def learning(
        self,
        run: RunFile,
        question: Question,
        stage: int,
        task: Task,
        strategy: Strategy,
        models: Models | None,
    ) -> Federation:
        """Those who are asked a question in a stage.

        Args:
            run: the run file that they are asked by.
            question: what they are asked.
            stage: from 0.
            task: as they have it.
            strategy: what is made of their answers.
            models: those that earlier stages ended with; ``None``: there are none yet.
        """

    def evaluating(
        self,
        run: RunFile,
        question: Question,
        stage: int,
        task: Task,
        strategy: Strategy,
        shared: Callable[[], Mapping[str, Tree]],
    ) -> Federation:
        """All clients, with their own test parts.

        Args:
            run: the run file.
            question: ``train``, or ``joint``: the plain task's model.
            stage: whose head they have, from 0.
            task: as they have it.
            strategy: the same.
            shared: what a remote client is sent besides the model, by letter.
        """

    def close(self) -> None:
        """Ends what all stages share."""
