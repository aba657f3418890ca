"""A remote client in a run over experiences: the same runtime and memory as in a simulation, told
by each message which stage it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from umbel.client.memory import Memory
from umbel.core.errors import InputError
from umbel.core.messages import AFTER, MEANS, QUESTIONS, Question, Stage
from umbel.core.run_file import Continual, RunFile
from umbel.core.trees import Tree
from umbel.datasets import experiences
from umbel.datasets.experiences import Stream, timetable
from umbel.datasets.federated import Arrays, FederatedData, Info
from umbel.strategies.build import asking, build_defence, build_strategy
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.defence import classes_of
from umbel.tasks.build import initial_module
from umbel.tasks.experiences import asked, routed
from umbel.tasks.features import Means, nearest_mean, width_of
from umbel.tasks.task import Task


class Parts(NamedTuple):
    """What a question is answered by.

    Args:
        task: as it is asked.
        strategy: whose client rule is followed.
        bare: the task whose model travels, without a head.
    """

    task: Task
    strategy: Strategy
    bare: Task


def parts(run: RunFile, task: Task, info: Info, stage: Stage, means: Means | None = None) -> Parts:
    """What the client does in a stage.

    Args:
        run: the run file.
        task: what it names.
        info: of the data.
        stage: where the client is.
        means: of classes, that the model is evaluated by; ``None``: its own logits count.
    """
    section, question = run.continual, stage.question
    defence, times = build_defence(section), timetable(info, ("",), section, run.run.seed)
    if defence.model is not None and question != "joint":
        task = routed(task, defence.model, times.count)
    strategy, width = build_strategy(run.strategy), 0
    if question == "prototypes":
        width = width_of(task, initial_module(task, run.run.seed), info)
    # What classes were met counts where the server keeps it, not for what is sent of it.
    strategy = asking(question, strategy, defence, classes_of(times, section.head, 0), width)
    bare = task if means is None else nearest_mean(task, lambda: means)
    of_class = None if times.of_class is None else times.of_class.tolist()
    return Parts(
        asked(bare, question, of_class, section.head, stage.seen, times.count), strategy, task
    )


def memory(
    run: RunFile, bare: Task, data: FederatedData, place: int, name: str, stage: Stage
) -> Memory:
    """What the client remembers.

    Args:
        run: the run file.
        bare: of :class:`Parts`.
        data: all that the client can read.
        place: its own among them.
        name: its own.
        stage: says in which order it meets experiences.
    """
    seed = run.run.seed
    names = [name if at == place else other for at, other in enumerate(data.names)]
    section = run.continual.model_dump_json()
    stream = _stream(_Same(replace(data, names=names)), section, seed, stage.order)
    defence = build_defence(run.continual)
    return Memory(stream, defence, bare, lambda: initial_module(bare, seed), seed, [place])


def sizes(memory: Memory) -> dict[Question, tuple[int, ...]]:
    """How many examples the client would answer each question with, stage after stage."""
    stages = range(memory.stream.times.stages)
    return {q: tuple(sum(memory.sizes(q, s)) for s in stages) for q in QUESTIONS}


def examples(memory: Memory, stage: Stage, models: Mapping[int, Tree]) -> Arrays:
    """What the client answers with.

    Args:
        memory: its own.
        stage: what it is asked.
        models: those that earlier stages ended with, as far as the defence needs them.

    Raises:
        InputError: it has nothing in this stage.
        KeyError: a model is missing.
    """
    found = memory.of(stage.question, stage.number, models.__getitem__)
    names = memory.stream.data.names
    mine = [place for place in memory.places if names[place] in found.names]
    if not mine:
        raise InputError(f"no example in stage {stage.number + 1}", where="[continual]")
    return found.train_part(found.names.index(names[mine[0]]))


def besides(shared: Mapping[str, Tree]) -> tuple[dict[int, Tree], Means | None]:
    """The models that stages ended with, and the class means, of what the server sent."""
    models = {
        int(letter.removeprefix(AFTER)): tree
        for letter, tree in shared.items()
        if letter.startswith(AFTER)
    }
    means = shared.get(MEANS)
    return models, None if means is None else Means(means["means"], means["known"])


class _Same:
    """Data as a key: a process reads them once, and deals them once."""

    def __init__(self, data: FederatedData) -> None:
        self.data = data

    def __hash__(self) -> int:
        return hash((id(self.data.train), *self.data.names))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        return self.data.train is other.data.train and self.data.names == other.data.names


@lru_cache(maxsize=1)
def _stream(same: _Same, section: str, seed: int, order: tuple[int, ...]) -> Stream:
    told = Continual.model_validate_json(section)
    orders = np.tile(np.array(order, np.int64), (len(same.data.names), 1))
    return experiences.stream(same.data, told, seed, orders)
