"""Q-learning with a model of the world."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.run_file import Part
from umbel.core.settings import Count, Fraction, Natural, NonNegative, Share
from umbel.datasets.federated import Info
from umbel.datasets.worlds.world import Actions, Floats
from umbel.tasks.collect import Columns, Moment
from umbel.tasks.models.build import builder
from umbel.tasks.reinforcement import losses as of
from umbel.tasks.reinforcement.acting import explored, played, scale, task, transitions
from umbel.tasks.reinforcement.imagination import Dreamer, imagined
from umbel.tasks.reinforcement.play import greedy_but, outputs, play
from umbel.tasks.reinforcement.tables import table
from umbel.tasks.task import Batch, Forward, Task


def dyna(
    info: Info,
    model: Part | str | None,
    *,
    environment: str = "grid",
    size: Count = 4,
    steps: Count = 16,
    copies: Count = 1,
    gamma: Share = 0.95,
    epsilon: Fraction = 0.2,
    explore: Fraction = 0.0,
    rollouts: Natural = 2,
    depth: Count = 4,
    repeats: Count = 8,
    world_weight: NonNegative = 1.0,
) -> Task:
    """Acting in environments, with a model of them in which more is tried out than is really done.

    Values and world model are learned together and both travel. From the second round on, each real
    step is the start of ``rollouts`` imagined ones, on which values are learned as on real ones
    (Sutton 1990; Sutton and Barto 2018, section 8.2, with roll-outs of several steps). Without a
    ``model`` and where states are numbered, both are tables.

    Args:
        info: of the data: rows are parameters of environments.
        model: of which there are two: values, in units of 1 / (1 - gamma), and what comes next.
        environment: as of ``ppo-control``.
        size: ``grid``: of its side.
        steps: in each environment, a round; really done.
        copies: of each environment.
        gamma: discount of a step.
        epsilon: chance of a random action.
        explore: share of the rounds in which that falls from 1; 0: it never was.
        rollouts: imagined for each real step; what was never tried is imagined wrongly, so that
            more of them may do harm.
        depth: steps of each.
        repeats: how often each real step is learned from in a pass, so that many imagined ones do
            not outweigh what the world model is made of.
        world_weight: of the world model's errors.
    """
    where = played(info, environment, size, copies)
    inputs, actions, states = where.kind.inputs, where.kind.actions, where.kind.states
    unit = scale(gamma)

    def build() -> nn.Module:
        if states and model is None:
            tables = table(inputs, actions), table(inputs * actions, inputs + 2)
            return Dreamer(*tables, actions, states)
        return Dreamer(values(), ahead(), actions, states)

    values: Callable[[], nn.Module] = builder(model, where.info, actions)
    width = inputs * actions if states else inputs + actions
    ahead = builder(model, Info(where.info.name, (width,)), inputs + 2)

    def collect(module: nn.Module, held: Floats, moment: Moment) -> Columns:
        world, count, dice = where.worlds(held, moment.seed)
        stray = explored(moment, epsilon, explore)

        def choose(x: Floats) -> Actions:
            return greedy_but(outputs(module, x), stray, dice)

        found = transitions(play(world, count, choose, steps))
        parts = [{**found, "real": np.ones(len(found["x"]), np.float32)}] * repeats
        if rollouts and moment.round > 1:
            assert isinstance(module, Dreamer)
            starts = np.repeat(found["x"], rollouts, 0)
            parts.append(imagined(module, starts, choose, depth, dice))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def losses(forward: Forward, batch: Batch) -> Tensor:
        best = forward(batch["following"]).detach().max(1).values
        target = of.bootstrapped(batch["reward"] / unit, batch["ended"], best, gamma)
        value = of.of_action(forward(batch["x"]), batch["action"])
        surprise = _surprise(forward, batch, actions, states)
        return (target - value).square() / 2 + world_weight * batch["real"] * surprise

    return task(build, losses, where, lambda out: out, collect)


def _surprise(forward: Forward, batch: Batch, actions: int, states: bool) -> Tensor:
    """How far the world model is from what came: next state, reward, end; (B,)."""
    x, following = batch["x"], batch["following"]
    each = torch.arange(actions, device=x.device)
    guess = forward(x, (batch["action"][:, None] == each).to(x.dtype))
    ahead, reward, ended = guess[:, :-2], guess[:, -2], guess[:, -1]
    if states:
        missed = -(F.log_softmax(ahead, 1) * following).sum(1)
    else:
        missed = (ahead - (following - x)).square().sum(1)
    end = F.binary_cross_entropy_with_logits(ended, batch["ended"], reduction="none")
    return missed + (reward - batch["reward"]).square() / 2 + end
