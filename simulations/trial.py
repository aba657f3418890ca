"""Finds out, on real data, which kernels can train a model: by their gradients."""

from __future__ import annotations

import copy
import re
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from umbel.client import devices
from umbel.client.training import ClientRuntime
from umbel.core import randomness
from umbel.core.errors import UmbelError
from umbel.core.trees import Tree, norm, subtract
from umbel.simulations.kernels.build import KERNELS
from umbel.simulations.kernels.kernel import Kernel, Obstacle, Subject
from umbel.simulations.kernels.lean import Lean
from umbel.simulations.kernels.stepping import Gradients
from umbel.simulations.residents import reason
from umbel.strategies.parts import Local
from umbel.tasks.evaluate import per_example
from umbel.tasks.task import Batch

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
"""Relative difference of two gradients beyond which they are not the same computation."""


class Examination(NamedTuple):
    """What one batch in a plain loop shows of a model.

    Args:
        obstacle: why no stack of clients can be trained; ``None`` where nothing stands against it.
        draws: whether the model draws random numbers in training.
        activation_bytes: what the forward pass of one example keeps for the backward pass.
        batch: name -> (B, …), the examples.
        gradients: of the batch, and of all its examples but the last.
    """

    obstacle: str | None
    draws: bool
    activation_bytes: int
    batch: Batch
    gradients: tuple[Tree, Tree]


def examine(runtime: ClientRuntime, module: nn.Module, batch: Batch) -> Examination:
    """Computes the gradients that every kernel must reproduce.

    Args:
        runtime: of the federation.
        module: holds the initial model; not changed.
        batch: name -> (B, …), real examples of one client.
    """
    size = len(next(iter(batch.values())))
    head = {name: column[: max(size - 1, 1)] for name, column in batch.items()}
    plain, saved, changed, draws = _plain(runtime, module, batch)
    obstacle = None
    if runtime.run.client.precision == "float16":
        obstacle = "float16 needs a scale of the loss for each client"
    elif size > 1 and not runtime.task.decomposable:
        obstacle = "the loss of a batch is not a mean over its examples"
    elif changed is not None:
        obstacle = f"its buffer '{changed}' changes in training"
    elif draws:
        obstacle = "it draws random numbers in training"
    # With a scale of its own, or from other draws, the second gradient would say nothing.
    second = plain if obstacle else _plain(runtime, module, head)[0]
    return Examination(obstacle, draws, saved // size, batch, (plain, second))


def make(name: str, subject: Subject, examination: Examination) -> Kernel:
    """The kernel of this name, if it computes the right gradients.

    Two pretended clients get the batch: one as it is, the other with its last example as padding.
    So an example that reaches others through the model (batch statistics) shows as a difference.

    Raises:
        Obstacle: it cannot train this model.
    """
    if name == "lean":
        return Lean(subject)
    if examination.obstacle is not None:
        raise Obstacle(examination.obstacle)
    kernel = KERNELS[name](subject)
    gradients: Gradients = kernel.gradients  # type: ignore[attr-defined]
    try:
        found = _pair(subject, examination, gradients)
    except (UmbelError, Obstacle):
        raise
    except Exception as error:  # whatever torch.func does not like about the model
        raise Obstacle(reason(error)) from error
    for row, (gradient, truth) in enumerate(zip(found, examination.gradients, strict=True)):
        own = {n: g[row] for n, g in gradient.items()}
        bound = TOLERANCE[subject.runtime.run.client.precision] * norm(truth) + 1e-6
        if norm(subtract(own, truth)) > bound:
            why = ("it computes another gradient", "examples of a batch act on each other")
            raise Obstacle(why[row])
    return kernel


def _pair(subject: Subject, examination: Examination, gradients: Gradients) -> list[Tree]:
    """The gradients of the two clients, without and with a mask."""
    runtime = subject.runtime
    size = len(next(iter(examination.batch.values())))
    pair = {name: torch.stack([column, column]) for name, column in examination.batch.items()}
    params = {n: p.detach() for n, p in subject.module.named_parameters() if p.requires_grad}
    stacks = {name: torch.stack([p, p]) for name, p in params.items()}
    counts = torch.tensor([size, max(size - 1, 1)], device=runtime.device)
    with (
        devices.autocast(runtime.device, runtime.run.client),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        found = [gradients(stacks, params, pair, n)[0] for n in (None, counts)]
    # Torch then runs that operation client by client, which is no faster than the plain loop.
    texts = (str(w.message) for w in warned)
    if missing := [m for m in (re.search(r"batching rule for ([\w:]+)", t) for t in texts) if m]:
        raise Obstacle(f"torch has no batching rule for {missing[0][1]}")
    return list(found)


def _plain(
    runtime: ClientRuntime, module: nn.Module, batch: Batch
) -> tuple[Tree, int, str | None, bool]:
    """The gradient of a batch, the bytes it kept, a buffer that changed, whether it drew."""
    module = copy.deepcopy(module).train()
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    anchor = {name: p.detach().clone() for name, p in params.items()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    known = {t.untyped_storage().data_ptr() for t in [*params.values(), *batch.values()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with devices.seeded(runtime.device, randomness.torch_seed(0, "trial")):
        before = _generator_state(runtime.device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            with devices.autocast(runtime.device, runtime.run.client):
                losses, _ = per_example(runtime.task, module, batch)
            objective = runtime.rule.loss(losses.mean(), Local(params, anchor))
        drew = not torch.equal(before, _generator_state(runtime.device))
    found = torch.autograd.grad(objective, list(params.values()), materialize_grads=True)
    detached = {name: p.detach() for name, p in params.items()}
    gradient = runtime.rule.gradient(dict(zip(params, found, strict=True)), Local(detached, anchor))
    changed = [n for n, b in module.named_buffers() if not torch.equal(b, buffers[n])]
    return gradient, sum(kept.values()), changed[0] if changed else None, drew


def _generator_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()
