"""REINFORCE."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from umbel.core.run_file import Part
from umbel.core.settings import Count, NonNegative, Share
from umbel.datasets.federated import Info
from umbel.datasets.worlds.world import Floats
from umbel.tasks.collect import Columns, Moment
from umbel.tasks.models.build import builder
from umbel.tasks.reinforcement import losses as of
from umbel.tasks.reinforcement.acting import played, task
from umbel.tasks.reinforcement.play import episodes, outputs, sampled
from umbel.tasks.reinforcement.returns import standard, to_go
from umbel.tasks.task import Batch, Forward, Task


def reinforce(
    info: Info,
    model: Part | str | None,
    *,
    environment: str = "cartpole",
    size: Count = 4,
    copies: Count = 8,
    most: Count = 500,
    gamma: Share = 0.99,
    entropy_weight: NonNegative = 0.0,
) -> Task:
    """Acting in environments, by REINFORCE: whole episodes, each action weighed by what followed.

    The baseline is the mean over the client's episodes, and their spread the scale. The gradient is
    that of the policy that acted in the first local step alone: ``batch_size = "full"`` and
    ``local_epochs = 1`` is the paper's (Williams 1992; Sutton and Barto 2018, section 13.4).

    Args:
        info: of the data: rows are parameters of environments.
        model: what is seen -> a logit for each action.
        environment: as of ``ppo-control``.
        size: ``grid``: of its side.
        copies: of each environment: episodes of each, a round.
        most: steps of an episode.
        gamma: discount of a step.
        entropy_weight: of the entropy of actions, in nats.
    """
    where = played(info, environment, size, copies)

    def collect(module: nn.Module, held: Floats, moment: Moment) -> Columns:
        world, count, dice = where.worlds(held, moment.seed)
        came, within = episodes(world, count, lambda x: sampled(outputs(module, x), dice), most)
        worth = standard(to_go(came.reward, came.over, gamma)[within])
        return {
            "x": came.x[within],
            "action": came.action[within],
            "advantage": worth.astype(np.float32),
        }

    def losses(forward: Forward, batch: Batch) -> Tensor:
        logits = forward(batch["x"])
        policy = of.policy_gradient(logits, batch["action"], batch["advantage"])
        return policy - entropy_weight * of.entropy(logits)

    build = builder(model, where.info, where.kind.actions)
    return task(build, losses, where, lambda out: out, collect)
