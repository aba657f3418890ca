"""Who trains on what in a stage: the new examples, and what clients kept of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from umbel.core.messages import Question
from umbel.core.trees import Tree
from umbel.datasets.buffer import Rows, herded, replayed
from umbel.datasets.experiences import Stream, of_stage
from umbel.datasets.federated import FederatedData, take
from umbel.strategies.parts.defence import Defence
from umbel.tasks.evaluate import BATCH, tensor_of
from umbel.tasks.experiences import outputs
from umbel.tasks.features import features
from umbel.tasks.task import Task

Models: TypeAlias = Callable[[int], Tree]
"""Stage -> the tensors of the model that it ended with."""


class Memory:
    """What clients remember of a stream. All of it follows from the stream, the seed and the models
    that stages ended with: a client that was away, or is started anew, remembers the same.

    Args:
        stream: the experiences.
        defence: says what is kept.
        task: without a head.
        initial: makes the initial module.
        seed: of the run.
        places: of the clients, in the stream, that are remembered for; ``None``: of all. The others
            have no examples here.
    """

    def __init__(
        self,
        stream: Stream,
        defence: Defence,
        task: Task,
        initial: Callable[[], torch.nn.Module],
        seed: int,
        places: Sequence[int] | None = None,
    ) -> None:
        self.stream, self._defence, self._task = stream, defence, task
        self._initial, self._seed = initial, seed
        self.places = frozenset(range(len(stream.data.names)) if places is None else places)
        self._herded: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def of(self, question: Question, stage: int, models: Models | None) -> FederatedData:
        """The examples that clients answer a question with; those who have none are left out."""
        if question == "train":
            return self.data(stage, models)
        if question == "prototypes":
            return self.distinct(stage, models)
        return self.leaving(stage) if question == "importance" else self.stream.data

    def sizes(self, question: Question, stage: int) -> list[int]:
        """How many examples each client answers a question with; no model is needed for that."""
        if question == "joint":
            held = self.stream.data.train_holdings.sizes()
            return [int(n) if p in self.places else 0 for p, n in enumerate(held)]
        if question == "importance":
            leaves = self.stream.times.leaves
            return [len(rows) * leaves(p, stage) for p, rows in enumerate(self.new(stage))]
        pairs = zip(self.new(stage), self.kept(stage, None), strict=True)
        repeat = question == "train" and self._repeats
        return [len(replayed(new, old, repeat=repeat)) for new, old in pairs]

    @property
    def _repeats(self) -> bool:
        return self._defence.buffer is not None and self._defence.buffer.repeat

    def data(self, stage: int, models: Models | None) -> FederatedData:
        """Who trains on what in a stage.

        Args:
            stage: from 0.
            models: those that earlier stages ended with; ``None``: what follows from them is left
                out.
        """
        new = self.new(stage)
        old = self.kept(stage, models)
        parts = [replayed(n, o, repeat=self._repeats) for n, o in zip(new, old, strict=True)]
        return of_stage(self.stream, parts, self._columns(stage, old, models))

    def distinct(self, stage: int, models: Models | None) -> FederatedData:
        """The same examples, each once."""
        pairs = zip(self.new(stage), self.kept(stage, models), strict=True)
        return of_stage(self.stream, [np.concatenate(p) for p in pairs], self._experience())

    def leaving(self, stage: int) -> FederatedData:
        """The examples of the experiences that clients are done with after a stage."""
        parts = [
            rows if self.stream.times.leaves(place, stage) else rows[:0]
            for place, rows in enumerate(self.new(stage))
        ]
        return of_stage(self.stream, parts, self._experience())

    def new(self, stage: int) -> list[Rows]:
        """What each client meets in a stage."""
        return [
            self.stream.met(place, stage) if place in self.places else np.zeros(0, np.int32)
            for place in range(len(self.stream.data.names))
        ]

    def kept(self, stage: int, models: Models | None) -> list[Rows]:
        """What each client has kept of earlier experiences; nothing where it meets nothing new."""
        buffer, data = self._defence.buffer, self.stream.data
        found: list[Rows] = []
        example = sum(column[:1].nbytes for column in data.train.values())
        for place, name in enumerate(data.names):
            earlier = self.stream.times.earlier(place, stage)
            met = [self.stream.of(place, e) for e in earlier]
            away = place not in self.places
            if away or buffer is None or not met or not len(self.stream.met(place, stage)):
                found.append(np.zeros(0, np.int32))
                continue
            ranks = None
            if buffer.choice == "herding" and models is not None:
                parts = [self._ranks(place, e, left, models) for e, left in earlier.items()]
                ranks = np.concatenate(parts)
            found.append(buffer.kept(met, data.train["y"], example, self._seed, name, ranks))
        return found

    def _ranks(
        self, place: int, experience: int, left: int, models: Models
    ) -> npt.NDArray[np.int64]:
        """How soon each row of a client's experience is taken among those of its class."""
        known = self._herded.get((place, experience))
        if known is not None:
            return known
        rows = self.stream.of(place, experience)
        part = take({**self.stream.data.train, **self._experience()}, rows)
        found = (
            features(self._task, self._loaded(models, left), part).numpy() if len(rows) else None
        )
        ranks = np.zeros(len(rows), dtype=np.int64)
        buffer = self._defence.buffer
        for label in np.unique(part["y"]):
            here = np.flatnonzero(part["y"] == label)
            assert found is not None
            order = herded(found[here], None if buffer is None else buffer.per_class)
            ranks[here[order]] = np.arange(len(here))
        self._herded[place, experience] = ranks
        return ranks

    def _columns(
        self, stage: int, old: Sequence[Rows], models: Models | None
    ) -> dict[str, npt.NDArray[Any]]:
        """What training rows have besides: ``old``, ``z`` where outputs are stored, and the
        experience, as far as the defence reads them."""
        columns = self._experience()
        n = len(self.stream.of_row)
        if self._defence.tells_old:
            kept = np.zeros(n, dtype=np.bool_)
            kept[np.concatenate(old)] = True
            columns["old"] = kept
        if self._defence.stores_outputs:
            columns["z"] = self._stored(stage, old, models)
        return columns

    def _experience(self) -> dict[str, npt.NDArray[Any]]:
        return {"experience": self.stream.of_row} if self._defence.model is not None else {}

    def _stored(
        self, stage: int, old: Sequence[Rows], models: Models | None
    ) -> npt.NDArray[np.float32]:
        """What the model gave for each old row when its experience ended, (rows, classes)."""
        data = self.stream.data
        z = np.zeros((len(self.stream.of_row), data.info.classes or 0), dtype=np.float32)
        by_stage: dict[int, list[Rows]] = {}
        for place, rows in enumerate(old):
            for experience, left in self.stream.times.earlier(place, stage).items():
                here = rows[self.stream.of_row[rows] == experience]
                by_stage.setdefault(left, []).append(here)
        for left, parts in sorted(by_stage.items()):
            rows = np.concatenate(parts)
            if not len(rows) or models is None:
                continue
            module = self._loaded(models, left).eval()
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                batch = {c: tensor_of(v) for c, v in take(data.train, part).items()}
                z[part] = outputs(self._task, module, batch).numpy()
        return z

    def _loaded(self, models: Models, stage: int) -> torch.nn.Module:
        module = self._initial()
        module.load_state_dict(dict(models(stage)), strict=False)
        return module
