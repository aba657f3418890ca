"""A user's own environments, by the interface of Gymnasium."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from umbel.core.errors import InputError
from umbel.datasets.worlds.world import Actions, Floats, Kind, Mask, Step

WHERE = "[task] environment"


class Own:
    """E environments, stepped one after another; see ``World``.

    Args:
        parameters: (E, P), a row for each.
        draw: seeds them.
        make: gives one.
    """

    def __init__(
        self, parameters: Floats, draw: np.random.Generator, make: Callable[[Floats], Any]
    ) -> None:
        self._worlds = [make(row) for row in parameters]
        self._seeds = draw.integers(2**31, size=len(parameters)).tolist()
        self._seen: list[Any] = [None] * len(parameters)

    def begin(self, which: Mask) -> None:
        """Resets these; seeded the first time."""
        for i in np.flatnonzero(which).tolist():
            self._seen[i] = self._worlds[i].reset(seed=self._seeds[i])[0]
            self._seeds[i] = None

    def observe(self) -> Floats:
        """(E, inputs) float32."""
        return np.stack([np.ravel(seen) for seen in self._seen]).astype(np.float32)

    def step(self, actions: Actions) -> Step:
        """Steps each."""
        found = [w.step(int(a)) for w, a in zip(self._worlds, actions, strict=True)]
        self._seen = [each[0] for each in found]
        reward, ended, cut = (np.array([each[i] for each in found]) for i in (1, 2, 3))
        return Step(reward.astype(np.float64), ended.astype(bool), cut.astype(bool))


def own(make: Callable[[Floats], Any]) -> Kind:
    """The kind of what ``make`` gives for no parameters of its own, zeros.

    Raises:
        InputError: Gymnasium is missing, or it is not an environment of numbers and actions.
    """
    try:
        from gymnasium.spaces import Box, Discrete
    except ImportError:
        raise InputError(
            "your own environments need Gymnasium", where=WHERE, fix='pip install "umbel[rl]"'
        ) from None
    tried = make(np.zeros(0, np.float32))
    seen, actions = tried.observation_space, tried.action_space
    tried.close()
    if not isinstance(seen, Box) or not isinstance(actions, Discrete):
        raise InputError(
            f"it has observations {seen} and actions {actions}, expected Box and Discrete",
            where=WHERE,
            fix="wrap it, such as by gymnasium.wrappers.FlattenObservation",
        )
    inputs = prod(seen.shape)
    return Kind(inputs, int(actions.n), lambda rows, draw: Own(rows, draw, make))
