"""Optimizers: as objects for one client, and in place on the stacks of many.

Both forms run the same code, torch's where it has the rule, so that none is written down twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from umbel.client.update_rules import RULES, Elementwise
from umbel.core.run_file import Client, Schedule

BETAS = {
    "adam": (0.9, 0.999, 0.0),
    "adamw": (0.9, 0.999, 0.0),
    "lion": (0.9, 0.99, 0.0),
    "adan": (0.98, 0.92, 0.99),
}
"""The shares of moments that are kept where the run file does not say."""


def learning_rate(section: Client, round_number: int, rounds: int) -> float:
    """The rate of one round (1 … ``rounds``), from ``lr`` and ``[client.schedule]``.

    During ``warmup`` rounds it is ``lr * round / warmup``. The schedule proper counts from the
    round after: ``step`` multiplies by ``factor`` every ``step`` rounds; ``cosine`` falls from
    ``lr`` towards ``final * lr``, which it would reach in the round after the last.

    The same rates as torch's LinearLR(1 / warmup, total_iters=warmup - 1), StepLR and
    CosineAnnealingLR(T_max=rounds - warmup), stepped once a round.
    """
    schedule = section.schedule
    if isinstance(schedule, str):
        schedule = Schedule(kind=schedule)
    if round_number <= schedule.warmup:
        return section.lr * round_number / schedule.warmup
    done = round_number - 1 - schedule.warmup
    if schedule.kind == "step":
        return float(section.lr * schedule.factor ** (done // schedule.step))
    if schedule.kind == "cosine":
        share = (1 + math.cos(math.pi * done / (rounds - schedule.warmup))) / 2
        return section.lr * (schedule.final + (1 - schedule.final) * share)
    return section.lr


def optimizer(section: Client, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """A fresh optimizer of ``[client]`` for the parameters of one client."""
    if section.optimizer == "sgd":
        return torch.optim.SGD(
            params,
            lr,
            momentum=section.momentum,
            nesterov=section.nesterov,
            weight_decay=section.weight_decay,
        )
    beta1, beta2, beta3 = betas(section)
    if section.optimizer in RULES:
        return Elementwise(
            params,
            section.optimizer,
            lr,
            (beta1, beta2, beta3),
            section.eps,
            section.weight_decay,
        )
    kind = torch.optim.Adam if section.optimizer == "adam" else torch.optim.AdamW
    return kind(
        params,
        lr,
        betas=(beta1, beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
    )


def betas(section: Client) -> tuple[float, float, float]:
    """The shares of moments that are kept, with the optimizer's own defaults."""
    given = (section.beta1, section.beta2, section.beta3)
    first, second, third = BETAS[section.optimizer]
    return (
        first if given[0] is None else given[0],
        second if given[1] is None else given[1],
        third if given[2] is None else given[2],
    )


def slots(section: Client) -> int:
    """How many tensors the optimizer keeps for each parameter."""
    if section.optimizer in RULES:
        return RULES[section.optimizer][1]
    return 2 if section.optimizer != "sgd" else int(section.momentum > 0)


class Stacked:
    """The optimizers of C clients, which step together: every rule of ``[client]`` is elementwise.

    Clients that have finished leave from the end of the stack. All start together, so one count of
    steps serves them all.
    """

    def __init__(self, section: Client, lr: float) -> None:
        self._section = section
        self._lr = lr
        self._first: list[Tensor] = []
        self._second: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._kept: list[list[Tensor]] = []
        self._taken = 0

    def step(self, params: list[Tensor], gradients: list[Tensor]) -> None:
        """One step of the first n clients, in place.

        Args:
            params: (n, *shape) each: views of the first n rows of the stacks; n never grows.
            gradients: the same shapes; left as they are.
        """
        with torch.no_grad():
            if self._section.optimizer == "sgd":
                self._sgd(params, gradients)
            elif self._section.optimizer in RULES:
                self._elementwise(params, gradients)
            else:
                self._adam(params, gradients)

    def _sgd(self, params: list[Tensor], gradients: list[Tensor]) -> None:
        if not (self._section.momentum or self._section.weight_decay):
            torch._foreach_add_(params, gradients, alpha=-self._lr)  # what is below, in one call
            return
        momenta: list[Tensor | None] = [m[: len(params[0])] for m in self._first]
        momenta = momenta or [None] * len(params)
        sgd(
            params,
            gradients,
            momenta,
            weight_decay=self._section.weight_decay,
            momentum=self._section.momentum,
            lr=self._lr,
            dampening=0.0,
            nesterov=self._section.nesterov,
            maximize=False,
        )
        if not self._first:  # torch fills the list in the first step, if there is a momentum
            self._first = [m for m in momenta if m is not None]

    def _elementwise(self, params: list[Tensor], gradients: list[Tensor]) -> None:
        rule, kept = RULES[self._section.optimizer]
        self._kept = self._kept or [[torch.zeros_like(p) for _ in range(kept)] for p in params]
        self._taken += 1
        rule(
            params,
            gradients,
            [[t[: len(params[0])] for t in own] for own in self._kept],
            self._taken,
            lr=self._lr,
            betas=betas(self._section),
            eps=self._section.eps,
            weight_decay=self._section.weight_decay,
        )

    def _adam(self, params: list[Tensor], gradients: list[Tensor]) -> None:
        if not self._steps:
            self._first = [torch.zeros_like(p) for p in params]
            self._second = [torch.zeros_like(p) for p in params]
            self._steps = [torch.zeros(()) for _ in params]
        rule = adam if self._section.optimizer == "adam" else adamw
        active = len(params[0])
        rule(
            params,
            gradients,
            [m[:active] for m in self._first],
            [v[:active] for v in self._second],
            [],
            self._steps,
            amsgrad=False,
            beta1=betas(self._section)[0],
            beta2=betas(self._section)[1],
            lr=self._lr,
            weight_decay=self._section.weight_decay,
            eps=self._section.eps,
            maximize=False,
        )
