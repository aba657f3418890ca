"""The class means that a model is evaluated by: as fresh as what clients still have allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from umbel.core.run_file import RunFile
from umbel.core.trees import Model
from umbel.datasets.federated import FederatedData, take
from umbel.server.checkpoints import replace_file
from umbel.server.records import Scores
from umbel.server.rounds import Evaluate
from umbel.simulations.continual_asking import class_means
from umbel.simulations.continual_memory import Memory
from umbel.tasks.features import Means, features
from umbel.tasks.task import Task

FILE = "prototypes.safetensors"


class Prototypes:
    """Finds class means whenever a model is evaluated.

    Args:
        run: the run file.
        memory: what clients have.
        task: without a head.
        initial: makes the initial module.
    """

    def __init__(
        self, run: RunFile, memory: Memory, task: Task, initial: Callable[[], torch.nn.Module]
    ) -> None:
        self._run, self._memory, self._task, self._initial = run, memory, task, initial
        self._width: int | None = None
        self._of_stage: dict[int, Means] = {}
        self.means: Means | None = None

    def forget(self) -> None:
        """From here on the model's own logits count."""
        self.means = None

    def around(self, scores: Evaluate, stage: int, folder: Path) -> Evaluate:
        """The evaluation in a stage, by means that are found first, and kept in the run's folder
        beside the model."""

        def fresh(number: int, model: Model) -> Scores:
            self.means = self._now(stage, folder, number, model)
            tensors = {"means": self.means.means, "known": self.means.known}
            replace_file(
                folder / FILE, lambda path: safetensors.torch.save_file(tensors, str(path))
            )
            return scores(number, model)

        return fresh

    def _now(self, stage: int, folder: Path, number: int, model: Model) -> Means:
        """Of what clients have, by this model; of other classes, by the model that the last stage
        with them ended with."""
        found = self._found(self._memory.distinct(stage, folder), number, model)
        for earlier in reversed(range(stage)):
            if earlier not in self._of_stage:
                tensors = self._memory.model(folder, earlier)
                params = {n: tensors[n] for n in model.params}
                then = Model(params, {n: tensors[n] for n in model.buffers})
                data = self._memory.distinct(earlier, folder)
                self._of_stage[earlier] = self._found(data, number, then)
            old = self._of_stage[earlier]
            means = torch.where(found.known[:, None], found.means, old.means)
            found = Means(means, found.known | old.known)
        return found

    def _found(self, data: FederatedData, number: int, model: Model) -> Means:
        if self._width is None:
            one = take(data.train, data.train_holdings.index[:1])
            self._width = features(self._task, self._initial(), one).shape[1]
        return class_means(self._run, data, self._task, number, model, self._width)
