"""A model of the world, and steps in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from umbel.datasets.worlds.world import Floats
from umbel.tasks.reinforcement.play import Choose, sampled


class Dreamer(nn.Module):
    """What actions are worth, and what they lead to.

    Args:
        values: what is seen (B, inputs) -> (B, actions).
        ahead: state and action -> (B, inputs + 2): logits of the next state, or by how much it
            differs; reward; logit of the end.
        actions: how many there are.
        states: whether what is seen is a one among zeros; then ``ahead`` is given the product of
            state and action, else both side by side.
    """

    def __init__(self, values: nn.Module, ahead: nn.Module, actions: int, states: bool) -> None:
        super().__init__()
        self.values, self.ahead = values, ahead
        self._actions, self._states = actions, states

    def forward(self, x: Tensor, action: Tensor | None = None) -> Tensor:
        """Values; or given an action as a one among zeros (B, actions), what it leads to."""
        found: Tensor
        if action is None:
            found = self.values(x)
        elif self._states:
            found = self.ahead((x[:, :, None] * action[:, None]).flatten(1))
        else:
            found = self.ahead(torch.cat([x, action], 1))
        return found

    def step(
        self, x: Floats, action: npt.NDArray[np.int64], dice: np.random.Generator
    ) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
        """An imagined step: what is seen next, the reward, whether it is over; (B, …) each."""
        device = next(self.parameters()).device
        each = np.eye(self._actions, dtype=np.float32)[action]
        given = (torch.from_numpy(t).to(device) for t in (x, each))
        guess = self(*given).double().cpu().numpy()
        if self._states:
            following = np.eye(x.shape[1], dtype=np.float32)[sampled(guess[:, :-2], dice)]
        else:
            following = (x + guess[:, :-2]).astype(np.float32)
        return following, guess[:, -2], guess[:, -1] > 0


def imagined(
    module: Dreamer, x: Floats, choose: Choose, depth: int, dice: np.random.Generator
) -> dict[str, npt.NDArray[Any]]:
    """Roll-outs in the world model, as examples of single steps; what comes after an end is not.

    Args:
        module: the model.
        x: (B, inputs) float32, where they start.
        choose: the policy.
        depth: steps of each.
        dice: of what is drawn.
    """
    found: list[dict[str, npt.NDArray[Any]]] = []
    for _ in range(depth):
        if not len(x):
            break
        action = choose(x)
        following, reward, ended = module.step(x, action, dice)
        found.append(
            {
                "x": x,
                "action": action,
                "reward": reward.astype(np.float32),
                "ended": ended.astype(np.float32),
                "following": following,
                "real": np.zeros(len(x), np.float32),
            }
        )
        x = following[~ended]
    return {name: np.concatenate([step[name] for step in found]) for name in found[0]}
