"""Advantage actor-critic."""

from __future__ import annotations

from torch import Tensor, nn

from umbel.core.run_file import Part
from umbel.core.settings import Count, NonNegative, Share
from umbel.datasets.federated import Info
from umbel.datasets.worlds.world import Floats
from umbel.tasks.collect import Columns, Moment
from umbel.tasks.reinforcement import losses as of
from umbel.tasks.reinforcement.acting import actor_critic, judged, played, task
from umbel.tasks.task import Batch, Forward, Task


def a2c(
    info: Info,
    model: Part | str | None,
    *,
    environment: str = "cartpole",
    size: Count = 4,
    steps: Count = 32,
    copies: Count = 16,
    gamma: Share = 0.99,
    lam: Share = 1.0,
    value_weight: NonNegative = 0.5,
    entropy_weight: NonNegative = 0.01,
) -> Task:
    """Acting in environments, by A2C: the policy's gradient, weighed by advantage over the critic.

    The gradient is that of the policy that acted in the first local step alone: ``batch_size =
    "full"`` and ``local_epochs = 1`` is the paper's, many clients in place of its many workers
    (Mnih et al. 2016, Algorithm S3, arXiv:1602.01783).

    Args:
        info: of the data: rows are parameters of environments.
        model: of which there are two, one for each purpose.
        environment: as of ``ppo-control``.
        size: ``grid``: of its side.
        steps: in each environment, a round.
        copies: of each environment.
        gamma: discount of a step.
        lam: of the advantage estimates; 1: all rewards that came, as in the paper.
        value_weight: of the error of the values, in units of 1 / (1 - gamma).
        entropy_weight: of the entropy of actions, in nats.
    """
    where = played(info, environment, size, copies)
    actions = where.kind.actions

    def collect(module: nn.Module, held: Floats, moment: Moment) -> Columns:
        found = judged(where, module, held, moment, steps, gamma, lam)
        return {name: found[name] for name in ("x", "action", "advantage", "target")}

    def losses(forward: Forward, batch: Batch) -> Tensor:
        out = forward(batch["x"])
        logits, value = out[:, :actions], out[:, actions]
        policy = of.policy_gradient(logits, batch["action"], batch["advantage"])
        error = (value - batch["target"]).square()
        return policy + value_weight * error - entropy_weight * of.entropy(logits)

    build = actor_critic(model, where)
    return task(build, losses, where, lambda out: out[:, :actions], collect)
