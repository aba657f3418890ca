"""A task in a stream of experiences: which classes count, and figures experience by experience."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.core.messages import Question
from umbel.tasks.task import Batch, Forward, Task

NEVER = -1e4
"""The logit of a class that does not count: exp of it is 0 in every precision."""

METRIC = "accuracy"


def headed(task: Task, of_class: Sequence[int], head: str, seen: Sequence[bool]) -> Task:
    """The task with a head for experiences that are groups of classes.

    Args:
        task: its model gives one logit for each class.
        of_class: the experience of each class.
        head: ``multi``: of the classes of the example's own experience; ``growing``: of those seen
            so far; ``single``: of all, and the task stays as it is.
        seen: whether each class was met so far.
    """
    if head == "single":
        return task
    group = torch.tensor(of_class)
    met = torch.tensor(seen)

    def among(forward: Forward, batch: Batch) -> Forward:
        y = batch["y"]
        if head == "multi":
            counts = group.to(y.device)[y][:, None] == group.to(y.device)[None, :]
        else:
            counts = met.to(y.device)[None, :]

        def masked(*inputs: Any, **named: Any) -> Tensor:
            out = forward(*inputs, **named)
            return torch.where(counts, out, NEVER)

        return masked

    return task._replace(
        losses=lambda forward, batch: task.losses(among(forward, batch), batch),
        metrics=lambda forward, batch: task.metrics(among(forward, batch), batch),
    )


def routed(task: Task, parted: Callable[[nn.Module, int], nn.Module], count: int) -> Task:
    """The task with a model that has parts for ``count`` experiences, and is told which each
    example is of: the column ``experience`` of a batch."""

    def told(forward: Forward, batch: Batch) -> Forward:
        return partial(forward, experience=batch["experience"])

    return task._replace(
        build=lambda: parted(task.build(), count),
        losses=lambda forward, batch: task.losses(told(forward, batch), batch),
        metrics=lambda forward, batch: task.metrics(told(forward, batch), batch),
    )


def asked(
    task: Task,
    question: Question,
    of_class: Sequence[int] | None,
    head: str,
    seen: Sequence[bool],
    count: int,
) -> Task:
    """The task as clients have it who are asked ``question``, evaluation included.

    Args:
        task: :func:`routed` where the defence has parts, but for ``joint``.
        question: as of a :class:`~umbel.core.messages.Stage`.
        of_class: the experience of each class; ``None``: all have all classes.
        head: as for :func:`headed`.
        seen: as for :func:`headed`.
        count: of experiences.
    """
    if of_class is not None and question != "prototypes":
        task = headed(task, of_class, head, seen)
    return scored(task, count)


def share(experience: int) -> str:
    """The name of the figure that says which examples are of this experience."""
    return f"experience-{experience + 1}/share"


def hits(experience: int) -> str:
    """The name of the figure that says which of these are given their class."""
    return f"experience-{experience + 1}/hits"


def scored(task: Task, count: int) -> Task:
    """The task, whose evaluation tells the examples of ``count`` experiences apart.

    The column ``experience`` of what is evaluated says which is which. Means over any examples, of
    :func:`share` and :func:`hits`, then give the accuracy on each experience among them.

    Raises:
        InputError: the task is not measured by its accuracy, or evaluates in episodes.
    """

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        figures = task.metrics(forward, batch)
        if METRIC not in figures:
            raise InputError(
                "a run over experiences is measured by accuracy, and this task has none",
                where="[task]",
                fix="kind = 'classification'",
            )
        right = figures[METRIC]
        at = batch["experience"]
        apart: dict[str, Tensor] = {}
        for j in range(count):
            here = (at == j).to(right.dtype)
            apart |= {share(j): here, hits(j): here * right}
        return {**figures, **apart}

    return task._replace(test=task._replace(metrics=metrics))


def outputs(task: Task, forward: Callable[..., Tensor], batch: Batch) -> Tensor:
    """What the model gives for the batch, (B, classes), before any head, without gradients."""
    found: list[Tensor] = []

    def remember(*inputs: Any, **named: Any) -> Tensor:
        found.append(forward(*inputs, **named))
        return found[-1]

    with torch.no_grad():
        task.losses(remember, batch)
    return found[0]
