"""The class means that a model is evaluated by: as fresh as what clients still have allows."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from umbel.core.messages import MEANS
from umbel.core.trees import Model, Tree
from umbel.server.checkpoints import replace_file
from umbel.server.course_asking import Asked, class_means
from umbel.server.records import Scores
from umbel.server.rounds import Evaluate
from umbel.tasks.features import Means

FILE = "prototypes.safetensors"


class Prototypes:
    """Finds class means whenever a model is evaluated.

    Args:
        classes: of the data.
        width: of the model's features.
        per_stage: rounds of each stage.
    """

    def __init__(self, classes: int, width: int, per_stage: int) -> None:
        self._classes, self._width, self._per_stage = classes, width, per_stage
        self._of_stage: dict[int, Means] = {}
        self.means: Means | None = None

    def shared(self) -> dict[str, Tree]:
        """The means as they are sent; nothing where the model's own logits count."""
        if self.means is None:
            return {}
        means, known = self.means
        return {MEANS: {"means": means, "known": known}}

    def around(self, scores: Evaluate, asked: Asked, folder: Path) -> Evaluate:
        """The evaluation in a stage, by means that are found first, and kept in the run's folder
        beside the model.

        Args:
            scores: reads :attr:`means`.
            asked: the clients of the stage; its number and model are those of the evaluation.
            folder: of the run.
        """

        def fresh(number: int, model: Model) -> Scores:
            self.means = self._now(asked._replace(number=number, model=model))
            tensors = {"means": self.means.means, "known": self.means.known}
            replace_file(
                folder / FILE, lambda path: safetensors.torch.save_file(tensors, str(path))
            )
            return scores(number, model)

        return fresh

    def _now(self, asked: Asked) -> Means:
        """Of what clients have, by this model; of other classes, by the model that the last stage
        with them ended with."""
        found = class_means(asked, self._classes, self._width)
        assert asked.models is not None
        for earlier in reversed(range(asked.stage)):
            if earlier not in self._of_stage:
                tensors, now = asked.models(earlier), asked.model
                params = {n: tensors[n] for n in now.params}
                then = Model(params, {n: tensors[n] for n in now.buffers})
                number = (earlier + 1) * self._per_stage
                past = asked._replace(stage=earlier, number=number, model=then)
                self._of_stage[earlier] = class_means(past, self._classes, self._width)
            old = self._of_stage[earlier]
            means = torch.where(found.known[:, None], found.means, old.means)
            found = Means(means, found.known | old.known)
        return found
