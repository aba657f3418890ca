"""Finds out, on real data, whether a model can be trained many clients at a time."""

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
from umbel.simulations.residents import reason
from umbel.simulations.stacked import gradients
from umbel.strategies.parts import Local
from umbel.tasks.evaluate import per_example
from umbel.tasks.task import Batch

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
"""Relative difference of two gradients beyond which they are not the same computation."""


class Verdict(NamedTuple):
    """What the trial found.

    Args:
        obstacle: why the model cannot be vectorised; ``None`` where it can.
        activation_bytes: what the forward pass of one example keeps for the backward pass.
    """

    obstacle: str | None
    activation_bytes: int


def attempt(runtime: ClientRuntime, module: nn.Module, batch: Batch) -> Verdict:
    """Compares the gradient of one batch in a plain loop with the vectorised one.

    Two pretended clients get the batch: one as it is, the other with its last example as padding.
    So an example that reaches others through the model (batch statistics) shows as a difference.

    Args:
        runtime: of the federation.
        module: holds the global model; not changed.
        batch: name -> (B, …), real examples of one client.
    """
    size = len(next(iter(batch.values())))
    if runtime.run.client.precision == "float16":
        return Verdict("float16 needs a scale of the loss for each client", 0)
    if size > 1 and not runtime.task.decomposable:
        return Verdict("the loss of a batch is not a mean over its examples", 0)

    plain, saved, obstacle = _plain(runtime, module, batch)
    if obstacle is not None:
        return Verdict(obstacle, saved // size)
    counts = [size, max(size - 1, 1)]
    head = {name: column[: counts[1]] for name, column in batch.items()}
    expected = [plain, _plain(runtime, module, head)[0]]
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    stacks = {name: torch.stack([p, p]) for name, p in params.items()}
    pair = {name: torch.stack([column, column]) for name, column in batch.items()}
    try:
        full, masked = gradients(runtime.task, runtime.rule, copy.deepcopy(module))
        count = torch.tensor(counts, device=runtime.device)
        with (
            devices.autocast(runtime.device, runtime.run.client),
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("always")
            found = [full(stacks, params, pair, None)[0], masked(stacks, params, pair, count)[0]]
    except UmbelError:
        raise
    except Exception as error:  # whatever torch.func does not like about the model
        return Verdict(reason(error), saved // size)
    # Torch then runs that operation client by client, which is no faster than the plain loop.
    texts = (str(w.message) for w in warned)
    if missing := [m for m in (re.search(r"batching rule for ([\w:]+)", t) for t in texts) if m]:
        return Verdict(f"torch has no batching rule for {missing[0][1]}", saved // size)
    for row, (gradient, truth) in enumerate(zip(found, expected, strict=True)):
        own = {name: g[row] for name, g in gradient.items()}
        bound = TOLERANCE[runtime.run.client.precision] * norm(truth) + 1e-6
        if norm(subtract(own, truth)) > bound:
            why = ("torch.func computes another gradient", "examples of a batch act on each other")
            return Verdict(why[row], saved // size)
    return Verdict(None, saved // size)


def _plain(runtime: ClientRuntime, module: nn.Module, batch: Batch) -> tuple[Tree, int, str | None]:
    """The gradient of a batch, the bytes it kept for the backward pass, and any obstacle."""
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
    obstacle = None
    if changed:
        obstacle = f"its buffer '{changed[0]}' changes in training"
    elif drew:
        obstacle = "it draws random numbers in training"
    return gradient, sum(kept.values()), obstacle


def _generator_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()
