"""Classification."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.core.settings import Fraction
from umbel.datasets.federated import Info
from umbel.tasks.models.build import builder
from umbel.tasks.task import Batch, Forward, Task


def classification(
    info: Info, model: Part | str | None, *, label_smoothing: Fraction = 0.0
) -> Task:
    """One of several classes for each example: cross-entropy, accuracy.

    Two classes are one logit with the logistic loss; more are a logit each with the softmax.

    Args:
        info: of the data; ``y`` is int64, 0 … classes-1.
        model: takes ``x``, gives (B, 1) for two classes and (B, classes) for more.
        label_smoothing: mass spread evenly over the classes (Szegedy et al. 2016, section 7,
            arXiv:1512.00567).
    """
    if info.classes is None:
        raise InputError(
            f"classification needs class labels; data set '{info.name}' has real-valued targets",
            where="[task]",
            fix='kind = "regression"',
        )
    outputs = 1 if info.classes == 2 else info.classes

    def logits(forward: Forward, batch: Batch) -> Tensor:
        out = forward(batch["x"])
        if out.shape != (expected := (len(batch["y"]), outputs)):
            raise InputError(
                f"the model gives shape {tuple(out.shape)} for {expected[0]} examples, expected "
                f"{expected}",
                where="[task.model]",
                fix=f"end it with {outputs} output(s) for {info.classes} classes",
            )
        return out

    def losses(forward: Forward, batch: Batch) -> Tensor:
        out, y = logits(forward, batch), batch["y"]
        if outputs == 1:
            target = y.to(out.dtype) * (1 - label_smoothing) + label_smoothing / 2
            return F.binary_cross_entropy_with_logits(out[:, 0], target, reduction="none")
        return F.cross_entropy(out, y, reduction="none", label_smoothing=label_smoothing)

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        out = logits(forward, batch)
        guess = out[:, 0] > 0 if outputs == 1 else out.argmax(1)
        return {"accuracy": (guess == batch["y"]).to(out.dtype)}

    return Task(builder(model, info, outputs), losses, metrics)
