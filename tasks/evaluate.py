"""Per-example losses and metrics from one forward pass, and their means over a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.datasets.episodes import Classes
from umbel.datasets.federated import Arrays, rows, take
from umbel.tasks.task import Batch, Forward, Task

KEPT = 4
"""Outputs that the metrics may reuse: a task that asks its model symbol by symbol has many."""

BATCH = 512
"""Examples in a batch of an evaluation: large enough to be fast, small enough for any laptop."""


def tensor_of(column: npt.NDArray[Any]) -> Tensor:
    """The column as a tensor on its own memory, which nobody may write to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(column)


def per_example(task: Task, forward: Forward, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a batch, to be differentiated, and its figures, which are not.

    The metrics reuse the outputs that the losses were computed from, so that they cost no second
    pass: an output is reused where the model is given the very same tensors again.

    Returns:
        losses (B,), at least float32; and name -> (B,): ``loss`` and the task's metrics.
    Raises:
        InputError: there is not one loss, or not one figure, for each example.
    """
    seen: list[tuple[list[Any], Tensor]] = []

    def remember(*inputs: Any, **named: Any) -> Tensor:
        output = forward(*inputs, **named)
        seen.append(([*inputs, *named.items()], output))
        del seen[:-KEPT]
        return output

    def replay(*inputs: Any, **named: Any) -> Tensor:
        asked = [*inputs, *named.items()]
        for given, output in seen:
            if len(given) == len(asked) and all(map(_same, given, asked)):
                return output.detach()
        with torch.no_grad():
            return forward(*inputs, **named)

    size = len(next(iter(batch.values())))
    losses = task.losses(remember, batch)
    _check("losses", losses, size)
    metrics = dict(task.metrics(replay, batch))
    for name, values in metrics.items():
        _check(f"metric '{name}'", values, size)
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    return losses, {"loss": losses.detach(), **metrics}


def evaluate(
    task: Task,
    module: nn.Module,
    arrays: Arrays,
    batch_size: int = BATCH,
    device: torch.device | str = "cpu",
) -> tuple[int, dict[str, float]]:
    """The means of the loss and of the task's metrics, summed in float64.

    Args:
        task: losses and metrics.
        module: moved to ``device``; evaluated in evaluation mode, and left in its own.
        arrays: the examples; at least one.
        batch_size: examples in one forward pass; the result does not depend on it.
        device: where to compute.

    Returns:
        the number of examples, and name -> mean: ``loss`` and the task's metrics.
    """
    module, task = module.to(device), task.test or task
    was_training = module.training
    module.eval()
    totals: dict[str, Tensor] = {}
    count = 0
    try:
        with torch.no_grad():
            for part in _batches(task, arrays, batch_size):
                count += rows(part)
                batch = {name: tensor_of(column).to(device) for name, column in part.items()}
                forward = module if task.adapt is None else task.adapt(module, batch)
                add_sums(totals, per_example(task, forward, batch)[1], lambda v: v.sum())
    finally:
        module.train(was_training)
    return count, {name: float(total) / count for name, total in totals.items()}


def _batches(task: Task, arrays: Arrays, batch_size: int) -> Iterator[Arrays]:
    """All examples in order; or episodes, the same ones each time."""
    if task.episodes is None:
        for start in range(0, rows(arrays), batch_size):
            yield {name: column[start : start + batch_size] for name, column in arrays.items()}
        return
    classes = Classes.of(arrays["y"], task.episodes, "the test part")
    for number in range(task.test_episodes):
        yield take(arrays, task.episodes.draw(randomness.key(0, "test episodes", number), classes))


def add_sums(totals: dict[str, Tensor], figures: Batch, total: Callable[[Tensor], Tensor]) -> None:
    """Adds ``total`` of each figure to ``totals``, in float64 where the device has it."""
    for name, values in figures.items():
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        summed = total(values.to(wide))
        totals[name] = totals[name] + summed if name in totals else summed


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, tuple) and isinstance(right, tuple):  # (keyword, value)
        return left[0] == right[0] and left[1] is right[1]
    return left is right


def _check(what: str, values: Tensor, size: int) -> None:
    if values.shape != (size,):
        raise InputError(
            f"{what} of a batch of {size} have shape {tuple(values.shape)}, expected ({size},)",
            where="[task]",
            fix="return one number an example; does the model's output have the expected shape?",
        )
