"""Deep Q-learning."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.run_file import Part
from umbel.core.settings import Count, Fraction, Natural, NonNegative, Share
from umbel.datasets.federated import Info
from umbel.datasets.worlds.world import Floats
from umbel.tasks.collect import Columns, Moment
from umbel.tasks.models.build import builder
from umbel.tasks.reinforcement import losses as of
from umbel.tasks.reinforcement.acting import played, scale, task, transitions
from umbel.tasks.reinforcement.play import greedy_but, outputs, play
from umbel.tasks.task import Batch, Forward, Task


def dqn(
    info: Info,
    model: Part | str | None,
    *,
    environment: str = "cartpole",
    size: Count = 4,
    steps: Count = 128,
    copies: Count = 8,
    gamma: Share = 0.99,
    epsilon: Fraction = 0.4,
    alpha: NonNegative = 7.0,
    double: bool = True,
    memory: Natural = 0,
) -> Task:
    """Acting in environments, by a network of what each action is worth: DQN, double or not.

    The target network is the model that the round began with; the replay memory is what was
    collected in the round and what is left of earlier ones, drawn in batches for ``[client]
    local_epochs`` or ``local_steps`` (Mnih et al. 2015, Algorithm 1; van Hasselt, Guez and Silver
    2016, equation 4).

    Args:
        info: of the data: rows are parameters of environments.
        model: what is seen -> a number for each action, in units of 1 / (1 - gamma).
        environment: as of ``ppo-control``.
        size: ``grid``: of its side.
        steps: in each environment, a round.
        copies: of each environment.
        gamma: discount of a step.
        epsilon: chance of a random action in the first copy of each environment.
        alpha: in the last copy it is epsilon to the power 1 + alpha, evenly in between, so that
            some always see what goes wrong (Horgan et al. 2018, section 4, arXiv:1803.00933).
        double: the model in training chooses what the target network is asked about.
        memory: steps that a client keeps from round to round, the latest; never sent. 0: none.
    """
    where = played(info, environment, size, copies)
    unit = scale(gamma)
    strays = epsilon ** (1 + alpha * np.arange(copies) / max(copies - 1, 1))

    def collect(module: nn.Module, held: Floats, moment: Moment) -> Columns:
        world, count, dice = where.worlds(held, moment.seed)
        stray = np.tile(strays, len(held))
        came = play(world, count, lambda x: greedy_but(outputs(module, x), stray, dice), steps)
        found = transitions(came)
        if moment.kept:
            found = {n: np.concatenate([moment.kept[n], new]) for n, new in found.items()}
        found["target"] = outputs(module, found["following"]).astype(np.float32)
        return found

    def keeps(made: Columns) -> Columns:
        return {n: column[-memory:] for n, column in made.items() if n != "target"}

    def losses(forward: Forward, batch: Batch) -> Tensor:
        after = batch["target"]
        chosen = forward(batch["following"]).detach().argmax(1) if double else after.argmax(1)
        following = of.of_action(after, chosen)
        target = of.bootstrapped(batch["reward"] / unit, batch["ended"], following, gamma)
        value = of.of_action(forward(batch["x"]), batch["action"])
        return F.smooth_l1_loss(value, target, reduction="none")

    build = builder(model, where.info, where.kind.actions)
    made = task(build, losses, where, lambda out: out, collect)
    return made._replace(keeps=keeps) if memory else made
