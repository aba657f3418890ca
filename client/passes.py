"""The task's model as functions of parameters, for objectives that need more than one pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from umbel.core.errors import InputError
from umbel.core.trees import Tree
from umbel.strategies.parts import ClientRule, Local
from umbel.strategies.parts.rule import model_part
from umbel.tasks.evaluate import per_example
from umbel.tasks.features import last_inputs
from umbel.tasks.task import Batch, Task


class _Pass(NamedTuple):
    """One pass: of which parameters, over which batch, and what came of it."""

    params: Tree
    batch: Batch
    losses: Tensor
    outputs: Tensor
    features: Tensor | None
    figures: dict[str, Tensor]


class Passes:
    """A :class:`~umbel.strategies.parts.rule.Forward` over the batches of one step.

    A pass with the same parameters over the same batch is made once. Only passes with the client's
    own parameters change its buffers, such as running statistics.

    Args:
        task: its losses and metrics.
        module: its frozen parameters and buffers count.
        params: the client's own, as ``Local.params``.
    """

    def __init__(self, task: Task, module: nn.Module, params: Tree) -> None:
        self._task = task
        self._module = module
        self._own = model_part(params)
        self._made: list[_Pass] = []

    def losses(self, params: Tree, batch: Tree) -> Tensor:
        """One loss an example, (B,)."""
        return self._pass(params, batch).losses

    def outputs(self, params: Tree, batch: Tree) -> Tensor:
        """What the model gives for the batch, (B, …); the first time, where the task asks twice."""
        return self._pass(params, batch).outputs

    def features(self, params: Tree, batch: Tree) -> Tensor:
        """What the model's last layer with parameters is given, (B, …)."""
        found = self._pass(params, batch, features=True).features
        assert found is not None
        return found

    def parts(self, params: Tree, batch: Tree) -> Tensor:
        """The losses of several tasks in one, (B, parts); not weighted.

        Raises:
            InputError: the task is one.
        """
        if self._task.parts is None:
            raise InputError(
                "this strategy weighs the parts of a task against each other, and the task has one",
                where="[strategy]",
                fix="set [task] kind = 'multi-task', or choose another strategy",
            )
        params = model_part(params)
        tensors = dict(params) if _same(params, self._own) else {**params, **self._buffers()}
        return self._task.parts(self._forward(tensors), batch)

    def figures(self, batch: Batch) -> dict[str, Tensor]:
        """Loss and metrics of the client's own parameters, (B,) each, without gradients."""
        for made in self._made:
            if made.batch is batch and _same(made.params, self._own):
                return made.figures
        with torch.no_grad():
            return per_example(self._task, self._forward(self._buffers()), batch)[1]

    def _pass(self, params: Tree, batch: Tree, *, features: bool = False) -> _Pass:
        params = model_part(params)
        for made in self._made:
            if made.batch is batch and _same(made.params, params):
                if made.features is not None or not features:
                    return made
                self._made.remove(made)
                break
        tensors = dict(params)
        if not _same(params, self._own):
            tensors |= self._buffers()
        outputs: list[Tensor] = []
        forward = self._forward(tensors, outputs)
        seen: list[Tensor] = []
        with last_inputs(self._module, seen) if features else nullcontext():
            losses, figures = per_example(self._task, forward, batch)
        given = seen[-1] if seen else None
        made = _Pass(params, batch, losses, outputs[0], given, figures)
        self._made.append(made)
        return made

    def _buffers(self) -> dict[str, Tensor]:
        return {name: b.clone() for name, b in self._module.named_buffers()}

    def _forward(self, tensors: Tree, outputs: list[Tensor] | None = None) -> Callable[..., Tensor]:
        whole = {**self._own, **tensors}

        def forward(*inputs: Any, **named: Any) -> Tensor:
            output: Tensor = functional_call(self._module, whole, inputs, named)
            if outputs is not None:
                outputs.append(output)
            return output

        return forward


def objective(
    task: Task,
    module: nn.Module,
    rule: ClientRule,
    local: Local,
    batch: Batch,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a rule with an objective of its own minimises, and the figures of the batch (B,)."""
    assert rule.objective is not None
    passes = Passes(task, module, local.params)
    value = rule.objective(passes, local, batch, mask)
    return value, passes.figures(batch)


def _same(left: Tree, right: Tree) -> bool:
    return left.keys() == right.keys() and all(left[name] is right[name] for name in left)
