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

from umbel.core import registry, run_file
from umbel.core.errors import InputError, RunError
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
from umbel.core.trees import Model
from umbel.datasets import experiences
from umbel.datasets.buffer import Rows, replayed
from umbel.datasets.federated import FederatedData, take
from umbel.server import continual
from umbel.server.checkpoints import write_model
from umbel.server.evaluation import evaluation
from umbel.server.records import RoundRecord, RoundResult, Scores
from umbel.server.rounds import Evaluate, Start, rounds
from umbel.simulations.continual_checks import WHERE, build_defence, check
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import Prepared
from umbel.simulations.secure import SecureFederation
from umbel.strategies.parts import ClientRule, Strategy
from umbel.strategies.parts.defence import (
    IMPORTANCE,
    Classes,
    Measure,
    Turn,
    defended,
    measuring,
    turned,
)
from umbel.tasks.evaluate import BATCH, evaluate, tensor_of
from umbel.tasks.experiences import headed, outputs, scored
from umbel.tasks.task import Task

MakeEngine = Callable[[RunFile, FederatedData, Task, ClientRule, Callable[[str], None]], Federation]

ENGINES = ("vectorised", "sequential")


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
                fix=f"--engine {' or '.join(ENGINES)}",
            )
        run = prepared.run
        self.defence = build_defence(run)
        check(prepared, self.defence)
        self._make: MakeEngine = registry.find("engines", engine, "--engine")
        self._announce = announce
        self._run = run
        self._bare = prepared.task
        self._module = prepared.module
        self.stream = experiences.stream(prepared.data, run.continual, run.run.seed)
        self.count = run.continual.experiences
        for stage in range(self.count):
            if not any(len(self.stream.met(p, stage)) for p in range(len(prepared.data.names))):
                raise InputError(
                    f"no client has a training example in stage {stage + 1}",
                    where=WHERE,
                    fix="fewer experiences",
                )
        self.per_stage = run.run.rounds // self.count
        self.strategy = defended(prepared.strategy, self.defence, self._classes(0))
        self._now: Federation = self._federation(run, self._data(0, None), 0, self.strategy)
        self._stage = 0

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
        for stage in range(start.round // self.per_stage, self.count):
            if stage and start.round == stage * self.per_stage:
                start = self._turn(stage, start, folder)
            if stage != self._stage:
                self._now.close()
                data = self._data(stage, folder)
                self._now = self._federation(self._run, data, stage, self.strategy)
                self._stage = stage
            here = self._until((stage + 1) * self.per_stage)
            scores = self._evaluation(stage, run_id, states)
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
        test, before = self.stream.data.test, None
        if test is not None:
            task = scored(self._task(0), self.count)
            _, means = evaluate(task, self._initial(), test)
            scores = continual.by_experience(
                lambda number, model: Scores(means, {}), self.count, None
            )
            found = scores(0, Model({}, {})).metrics
            before = [found.get(continual.name(j), float("nan")) for j in range(self.count)]
        return continual.report(history, self.count, self.per_stage, before)

    def _turn(self, stage: int, start: Start, folder: Path) -> Start:
        """Between two experiences: what the defence makes of the model that the last one left."""
        found: Mapping[str, torch.Tensor] = {}
        if self.defence.measure is not None:
            found = self._measured(self.defence.measure, stage - 1, start)
        if self.defence.stores_outputs:
            path = _kept_model(folder, stage - 1)
            path.parent.mkdir(exist_ok=True)
            write_model(path, start.model)
        turn = Turn(start.model.params, self._classes(stage), found)
        return start._replace(state=turned(self.strategy, self.defence, start.state, turn))

    def _measured(self, measure: Measure, stage: int, start: Start) -> Mapping[str, torch.Tensor]:
        """What all clients find out about the model, over the examples of a stage: a round of
        single examples, with all clients, by the plain engine."""
        client = run_file.Client(
            lr=1.0,
            batch_size=1,
            local_steps=measure.examples,
            device=self._run.client.device,
            precision=self._run.client.precision,
        )
        section = self._run.strategy.model_copy(update={"cohort": None, "over_selection": 0.0})
        run = self._run.model_copy(
            update={
                "run": self._run.run.model_copy(update={"rounds": start.round + 1}),
                "client": client,
                "strategy": section,
            }
        )
        strategy = measuring(measure)
        data = self._data(stage, None, replay=False)
        federation = self._around(
            sequential(run, data, self._task(stage), strategy.client), run, strategy
        )
        try:
            results = rounds(
                run,
                strategy,
                federation,
                Start(start.round, start.model, {}),
                lambda number, model: Scores({}, {}),
            )
            result = next(results)
            results.close()  # type: ignore[attr-defined]
        finally:
            federation.close()
        if IMPORTANCE not in result.state:
            raise RunError(
                f"what mattered to experience {stage + 1} was not found: {result.record.note}",
                where=f"round {start.round}",
                fix="a smaller [strategy] quorum, or mend what the clients report",
            )
        found: Mapping[str, torch.Tensor] = result.state[IMPORTANCE]
        return found

    def _pin(self) -> None:
        """Later stages compute as the first one did, whatever a trial would say of them."""
        plan = self._now.plan_record().get("plan")
        if plan and self._run.run.engine_plan is None:
            pinned = self._run.run.model_copy(update={"engine_plan": str(plan)})
            self._run = self._run.model_copy(update={"run": pinned})

    def _federation(
        self, run: RunFile, data: FederatedData, stage: int, strategy: Strategy
    ) -> Federation:
        engine = self._make(run, data, self._task(stage), strategy.client, self._announce)
        return self._around(engine, run, strategy)

    def _around(self, federation: Federation, run: RunFile, strategy: Strategy) -> Federation:
        if run.secure_aggregation.enabled:
            return SecureFederation(federation, run, strategy)
        return federation

    def _task(self, stage: int) -> Task:
        of_class, head = self.stream.of_class, self._run.continual.head
        if of_class is None:
            return self._bare
        return headed(self._bare, of_class.tolist(), head, self.stream.seen(stage).tolist())

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
        task = scored(self._task(stage), self.count)
        whole = sequential(self._run, self.stream.data, task, self.strategy.client)
        shown = self._run.evaluate.model_copy(update={"metrics": None})
        scores = evaluation(
            self._run.model_copy(update={"evaluate": shown}),
            whole,
            task,
            self._module,
            self.stream.data.test,
            "cpu",
            self.strategy,
            run_id,
            states,
        )
        return continual.by_experience(scores, self.count, self._run.evaluate.metrics)

    def _data(self, stage: int, folder: Path | None, *, replay: bool = True) -> FederatedData:
        """Who trains on what in a stage, with what was kept of earlier ones."""
        data, buffer = self.stream.data, self.defence.buffer
        places = range(len(data.names))
        new: list[Rows] = [self.stream.met(place, stage) for place in places]
        if buffer is None or not replay:
            return experiences.of_stage(self.stream, new)
        example = sum(column[:1].nbytes for column in data.train.values())
        seed = self._run.run.seed
        old = [
            buffer.kept(
                [self.stream.met(place, s) for s in range(stage)],
                data.train["y"],
                example,
                seed,
                data.names[place],
            )
            for place in places
        ]
        old = [o if len(n) else o[:0] for n, o in zip(new, old, strict=True)]
        columns: dict[str, npt.NDArray[Any]] = {}
        if self.defence.tells_old:
            columns = self._told(old, folder)
        parts = [replayed(n, o, repeat=buffer.repeat) for n, o in zip(new, old, strict=True)]
        return experiences.of_stage(self.stream, parts, columns)

    def _told(self, old: Sequence[Rows], folder: Path | None) -> dict[str, npt.NDArray[Any]]:
        """The column ``old`` of all training rows; and ``z``, where outputs are stored."""
        data = self.stream.data
        n, classes = len(self.stream.of_row), data.info.classes or 0
        kept = np.zeros(n, dtype=np.bool_)
        kept[np.concatenate(old)] = True
        if not self.defence.stores_outputs:
            return {"old": kept}
        z = np.zeros((n, classes), dtype=np.float32)
        when = np.argsort(self.stream.order, axis=1)  # (clients, experiences) -> stage
        for stage in range(self.count):
            met = [o[when[place, self.stream.of_row[o]] == stage] for place, o in enumerate(old)]
            rows = np.concatenate([np.zeros(0, np.int32), *met])
            if not len(rows) or folder is None:
                continue
            module = self._initial()
            module.load_state_dict(
                safetensors.torch.load_file(_kept_model(folder, stage)), strict=False
            )
            module.eval()
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                batch = {c: tensor_of(v) for c, v in take(data.train, part).items()}
                z[part] = outputs(self._bare, module, batch).numpy()
        return {"old": kept, "z": z}

    def _initial(self) -> torch.nn.Module:
        from umbel.tasks.build import initial_module

        return initial_module(self._bare, self._run.run.seed)


def _kept_model(folder: Path, stage: int) -> Path:
    return folder / "continual" / f"{stage + 1:03d}.safetensors"
