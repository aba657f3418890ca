"""What a model's last layer is given, and classes that are told by the nearest mean of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.datasets.federated import Arrays, Info, rows
from umbel.tasks.evaluate import BATCH, tensor_of
from umbel.tasks.experiences import NEVER
from umbel.tasks.task import Task

ZERO = np.zeros(1, np.int64)


class Means(NamedTuple):
    """The prototypes of classes.

    Args:
        means: (classes, features), each of length 1 where it is known.
        known: (classes,) bool.
    """

    means: Tensor
    known: Tensor


@contextmanager
def last_inputs(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """While this is open, what layers with parameters of their own are given goes to ``seen``."""
    handles = _watched(module, seen)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def features(task: Task, module: nn.Module, arrays: Arrays) -> Tensor:
    """What the last layer is given for each example, (rows, features), each of length 1.

    In evaluation mode, without gradients; the module is left in its own mode.
    """
    was_training = module.training
    module.eval()
    found = [torch.zeros(0)]
    try:
        with torch.no_grad():
            for start in range(0, rows(arrays), BATCH):
                part = {n: tensor_of(c[start : start + BATCH]) for n, c in arrays.items()}
                seen: list[Tensor] = []
                with last_inputs(module, seen):
                    task.losses(module, part)
                found.append(unit(seen[-1]))
    finally:
        module.train(was_training)
    return torch.cat(found[1:] or found)


def width_of(task: Task, module: nn.Module, info: Info) -> int:
    """How long the features of a classifier are, found out without an example."""
    kind = np.float32 if info.vocabulary is None else np.int64
    one = {"x": np.zeros((1, *info.input_shape), kind)}
    return features(task, module, {**one, **dict.fromkeys(("y", "experience"), ZERO)}).shape[1]


def unit(features: Tensor) -> Tensor:
    """Features as rows of length 1, (B, features); 0 stays 0."""
    return F.normalize(features.flatten(1), dim=1)


def nearest_mean(task: Task, means: Callable[[], Means | None]) -> Task:
    """The task, whose model gives minus the squared distance to each class's mean.

    Args:
        task: its model gives one logit for each class.
        means: asked at each pass; ``None``: the model's own logits count.

    Source: Rebuffi et al. 2017, iCaRL, Algorithm 1 (arXiv:1611.07725).
    """

    def build() -> nn.Module:
        module = task.build()
        seen: list[Tensor] = []
        _watched(module, seen)

        def nearest(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            found, given = means(), seen[-1]
            seen.clear()
            if found is None:
                return output
            at = found.means.to(given.device)
            apart = (unit(given)[:, None] - at[None]).square().sum(2)
            return torch.where(found.known.to(given.device), -apart, NEVER)

        module.register_forward_hook(nearest)
        return module

    return task._replace(build=build)


def _watched(module: nn.Module, seen: list[Tensor]) -> list[Any]:
    def see(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    layers = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    return [layer.register_forward_pre_hook(see) for layer in layers]
