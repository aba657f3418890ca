"""Regression."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.datasets.federated import Info
from umbel.tasks.models.build import builder
from umbel.tasks.task import Batch, Forward, Task


def regression(info: Info, model: Part | str | None) -> Task:
    """Real-valued targets: squared error, absolute error.

    Args:
        info: of the data; ``y`` is float32, (rows,) or (rows, targets).
        model: takes ``x``, gives (B, targets).
    """
    if info.classes is not None:
        raise InputError(
            f"regression needs real-valued targets; data set '{info.name}' has "
            f"{info.classes} classes",
            where="[task]",
            fix='kind = "classification"',
        )

    def errors(forward: Forward, batch: Batch) -> Tensor:
        out, y = forward(batch["x"]), batch["y"]
        if out.shape != (expected := (len(y), info.targets)):
            raise InputError(
                f"the model gives shape {tuple(out.shape)} for {expected[0]} examples, expected "
                f"{expected}",
                where="[task.model]",
                fix=f"end it with {info.targets} output(s)",
            )
        return out - y.reshape(out.shape)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        return errors(forward, batch).square().mean(1)

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        error = errors(forward, batch)
        return {"mse": error.square().mean(1), "mae": error.abs().mean(1)}

    return Task(builder(model, info, info.targets), losses, metrics)
