"""Which models can be trained privately, and what to do about those that cannot.

DP-SGD bounds what one example adds to a gradient. That bound holds only where an example acts on
its own loss alone, and where nothing but the gradient carries what was learnt of it. The verdicts
on modules are those of Opacus's ``ModuleValidator``; what a module does is tried as well, so that a
user's own batch statistics are found, too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from umbel.client import devices
from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.tasks.build import model_of
from umbel.tasks.task import Batch, Task

TOLERANCE = 1e-4
"""Relative difference of an example's loss alone and in a batch that is more than rounding."""


def check_model(run: RunFile, task: Task, module: nn.Module, batch: Batch) -> None:
    """Refuses what ``[privacy]`` does not cover.

    Args:
        run: the run file.
        task: what is learned.
        module: the initial model; not changed.
        batch: two real examples or so, name -> (B, …).

    Raises:
        InputError: with the reason and the remedy.
    """
    unit = run.privacy.unit
    if unit == "none":
        return
    if unit == "example":
        if not task.decomposable:
            raise _refused(
                "the loss of a batch is not a mean over its examples, so that no bound on one "
                "example's gradient bounds its influence",
                "use a task with a loss for each example, or unit = 'client'",
                "[task] kind",
            )
        if task.collect is not None and not task.collects_apart:
            raise _refused(
                "each round's examples are made with the model, and what a client holds is in all "
                "of them, so that no bound on one example's gradient bounds its influence",
                "use unit = 'client'",
                "[task] kind",
            )
        if task.keeps is not None:
            raise _refused(
                "what a client keeps of earlier rounds' examples is in later ones, so that no "
                "bound on one example's gradient bounds its influence",
                "use unit = 'client'",
                "[task] kind",
            )
        if run.client.precision == "float16":
            raise _refused(
                "float16 needs a scale of the loss, which follows the data",
                "set precision = 'bfloat16' or 'float32'",
                "[client] precision",
            )
        for name, why in _modules(module):
            raise _refused(
                f"'{name}' ({type(module.get_submodule(name)).__name__}) {why}",
                "use GroupNorm in its place",
            )
    if (moving := _moving_buffer(task, module, batch, unit == "client")) is not None:
        raise _refused(
            f"its buffer '{moving}' changes in training, and what it learns is never noised",
            "use layers without running statistics, such as GroupNorm",
        )
    if unit == "example" and _coupled(task, module, batch):
        raise _refused(
            "the examples of a batch act on each other's losses",
            "use layers and losses that see one example at a time, or unit = 'client'",
        )


def _modules(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The modules that Opacus refuses, and why."""
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            yield name, "mixes the examples of a batch"
        elif isinstance(part, nn.modules.instancenorm._InstanceNorm) and part.track_running_stats:
            yield name, "keeps running statistics, which are not privatised"


def _moving_buffer(task: Task, module: nn.Module, batch: Batch, sent: bool) -> str | None:
    """A buffer that a forward pass in training changes; of those that are ``sent``, or of all."""
    tried = copy.deepcopy(module).train()
    before = {name: b.clone() for name, b in tried.named_buffers()}
    with torch.enable_grad():
        task.losses(tried, batch)
    asked = model_of(tried).buffers if sent else before
    changed = [n for n in asked if not torch.equal(tried.get_buffer(n), before[n])]
    return changed[0] if changed else None


def _coupled(task: Task, module: nn.Module, batch: Batch) -> bool:
    """Whether an example's loss changes with the other examples of its batch."""
    tried = copy.deepcopy(module).train()
    size = len(next(iter(batch.values())))

    def losses(rows: list[int]) -> Tensor:
        with torch.no_grad(), devices.seeded(next(tried.parameters()).device, 0):
            return task.losses(tried, {n: c[rows] for n, c in batch.items()}).double()

    # The others are put in its place, and not left out: what the task draws for it stays the same.
    together = losses(list(range(size)))
    apart = torch.stack([losses([i] * size)[i] for i in range(size)])
    far = (together - apart).abs() > TOLERANCE * (together.abs() + 1)
    return bool(far.any())


def _refused(message: str, fix: str, where: str = "[task.model]") -> InputError:
    return InputError(f"cannot be trained privately: {message}", where=where, fix=fix)
