"""What an action was worth, from what came after it."""

from __future__ import annotations

import numpy as np

from umbel.datasets.worlds.world import Floats, Mask


def to_go(reward: Floats, over: Mask, gamma: float) -> Floats:
    """Discounted sums of rewards to the end of each episode, or of what there is of it.

    Args:
        reward: (T, E).
        over: (T, E), where an episode is.
        gamma: of one step.

    Source: Sutton and Barto 2018, equation 3.8.
    """
    found = np.zeros_like(reward)
    after = np.zeros(reward.shape[1:])
    for t in reversed(range(len(reward))):
        after = reward[t] + gamma * np.where(over[t], 0, after)
        found[t] = after
    return found


def advantages(
    reward: Floats,
    value: Floats,
    following: Floats,
    ended: Mask,
    over: Mask,
    gamma: float,
    lam: float,
) -> Floats:
    """Generalised advantage estimates; all arrays (T, E).

    Args:
        reward: of each step.
        value: of what was seen before it.
        following: of what was seen after it, in the same episode.
        ended: where nothing is to be gained any more.
        over: where the episode is, also by a limit: then ``following`` still counts.
        gamma: discount of one step.
        lam: 0, one step ahead; 1, all rewards that came.

    Source: Schulman et al. 2016, equations 11 and 16 (arXiv:1506.02438).
    """
    surprise = reward + gamma * np.where(ended, 0, following) - value
    found = np.zeros_like(surprise)
    after = np.zeros(surprise.shape[1:])
    for t in reversed(range(len(surprise))):
        after = surprise[t] + gamma * lam * np.where(over[t], 0, after)
        found[t] = after
    return found


def standard(figures: Floats) -> Floats:
    """Less their mean, over their standard deviation."""
    return np.asarray((figures - figures.mean()) / (figures.std() + 1e-8))
