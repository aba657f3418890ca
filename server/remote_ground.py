"""The ground of a run over experiences whose clients are remote, and know their stages themselves.

What travels besides the model is small: which stage it is, and in which order the client meets
experiences. What a client has of them, and keeps of them, follows from its own examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from umbel.core.errors import InputError
from umbel.core.messages import AFTER, Question, Stage
from umbel.core.payloads import (
    EvaluatePlan,
    Evaluation,
    Failure,
    Federation,
    Folded,
    TrainPlan,
    Updates,
)
from umbel.core.run_file import RunFile
from umbel.core.trees import Tree, flatten
from umbel.datasets.experiences import Timetable, timetable
from umbel.datasets.federated import Arrays, Info
from umbel.server.course_ground import Models
from umbel.strategies.build import build_defence
from umbel.strategies.parts import Strategy
from umbel.tasks.begin import base_hash
from umbel.tasks.build import initial_module
from umbel.tasks.task import Task

EXPERIENCES_UNDER_MASKS = 7
"""Each has two figures, and an evaluation under masks has room for 16."""


class Asked(NamedTuple):
    """How clients are asked in a stage.

    Args:
        run: the run file that they are asked by.
        strategy: what is made of their answers.
        stages: client -> where it is.
        sizes: client -> how many examples it answers with; the others are not there.
        base: hash of what is frozen in the model that they have.
    """

    run: RunFile
    strategy: Strategy
    stages: Mapping[str, Stage]
    sizes: Mapping[str, int]
    base: str | None


@runtime_checkable
class Staged(Federation, Protocol):
    """A federation of remote clients that know experiences."""

    info: Info

    def sizes(self, stages: Mapping[str, Stage]) -> Mapping[str, Mapping[Question, Sequence[int]]]:
        """How many examples each client answers each question with, stage after stage.

        Raises:
            RunError: one does not say.
        """

    def asked(self, how: Asked) -> Federation:
        """The clients who are there, as they are asked in a stage. Closing it closes nothing."""


class Remote:
    """Clients far away.

    Args:
        federation: the clients.
        run: the run file.
        test: the test examples that are here, with a column ``experience``; ``None``: none are.

    Raises:
        InputError: what the run has cannot be asked of remote clients.
        RunError: a client does not say what it has.
    """

    def __init__(self, federation: Staged, run: RunFile, test: Arrays | None = None) -> None:
        self._federation, self._test = federation, test
        section, seed = run.continual, run.run.seed
        self._seed = seed
        if run.secure_aggregation.enabled:
            _check_masks(run)
        self._times = timetable(self.info, self.names, section, seed)
        first = {name: self._stage(place, "train", 0) for place, name in enumerate(self.names)}
        self._sizes = federation.sizes(first)

    @property
    def info(self) -> Info:
        """What the clients say of their data."""
        return self._federation.info

    @property
    def names(self) -> Sequence[str]:
        """All clients."""
        return self._federation.clients()

    @property
    def times(self) -> Timetable:
        """When they meet the experiences."""
        return self._times

    @property
    def test(self) -> Arrays | None:
        """The test examples that are here."""
        return self._test

    def sizes(self, question: Question, stage: int) -> Sequence[int]:
        """How many examples each client answers a question with."""
        return [self._sizes[name][question][stage] for name in self.names]

    def learning(
        self,
        run: RunFile,
        question: Question,
        stage: int,
        task: Task,
        strategy: Strategy,
        models: Models | None,
    ) -> Federation:
        """Those who are asked a question in a stage."""
        sizes = dict(zip(self.names, self.sizes(question, stage), strict=True))
        there = {name: size for name, size in sizes.items() if size}
        asked = self._federation.asked(self._asked(run, question, stage, task, strategy, there))

        def shared() -> Mapping[str, Tree]:
            if models is None or question not in ("train", "prototypes"):
                return {}
            left = [self._times.earlier(place, stage) for place in range(len(self.names))]
            needed = {ended for stages in left for ended in stages.values()}
            return {f"{AFTER}{ended}": models(ended) for ended in sorted(needed)}

        return _Sending(asked, shared)

    def evaluating(
        self,
        run: RunFile,
        question: Question,
        stage: int,
        task: Task,
        strategy: Strategy,
        shared: Callable[[], Mapping[str, Tree]],
    ) -> Federation:
        """All clients, with their own test parts."""
        everybody = dict.fromkeys(self.names, 1)
        how = self._asked(run, question, stage, task, strategy, everybody)
        return _Sending(self._federation.asked(how), shared)

    def close(self) -> None:
        """Ends the connections."""
        self._federation.close()

    def _asked(
        self,
        run: RunFile,
        question: Question,
        stage: int,
        task: Task,
        strategy: Strategy,
        sizes: Mapping[str, int],
    ) -> Asked:
        stages = {
            name: self._stage(place, question, stage) for place, name in enumerate(self.names)
        }
        return Asked(run, strategy, stages, sizes, base_hash(initial_module(task, self._seed)))

    def _stage(self, place: int, question: Question, stage: int) -> Stage:
        order, seen = self._times.order[place].tolist(), self._times.seen(stage).tolist()
        return Stage(number=stage, question=question, order=tuple(order), seen=tuple(seen))


class _Sending:
    """A federation whose clients are sent something besides, made when a round begins."""

    def __init__(self, inner: Federation, shared: Callable[[], Mapping[str, Tree]]) -> None:
        self._inner, self._shared = inner, shared

    def clients(self) -> Sequence[str]:
        """The names of the clients."""
        return self._inner.clients()

    def examples(self) -> Any:
        """How many training examples each declares."""
        return self._inner.examples()

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure | Folded]:
        """Trains the plan's clients."""
        shared = {**plan.shared, **flatten(self._shared())}
        return self._inner.train(replace(plan, shared=shared))

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        """Evaluates at the plan's clients."""
        return self._inner.evaluate(replace(plan, shared=flatten(self._shared())))

    def plan_record(self) -> Mapping[str, Any]:
        """How updates are computed."""
        return self._inner.plan_record()

    def close(self) -> None:
        """Ends nothing: the clients are asked on."""


def _check_masks(run: RunFile) -> None:
    """Refuses what nobody can sum who sees no counts."""
    found = ""
    if build_defence(run.continual).prototypes:
        found = "sums of features have no bound where nobody tells how many examples it has"
    elif run.continual.experiences > EXPERIENCES_UNDER_MASKS:
        found = f"{run.continual.experiences} experiences cannot be told apart under masks"
    if found:
        raise InputError(
            found,
            where="[continual]",
            fix=f"another defence, at most {EXPERIENCES_UNDER_MASKS} experiences, or no masks",
        )
