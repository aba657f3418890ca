"""Finds out, on real data, which kernels can train a model: by their gradients."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from umbel.client import devices
from umbel.client.training import ClientRuntime
from umbel.core import randomness
from umbel.core.errors import UmbelError
from umbel.core.trees import Tree, map_tree, norm, subtract
from umbel.simulations import pretended
from umbel.simulations.kernels.build import KERNELS
from umbel.simulations.kernels.draws import Draws
from umbel.simulations.kernels.kernel import Kernel, Obstacle, Subject
from umbel.simulations.kernels.lean import Lean
from umbel.simulations.kernels.traced import Grouped, Stacked
from umbel.simulations.residents import reason
from umbel.strategies.parts import Trees
from umbel.strategies.parts.rule import NONE
from umbel.tasks.evaluate import per_example
from umbel.tasks.task import Batch

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Relative difference of two gradients beyond which they are not the same computation.

In float32, two numbers in a window of a pooling can be so close that rounding decides which is the
larger: one such window of a large image moved a gradient by 3e-3. Hence float64, where it can be.
"""

HALF = 5e-2
"""The same under autocast."""


DRAWS = randomness.torch_seed(0, "trial")
"""The seed of a model that draws."""


class Examination(NamedTuple):
    """What one batch in a plain loop shows of a model.

    Args:
        obstacle: why no stack of clients can be trained; ``None`` where nothing stands against it.
        draws: whether the model draws random numbers in training.
        activation_bytes: what the forward pass of one example keeps for the backward pass.
        module: the initial model, in the precision that kernels are compared in.
        batch: name -> (B, …), the examples, in this precision.
        given: the examples as they are.
        gradients: of the batch, and of all its examples but the last.
        changed: the buffers that training changes, after a step on the batch.
        tolerance: how far a kernel's may be from them.
    """

    obstacle: str | None
    draws: bool
    activation_bytes: int
    module: nn.Module
    batch: Batch
    given: Batch
    gradients: tuple[Tree, Tree]
    changed: Tree
    tolerance: float


def examine(
    runtime: ClientRuntime, module: nn.Module, batch: Batch, shared: Trees = NONE
) -> Examination:
    """Computes the gradients that every kernel must reproduce.

    Args:
        runtime: of the federation.
        module: holds the initial model; not changed.
        batch: name -> (B, …), real examples of one client.
        shared: what the strategy broadcasts besides the model.
    """
    if runtime.run.client.precision != "float32":
        return _examine(runtime, module, batch, shared, HALF)
    if runtime.device.type != "mps":
        try:
            wide = map_tree(lambda c: c.double() if c.is_floating_point() else c, batch)
            exact = _examine(
                runtime, copy.deepcopy(module).double(), wide, shared, TOLERANCE[torch.float64]
            )
            return exact._replace(activation_bytes=exact.activation_bytes // 2, given=batch)
        except UmbelError:
            raise
        except Exception:  # a model or a loss that insists on its own precision
            pass
    return _examine(runtime, module, batch, shared, TOLERANCE[torch.float32])


def _examine(
    runtime: ClientRuntime, module: nn.Module, batch: Batch, shared: Trees, tolerance: float
) -> Examination:
    size = len(next(iter(batch.values())))
    head = {name: column[: max(size - 1, 1)] for name, column in batch.items()}
    plain, saved, changed, draws = _plain(runtime, module, batch, shared)
    obstacle = None
    if runtime.run.client.precision == "float16":
        obstacle = "float16 needs a scale of the loss for each client"
    elif size > 1 and not runtime.task.decomposable:
        obstacle = "the loss of a batch is not a mean over its examples"
    elif runtime.task.follow is not None:
        obstacle = "its slow copies move between steps"
    second = plain if obstacle or changed else _plain(runtime, module, head, shared)[0]
    pair = (plain, second)
    return Examination(
        obstacle, draws, saved // size, module, batch, batch, pair, changed, tolerance
    )


def make(name: str, subject: Subject, examination: Examination) -> Kernel:
    """The kernel of this name, if it computes the right gradients.

    Two pretended clients get the batch: one as it is, the other with its last example as padding.
    So an example that reaches others through the model shows as a difference. A kernel that knows
    of batch statistics is given no padding, then or ever; its running statistics are compared.

    Raises:
        Obstacle: it cannot train this model.
    """
    if name == "lean":
        return Lean(subject)
    if examination.obstacle is not None:
        raise Obstacle(examination.obstacle)
    module, batch, truths = examination.module, examination.batch, examination.gradients
    try:
        kernel = KERNELS[name](subject._replace(module=module))
        kept = kernel.statistics(2) if isinstance(kernel, Grouped | Stacked) else {}
        if unknown := sorted(examination.changed.keys() - kept.keys()):
            raise Obstacle(f"its buffer '{unknown[0]}' changes in training")
        found = _pair(kernel, subject._replace(module=module), batch, kept)
        if batch is not examination.given:  # in its own precision torch may go another way
            _pair(KERNELS[name](subject), subject, examination.given, {})
    except (UmbelError, Obstacle):
        raise
    except Exception as error:  # whatever torch.func does not like about the model
        raise Obstacle(reason(error)) from error
    if kernel.even:
        found, truths = found * 2, (truths[0], truths[0])
    for buffer, after in examination.changed.items():
        wide = kept[buffer].double(), after.double().expand_as(kept[buffer])
        if not torch.allclose(*wide, examination.tolerance, 1e-3):
            raise Obstacle("it computes other running statistics")
    for row, (gradient, truth) in enumerate(zip(found, truths, strict=True)):
        own = {n: g[row] for n, g in gradient.items()}
        if norm(subtract(own, truth)) > examination.tolerance * (norm(truth) + 1e-3):
            why = ("it computes another gradient", "examples of a batch act on each other")
            raise Obstacle(why[row])
    return KERNELS[name](subject)


def _pair(kernel: Kernel, subject: Subject, batch: Batch, kept: Tree) -> list[Tree]:
    """The gradients of the two clients, without and with a mask; none with, of an even kernel."""
    runtime = subject.runtime
    compute: Callable[..., Any] = kernel.gradients  # type: ignore[attr-defined]
    gradients = partial(compute, kept=kept) if kept else compute
    size = len(next(iter(batch.values())))
    pair = {name: torch.stack([column, column]) for name, column in batch.items()}
    stacks, around = pretended.two(pretended.one(runtime, subject.module, subject.shared))
    found: list[Tree] = []
    counts = torch.tensor([size, max(size - 1, 1)], device=runtime.device)
    with (
        devices.autocast(runtime.device, runtime.run.client),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        for own in (None,) if kernel.even else (None, counts):
            draws = Draws([DRAWS, DRAWS], runtime.device) if subject.draws else None
            found.append(gradients(stacks, around, pair, own, draws)[0])
    # Torch then runs that operation client by client, which is no faster than the plain loop.
    texts = (str(w.message) for w in warned)
    if missing := [m for m in (re.search(r"batching rule for ([\w:]+)", t) for t in texts) if m]:
        raise Obstacle(f"torch has no batching rule for {missing[0][1]}")
    return found


def _plain(
    runtime: ClientRuntime, module: nn.Module, batch: Batch, shared: Trees
) -> tuple[Tree, int, Tree, bool]:
    """The gradient of a batch, the bytes it kept, buffers that changed, whether it drew."""
    module = copy.deepcopy(module).train()
    local = pretended.one(runtime, module, shared)
    params = local.params
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    known = {t.untyped_storage().data_ptr() for t in [*params.values(), *batch.values()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with devices.seeded(runtime.device, DRAWS):
        before = _generator_state(runtime.device)
        if runtime.rule.objective is None:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                objective, _ = runtime.objective(module, local, batch)
        else:  # torch.func, which it may use, bears no hooks: two passes stand for all
            objective, _ = runtime.objective(module, local, batch)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                two = [per_example(runtime.task, copy.deepcopy(module), batch) for _ in range(2)]
            del two
        drew = not torch.equal(before, _generator_state(runtime.device))
    found = torch.autograd.grad(objective, list(params.values()), materialize_grads=True)
    detached = {name: p.detach() for name, p in params.items()}
    given = dict(zip(params, found, strict=True))
    gradient = runtime.rule.gradient(given, local._replace(params=detached))
    changed = {n: b for n, b in module.named_buffers() if not torch.equal(b, buffers[n])}
    return gradient, sum(kept.values()), changed, drew


def _generator_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()
