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
import torch

from umbel.core import registry
from umbel.core.errors import InputError
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
from umbel.datasets import experiences
from umbel.datasets.federated import FederatedData
from umbel.server import continual
from umbel.server.continual import Met
from umbel.server.evaluation import evaluation
from umbel.server.records import RoundRecord, RoundResult, Scores
from umbel.server.rounds import Evaluate, Start, rounds
from umbel.simulations.continual_asking import importance
from umbel.simulations.continual_checks import WHERE, build_defence, check
from umbel.simulations.continual_memory import Memory
from umbel.simulations.continual_prototypes import Prototypes
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import Prepared
from umbel.simulations.secure import SecureFederation
from umbel.strategies.parts import ClientRule, Strategy
from umbel.strategies.parts.defence import Classes, Turn, defended, turned
from umbel.tasks.build import initial_module
from umbel.tasks.experiences import headed, routed, scored
from umbel.tasks.features import nearest_mean
from umbel.tasks.task import Task

MakeEngine = Callable[[RunFile, FederatedData, Task, ClientRule, Callable[[str], None]], Federation]

ENGINES = ("vectorised", "sequential", "ray")


class Course:
    """The stages of a run. To the outside it is the federation of the stage that is under way.

    Args:
        prepared: the run, as if it had no experiences.
        engine: its name.
        announce: told what a user should know.

    Raises:
        InputError: the run has what experiences do not go with.
    """

    def __init__(self, prepared: Prepared, engine: str, announce: Callable[[str], None]) -> None:
        if engine not in ENGINES:
            raise InputError(
                f"experiences are not on engine '{engine}'",
                where=WHERE,
                fix=f"--engine {', '.join(ENGINES[:-1])} or {ENGINES[-1]}",
            )
        run = prepared.run
        self.defence = build_defence(run)
        check(prepared, self.defence)
        self._make: MakeEngine = registry.find("engines", engine, "--engine")
        self._announce = announce
        self._run = run
        self.stream = experiences.stream(prepared.data, run.continual, run.run.seed)
        self.count, self.stages = self.stream.count, self.stream.stages
        for stage in range(self.stages):
            if not any(len(self.stream.met(p, stage)) for p in range(len(prepared.data.names))):
                raise InputError(
                    f"no client has a training example in stage {stage + 1}",
                    where=WHERE,
                    fix="fewer experiences",
                )
        self.per_stage = run.run.rounds // self.stages
        self._plain = prepared
        self._bare, self._module = prepared.task, prepared.module
        if self.defence.model is not None:
            self._bare = routed(prepared.task, self.defence.model, self.count)
            self._module = self._initial()
        self.memory = Memory(self.stream, self.defence, self._bare, self._initial, run.run.seed)
        self.strategy = defended(prepared.strategy, self.defence, self._classes(0))
        self.prototypes = Prototypes(run, self.memory, self._bare, self._initial)
        self._now: Federation = self._federation(0, self.memory.data(0, None))
        self._stage = 0

    @property
    def prepared(self) -> Prepared:
        """The run, with what the defence makes of its strategy and its model."""
        return self._plain._replace(strategy=self.strategy, task=self._bare, module=self._module)

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
        """Ends the stage's workers."""
        self._now.close()

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
        for stage in range(start.round // self.per_stage, self.stages):
            if stage and start.round == stage * self.per_stage:
                start = self._turn(stage, start, folder)
            if stage != self._stage:
                self._now.close()
                self._now = self._federation(stage, self.memory.data(stage, folder))
                self._stage = stage
            here = self._until((stage + 1) * self.per_stage)
            scores = self._evaluation(stage, run_id, states)
            if self.defence.prototypes:
                scores = self.prototypes.around(scores, stage, folder)
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

    def report(self, history: Sequence[RoundRecord]) -> dict[str, Any]:
        """The accuracy matrix of the run so far, and the figures made of it."""
        self.prototypes.forget()
        before = self._evaluation(0, "", None)(0, self.prepared.model())
        joint = None
        if self._run.continual.reference and len(history) == self._run.run.rounds:
            joint = self._joint()
        begins = np.stack([self.stream.begins(p) for p in range(len(self._plain.data.names))])
        met = {
            name: Met(row, row)
            for name, row in zip(self._plain.data.names, begins.tolist(), strict=True)
        }
        met[""] = Met(begins.min(0).tolist(), begins.max(0).tolist())
        return continual.report(history, self.count, self.per_stage, met, before, joint)

    def _joint(self) -> Scores:
        """The scores of a model that is trained on all experiences at once, for as many rounds."""
        self._announce("intransigence: the same rounds with all examples at once")
        plain, last = self._plain, self.stages - 1
        quiet = plain.run.evaluate.model_copy(update={"every": 0})
        run = plain.run.model_copy(update={"evaluate": quiet})
        task = self._headed(plain.task, last)
        federation = self._around(
            self._make(run, self.stream.data, task, plain.strategy.client, self._announce),
            plain.strategy,
        )
        try:
            model = plain.model()
            start = Start(0, model, plain.strategy.init(plain.strategy.travelling(model).params))
            scores = self._scores(task, plain.strategy, plain.module, "", None)
            for result in rounds(run, plain.strategy, federation, start, scores):
                record = result.record
        finally:
            federation.close()
        return Scores(record.metrics, record.per_client)

    def _turn(self, stage: int, start: Start, folder: Path) -> Start:
        """Between two stages: what the defence makes of the model that the last one left."""
        found: Mapping[str, torch.Tensor] = {}
        if self.defence.measure is not None:
            found = importance(
                self._run,
                self.defence.measure,
                self.memory.leaving(stage - 1),
                self._headed(self._bare, stage - 1),
                start.round,
                start.model,
            )
        if self.memory.keeps_models:
            self.memory.keep(folder, stage - 1, start.model)
        turn = Turn(start.model.params, self._classes(stage), found)
        return start._replace(state=turned(self.strategy, self.defence, start.state, turn))

    def _pin(self) -> None:
        """Later stages compute as the first one did, whatever a trial would say of them."""
        plan = self._now.plan_record().get("plan")
        if plan and self._run.run.engine_plan is None:
            pinned = self._run.run.model_copy(update={"engine_plan": str(plan)})
            self._run = self._run.model_copy(update={"run": pinned})

    def _federation(self, stage: int, data: FederatedData) -> Federation:
        task = self._headed(self._bare, stage)
        made = self._make(self._run, data, task, self.strategy.client, self._announce)
        return self._around(made, self.strategy)

    def _around(self, federation: Federation, strategy: Strategy) -> Federation:
        if self._run.secure_aggregation.enabled:
            return SecureFederation(federation, self._run, strategy)
        return federation

    def _headed(self, task: Task, stage: int) -> Task:
        of_class, head = self.stream.of_class, self._run.continual.head
        if of_class is None:
            return task
        return headed(task, of_class.tolist(), head, self.stream.seen(stage).tolist())

    def _classes(self, stage: int) -> Classes:
        """What a defence is told when a stage begins."""
        classes = self.stream.data.info.classes or 0
        seen = self.stream.seen(stage - 1) if stage else np.zeros(classes, dtype=np.bool_)
        groups = torch.ones(1, classes, dtype=torch.bool)
        if self._run.continual.head == "multi" and self.stream.of_class is not None:
            of_class = torch.from_numpy(self.stream.of_class)
            groups = of_class[None, :] == torch.arange(self.count)[:, None]
        return Classes(groups, torch.from_numpy(seen))

    def _evaluation(self, stage: int, run_id: str, states: States | None) -> Evaluate:
        """Of all clients and all experiences, by the head that the stage has."""
        bare, module = self._bare, self._module
        if self.defence.prototypes:
            bare = nearest_mean(bare, lambda: self.prototypes.means)
            module = initial_module(bare, self._run.run.seed)
        return self._scores(self._headed(bare, stage), self.strategy, module, run_id, states)

    def _scores(
        self,
        task: Task,
        strategy: Strategy,
        module: torch.nn.Module,
        run_id: str,
        states: States | None,
    ) -> Evaluate:
        task = scored(task, self.count)
        shown = self._run.evaluate.model_copy(update={"metrics": None})
        scores = evaluation(
            self._run.model_copy(update={"evaluate": shown}),
            sequential(self._run, self.stream.data, task, strategy.client),
            task,
            module,
            self.stream.data.test,
            "cpu",
            strategy,
            run_id,
            states,
        )
        return continual.by_experience(scores, self.count, self._run.evaluate.metrics)

    def _initial(self) -> torch.nn.Module:
        return initial_module(self._bare, self._run.run.seed)
