"""A policy beside what it must not stray from, and perhaps beside a judge of its states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.tasks.preferences.losses import Controller


class Policy(nn.Module):
    """A model of the next symbol, its frozen copy, and perhaps a value for each state.

    The copy is the model as the run began: each side builds its own, and it never travels. What an
    adapter leaves frozen is one tensor for both. Nothing is dropped, by either.

    Args:
        policy: (B, T) symbols -> (B, T, symbols).
        reference: whether there is a copy.
        values: whether there is a linear layer that gives a value from what the model's last layer
            is given.
        kl_weight: of the KL in the reward, a buffer; ``None``: there is none.
        controller: moves ``kl_weight`` at each pass in training that is told a KL; ``None``: it
            stays.
        judge: builds a reward model, (B, T) symbols -> (B, 1), which is frozen like the copy.

    Raises:
        InputError: the model does not give a vector for each symbol; or as ``judge``.
    """

    kl_weight: Tensor

    def __init__(
        self,
        policy: nn.Module,
        *,
        reference: bool = True,
        values: bool = False,
        kl_weight: float | None = None,
        controller: Controller | None = None,
        judge: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        for part in policy.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # else a ratio of two policies would be one of two draws
        self.policy = policy
        self.reference: nn.Module | None = _frozen_copy(policy) if reference else None
        self.judge: nn.Module | None = None if judge is None else _frozen(judge())
        self.controller = controller
        self.value: nn.Linear | None = None
        self._last = ""
        if values:
            self._last, width = _last_layer(policy)
            self.value = nn.Linear(width, 1)
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)
        if kl_weight is not None:
            self.register_buffer("kl_weight", torch.tensor(kl_weight))

    def forward(
        self,
        tokens: Tensor,
        *,
        reference: bool = False,
        judge: bool = False,
        kl: Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, symbols), or with values (B, T, symbols + 1), the value last.

        Args:
            tokens: prompts with completions.
            reference: whether the frozen copy is asked; without gradient or value.
            judge: whether the reward model is asked instead, which gives (B, 1).
            kl: (B,) nats a completion that the controller is told.
        """
        if reference or judge:
            still = self.reference if reference else self.judge
            assert still is not None
            with torch.no_grad():
                known: Tensor = still(tokens)
            return known
        learning = self.training and torch.is_grad_enabled()
        if kl is not None and self.controller is not None and learning:
            with torch.no_grad():
                self.kl_weight.mul_(self.controller.factor(kl.mean()))
        with _inputs(self.policy, self._last if self.value is not None else None) as seen:
            logits: Tensor = self.policy(tokens)
        if self.value is None:
            return logits
        # Prompts that an adapter puts before the record have states, too.
        states = seen[-1][:, -tokens.shape[1] :].to(self.value.weight.dtype)
        return torch.cat([logits, self.value(states).to(logits.dtype)], 2)

    def train(self, mode: bool = True) -> Policy:
        """As any module; what is frozen never drops anything."""
        super().train(mode)
        for still in (self.reference, self.judge):
            if still is not None:
                still.eval()
        return self


def _frozen_copy(module: nn.Module) -> nn.Module:
    """A copy that neither learns nor travels, and that shares what ``module`` does not train."""
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    return _frozen(copy.deepcopy(module, memo=dict(shared)))


def _frozen(module: nn.Module) -> nn.Module:
    """``module``, which neither learns nor travels any more."""
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, buffer, persistent=False)
    return module.requires_grad_(False).eval()


def _last_layer(module: nn.Module) -> tuple[str, int]:
    """The layer that gives the model's output, and how many numbers a symbol it is given."""
    called: list[tuple[str, Tensor]] = []

    def see(name: str) -> Any:
        return lambda layer, inputs: called.append((name, inputs[0]))

    handles = [
        layer.register_forward_pre_hook(see(name))
        for name, layer in module.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    was_training = module.training
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, 2, dtype=torch.long))
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()
    name, given = called[-1]
    if given.dim() != 3:
        raise InputError(
            f"the model's last layer '{name}' is given shape {tuple(given.shape)}, and a value for "
            "each symbol needs (B, T, width)",
            where="[task.model]",
            fix="choose 'gpt' or 'transformers'",
        )
    return name, given.shape[-1]


@contextmanager
def _inputs(module: nn.Module, layer: str | None) -> Iterator[list[Tensor]]:
    """What the layer of this name is given while this is open; ``None``: nobody looks."""
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return
    part = module.get_submodule(layer)
    handle = part.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
