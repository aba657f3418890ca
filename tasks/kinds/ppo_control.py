"""Proximal policy optimisation in worlds."""

from __future__ import annotations

from torch import Tensor, nn

from umbel.core.run_file import Part
from umbel.core.settings import Count, NonNegative, Positive, Share
from umbel.datasets.federated import Info
from umbel.datasets.worlds.world import Floats
from umbel.tasks.collect import Columns, Moment
from umbel.tasks.reinforcement import losses as of
from umbel.tasks.reinforcement.acting import actor_critic, judged, played, task
from umbel.tasks.task import Batch, Forward, Task


def ppo_control(
    info: Info,
    model: Part | str | None,
    *,
    environment: str = "cartpole",
    size: Count = 4,
    steps: Count = 256,
    copies: Count = 8,
    gamma: Share = 0.99,
    lam: Share = 0.95,
    clip: Positive = 0.2,
    value_weight: NonNegative = 0.5,
    entropy_weight: NonNegative = 0.01,
) -> Task:
    """Acting in environments, by PPO: a policy and the value of what is seen.

    Each round, ``copies`` of each of the client's environments are played for ``steps`` steps by
    the round's model, which is what the clipped ratio starts from; ``[client]`` says how long is
    learned from them. The metric ``return`` is what the best actions earn.

    Args:
        info: of the data: rows are parameters of environments.
        model: of which there are two, one for each purpose.
        environment: ``cartpole``, ``grid``, or ``package.module:function``: (parameters) -> a
            ``gymnasium.Env``.
        size: ``grid``: of its side.
        steps: in each environment, a round.
        copies: of each environment.
        gamma: discount of a step.
        lam: of the advantage estimates.
        clip: how far the ratio of probabilities may pay.
        value_weight: of the error of the values, in units of 1 / (1 - gamma).
        entropy_weight: of the entropy of actions, in nats.
    """
    where = played(info, environment, size, copies)
    actions = where.kind.actions

    def collect(module: nn.Module, held: Floats, moment: Moment) -> Columns:
        return judged(where, module, held, moment, steps, gamma, lam)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        out = forward(batch["x"])
        logits, value = out[:, :actions], out[:, actions]
        policy = of.clipped(logits, batch["action"], batch["before"], batch["advantage"], clip)
        error = (value - batch["target"]).square()
        return policy + value_weight * error - entropy_weight * of.entropy(logits)

    build = actor_critic(model, where)
    return task(build, losses, where, lambda out: out[:, :actions], collect)
