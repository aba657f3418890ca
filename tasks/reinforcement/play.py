"""Acting in worlds: experience to learn from, and what a policy earns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn

from umbel.datasets.worlds.world import Actions, Floats, Mask, World

Choose: TypeAlias = Callable[[Floats], Actions]
"""(what is seen of each world (E, inputs)) -> an action in each (E,)."""


class Experience(NamedTuple):
    """T steps in E worlds; of arrays the first axes are (T, E).

    Args:
        x: what was seen, (T, E, inputs) float32.
        action: what was done.
        reward: what it brought.
        following: what was seen then, before a world that was over began anew, like ``x``.
        ended: whether it was over for good.
        over: whether it was over, also by a limit.
    """

    x: Floats
    action: Actions
    reward: Floats
    following: Floats
    ended: Mask
    over: Mask


def play(world: World, worlds: int, choose: Choose, steps: int) -> Experience:
    """So many steps in each world; one that is over begins anew.

    Args:
        world: of E worlds, not begun.
        worlds: E.
        choose: the policy.
        steps: T.
    """
    found = islice(_on(world, worlds, choose), steps)
    return Experience(*(np.stack(column) for column in zip(*found, strict=True)))


def episodes(world: World, worlds: int, choose: Choose, most: int) -> tuple[Experience, Mask]:
    """The first episode in each world, or ``most`` steps of it; and which steps are of it (T, E).

    What other worlds do in the meantime, until the last is over, does not count.
    """
    found, running, within = [], np.ones(worlds, bool), []
    for came in islice(_on(world, worlds, choose), most):
        found.append(came)
        within.append(running)
        running = running & ~came.over
        if not running.any():
            break
    return Experience(*(np.stack(column) for column in zip(*found, strict=True))), np.stack(within)


def _on(world: World, worlds: int, choose: Choose) -> Iterator[Experience]:
    """Step after step, (E, …) each."""
    over: Mask = np.ones(worlds, bool)
    while True:
        if over.any():
            world.begin(over)
        x = world.observe()
        action = choose(x)
        came = world.step(action)
        over = came.ended | came.cut
        yield Experience(x, action, came.reward, world.observe(), came.ended, over)


def earned(world: World, worlds: int, choose: Choose, most: int) -> Floats:
    """The sum of rewards of one episode in each world, of ``most`` steps at most; (E,)."""
    came, within = episodes(world, worlds, choose, most)
    return np.asarray((came.reward * within).sum(0))


def outputs(module: nn.Module | Callable[..., torch.Tensor], x: Floats) -> Floats:
    """What a model gives for numbers, as float64 numbers; wherever it lives."""
    device = torch.device("cpu")
    if isinstance(module, nn.Module):
        device = next(module.parameters()).device
    given = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)
    return module(given).detach().double().cpu().numpy()


def log_softmax(logits: Floats) -> Floats:
    """Logarithms of probabilities, over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def sampled(logits: Floats, draw: np.random.Generator) -> Actions:
    """An action a row, by the softmax of ``logits`` (E, actions)."""
    below = np.exp(log_softmax(logits)).cumsum(1)
    found = (draw.random(len(logits))[:, None] > below[:, :-1]).sum(1)
    return np.asarray(found, np.int64)


def greedy_but(logits: Floats, epsilon: float | Floats, draw: np.random.Generator) -> Actions:
    """The best action a row, one of those where there are several; or any, by chance ``epsilon``.

    That may be one for all, or one for each row.
    """
    stray = draw.random(len(logits)) < epsilon
    other = draw.integers(logits.shape[1], size=len(logits))
    best = np.where(logits == logits.max(1, keepdims=True), draw.random(logits.shape), -1)
    return np.where(stray, other, best.argmax(1))
