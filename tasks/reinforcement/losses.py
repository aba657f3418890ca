"""What is minimised over experience; one figure an example, (B,)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def of_action(table: Tensor, action: Tensor) -> Tensor:
    """The entry of each row (B, actions) that its action (B,) names."""
    return table.gather(1, action[:, None])[:, 0]


def entropy(logits: Tensor) -> Tensor:
    """Of the softmax, in nats."""
    log = F.log_softmax(logits, 1)
    return -(log.exp() * log).sum(1)


def policy_gradient(logits: Tensor, action: Tensor, advantage: Tensor) -> Tensor:
    """Minus the logarithm of what was done, times what it was worth.

    Source: Williams 1992; Sutton and Barto 2018, section 13.4.
    """
    return -of_action(F.log_softmax(logits, 1), action) * advantage


def clipped(
    logits: Tensor, action: Tensor, before: Tensor, advantage: Tensor, clip: float
) -> Tensor:
    """:func:`surrogate` of actions.

    Args:
        logits: (B, actions), of the policy now.
        action: what was done.
        before: the logarithm of its probability then.
        advantage: what it was worth.
        clip: how far the ratio of the two probabilities may pay.
    """
    return surrogate(of_action(F.log_softmax(logits, 1), action), before, advantage, clip)


def surrogate(now: Tensor, before: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The clipped objective of PPO, with the sign of a loss; all of one shape.

    Args:
        now: the logarithm of the probability of what was done.
        before: the same, as it was done.
        advantage: what it was worth.
        clip: how far the ratio of the two probabilities may pay.

    Source: Schulman et al. 2017, equation 7 (arXiv:1707.06347).
    """
    ratio = (now - before).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def bootstrapped(reward: Tensor, ended: Tensor, following: Tensor, gamma: float) -> Tensor:
    """One step, and what is to be had from there: the target of Q-learning.

    Args:
        reward: (B,).
        ended: (B,), 1 where nothing is to be had any more.
        following: (B,), the value of what was seen next.
        gamma: discount.

    Source: Watkins and Dayan 1992, equation 1; Mnih et al. 2015, equation 2.
    """
    return reward + gamma * (1 - ended) * following
