"""A run over experiences: one federation after another, the model and the server's state handed on.

Everything that a stage needs follows from the run file, the model that the stage starts from, and
the models that earlier experiences ended with, which are kept in the run's folder; so a run that
goes on from a commit within a stage does what it would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import nn

from umbel.core.errors import InputError
from umbel.core.messages import Question
from umbel.core.payloads import (
    EvaluatePlan,
    Evaluation,
    Failure,
    Federation,
    Folded,
    States,
    TrainPlan,
    Updates,
)
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, map_tree
from umbel.server import continual
from umbel.server.checkpoints import write_model
from umbel.server.continual import Met
from umbel.server.course_asking import Asked, importance
from umbel.server.course_checks import WHERE, check
from umbel.server.course_ground import Ground, Models
from umbel.server.course_prototypes import Prototypes
from umbel.server.evaluation import evaluation
from umbel.server.records import RoundRecord, RoundResult, Scores
from umbel.server.rounds import Evaluate, Start, rounds
from umbel.strategies.build import build_defence
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.defence import Turn, classes_of, defended, turned
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.experiences import asked, routed
from umbel.tasks.features import nearest_mean, width_of
from umbel.tasks.task import Task


class Course:
    """The stages of a run. To the outside it is the federation of the stage that is under way.

    Args:
        run: the run file.
        task: as if there were no experiences.
        strategy: the same.
        module: the initial module of the task.
        ground: where clients live.
        announce: told what a user should know.

    Raises:
        InputError: the run has what experiences do not go with.
    """

    def __init__(
        self,
        run: RunFile,
        task: Task,
        strategy: Strategy,
        module: nn.Module,
        ground: Ground,
        announce: Callable[[str], None],
    ) -> None:
        self.defence = build_defence(run.continual)
        buffers = model_of(module).buffers
        check(run, strategy, task, ground.info.classes, buffers, self.defence)
        self._run, self._ground, self._announce = run, ground, announce
        self.times = times = ground.times
        for stage in range(times.stages):
            if not any(ground.sizes("train", stage)):
                raise InputError(
                    f"no client has a training example in stage {stage + 1}",
                    where=WHERE,
                    fix="fewer experiences",
                )
        self.per_stage = run.run.rounds // times.stages
        self._plain = (task, strategy, module)
        self.task, self.module = task, module
        if self.defence.model is not None:
            self.task = routed(task, self.defence.model, times.count)
            self.module = initial_module(self.task, run.run.seed)
        self.strategy = defended(strategy, self.defence, classes_of(times, run.continual.head, 0))
        width = width_of(self.task, self.module, ground.info) if self.defence.prototypes else 0
        self.prototypes = Prototypes(times.classes, width, self.per_stage)
        self._now: Federation = self._federation(0, None, self.strategy)
        self._stage = 0

    def model(self) -> Model:
        """A copy of the initial global model."""
        return _copied(self.module)

    def clients(self) -> Sequence[str]:
        """Those of the stage."""
        return self._now.clients()

    def examples(self) -> Sequence[int] | npt.NDArray[np.int64]:
        """How many training examples each of these has in it."""
        return self._now.examples()

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure | Folded]:
        """Trains clients of the stage."""
        return self._now.train(plan)

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        """Evaluates clients of the stage."""
        return self._now.evaluate(plan)

    def plan_record(self) -> Mapping[str, Any]:
        """How updates are computed, in this stage and in all later ones."""
        return self._now.plan_record()

    def close(self) -> None:
        """Ends the stage's workers, and what the ground has."""
        self._now.close()
        self._ground.close()

    def rounds(
        self, start: Start, run_id: str, folder: Path, states: States | None
    ) -> Iterator[RoundResult]:
        """The rounds after ``start``, stage after stage.

        Args:
            start: where to begin, or to go on.
            run_id: of the run.
            folder: of the run, where the models that experiences ended with are kept.
            states: where clients keep what they keep.
        """
        models = _kept(folder)
        for stage in range(start.round // self.per_stage, self.times.stages):
            if stage and start.round == stage * self.per_stage:
                start = self._turn(stage, start, folder, run_id)
            if stage != self._stage:
                self._now.close()
                self._now = self._federation(stage, models, self.strategy)
                self._stage = stage
            here = self._until((stage + 1) * self.per_stage)
            scores = self._evaluation(stage, run_id, states)
            if self.defence.prototypes:
                whom = self._asked("prototypes", stage, start, run_id, models)
                scores = self.prototypes.around(scores, whom, folder)
            for result in rounds(here, self.strategy, self._now, start, scores, run_id, states):
                start = Start(result.record.round, result.model, result.state)
                self._pin()
                yield result

    def _until(self, last: int) -> RunFile:
        """The run up to a round, with a cohort no larger than the stage is."""
        section, there = self._run.strategy, len(self._now.clients())
        if isinstance(section.cohort, int):
            section = section.model_copy(update={"cohort": min(section.cohort, there)})
        rounds = self._run.run.model_copy(update={"rounds": last})
        return self._run.model_copy(update={"run": rounds, "strategy": section})

    def report(self, history: Sequence[RoundRecord], run_id: str) -> dict[str, Any]:
        """The accuracy matrix of the run so far, and the figures made of it; asks the clients."""
        self.prototypes.means = None
        before = self._evaluation(0, run_id, None)(0, self.model())
        joint = None
        if self._run.continual.reference and len(history) == self._run.run.rounds:
            joint = self._joint(run_id)
        names = self._ground.names
        begins = np.stack([self.times.begins(p) for p in range(len(names))])
        met = {name: Met(row, row) for name, row in zip(names, begins.tolist(), strict=True)}
        met[""] = Met(begins.min(0).tolist(), begins.max(0).tolist())
        return continual.report(history, self.times.count, self.per_stage, met, before, joint)

    def _joint(self, run_id: str) -> Scores:
        """The scores of a model that is trained on all experiences at once, for as many rounds."""
        self._announce("intransigence: the same rounds with all examples at once")
        (plain, strategy, module), last = self._plain, self.times.stages - 1
        quiet = self._run.evaluate.model_copy(update={"every": 0})
        run = self._run.model_copy(update={"evaluate": quiet})
        task = self._as_asked(plain, "joint", last)
        federation = self._ground.learning(run, "joint", last, task, strategy, None)
        try:
            model = _copied(module)
            start = Start(0, model, strategy.init(strategy.travelling(model).params))
            scores = self._scores("joint", last, task, strategy, module, run_id, None)
            for result in rounds(run, strategy, federation, start, scores, f"{run_id}.joint"):
                record = result.record
        finally:
            federation.close()
        return Scores(record.metrics, record.per_client)

    def _turn(self, stage: int, start: Start, folder: Path, run_id: str) -> Start:
        """Between two stages: what the defence makes of the model that the last one left."""
        found: Mapping[str, torch.Tensor] = {}
        if self.defence.measure is not None:
            whom = self._asked("importance", stage - 1, start, run_id, None)
            found = importance(whom, self.defence.measure)
        if self.defence.keeps_models:
            path = _path(folder, stage - 1)
            path.parent.mkdir(exist_ok=True)
            write_model(path, start.model)
        classes = classes_of(self.times, self._run.continual.head, stage)
        turn = Turn(start.model.params, classes, found)
        return start._replace(state=turned(self.strategy, self.defence, start.state, turn))

    def _asked(
        self, question: Question, stage: int, start: Start, run_id: str, models: Models | None
    ) -> Asked:
        task = self._as_asked(self.task, question, stage)
        number, model, _ = start
        return Asked(self._run, self._ground, task, stage, number, model, run_id, models)

    def _pin(self) -> None:
        """Later stages compute as the first one did, whatever a trial would say of them."""
        plan = self._now.plan_record().get("plan")
        if plan and self._run.run.engine_plan is None:
            pinned = self._run.run.model_copy(update={"engine_plan": str(plan)})
            self._run = self._run.model_copy(update={"run": pinned})

    def _federation(self, stage: int, models: Models | None, strategy: Strategy) -> Federation:
        task = self._as_asked(self.task, "train", stage)
        needed = models if self.defence.keeps_models else None
        return self._ground.learning(self._run, "train", stage, task, strategy, needed)

    def _as_asked(self, task: Task, question: Question, stage: int) -> Task:
        times, head = self.times, self._run.continual.head
        of_class = None if times.of_class is None else times.of_class.tolist()
        return asked(task, question, of_class, head, times.seen(stage).tolist(), times.count)

    def _evaluation(self, stage: int, run_id: str, states: States | None) -> Evaluate:
        """Of all clients and all experiences, by the head that the stage has."""
        task, module = self.task, self.module
        if self.defence.prototypes:
            task = nearest_mean(task, lambda: self.prototypes.means)
            module = initial_module(task, self._run.run.seed)
        task = self._as_asked(task, "train", stage)
        return self._scores("train", stage, task, self.strategy, module, run_id, states)

    def _scores(
        self,
        question: Question,
        stage: int,
        task: Task,
        strategy: Strategy,
        module: nn.Module,
        run_id: str,
        states: States | None,
    ) -> Evaluate:
        shown = self._run.evaluate.model_copy(update={"metrics": None})
        run, shared = self._run, self.prototypes.shared
        scores = evaluation(
            run.model_copy(update={"evaluate": shown}),
            self._ground.evaluating(run, question, stage, task, strategy, shared),
            task,
            module,
            self._ground.test,
            "cpu",
            strategy,
            run_id,
            states,
        )
        return continual.by_experience(scores, self.times.count, run.evaluate.metrics)


def _copied(module: nn.Module) -> Model:
    params, buffers = model_of(module)
    return Model(map_tree(torch.clone, params), map_tree(torch.clone, buffers))


def _path(folder: Path, stage: int) -> Path:
    return folder / "continual" / f"{stage + 1:03d}.safetensors"


def _kept(folder: Path) -> Models:
    """Of the models that stages ended with, those that are kept with the run."""
    return lambda stage: safetensors.torch.load_file(_path(folder, stage))
