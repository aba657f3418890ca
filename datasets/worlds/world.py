"""What every world offers, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from umbel.core import registry
from umbel.core.errors import InputError

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Actions: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]


class Step(NamedTuple):
    """What one action in each of E worlds led to; a world that is over is begun by its user.

    Args:
        reward: (E,).
        ended: (E,) bool, for good: nothing is to be gained after it.
        cut: (E,) bool, by the limit of steps: it might have gone on.
    """

    reward: Floats
    ended: Mask
    cut: Mask


class World(Protocol):
    """E worlds side by side, each in a state of its own."""

    def begin(self, which: Mask) -> None:
        """Starts these anew; all need that once before the first step."""

    def observe(self) -> Floats:
        """(E, inputs) float32, what is seen of each now; the caller's to keep."""

    def step(self, actions: Actions) -> Step:
        """Takes an action, 0 … actions-1, in each; (E,)."""


class Kind(NamedTuple):
    """A kind of world.

    Args:
        inputs: numbers in an observation.
        actions: how many there are.
        make: (parameters (E, P), generator of all its draws) -> E worlds.
        parameters: P; ``None``: the world's maker knows.
        states: whether an observation is a state, as a one among zeros.
    """

    inputs: int
    actions: int
    make: Callable[[Floats, np.random.Generator], World]
    parameters: int | None = None
    states: bool = False


def find(name: str, size: int = 4) -> Kind:
    """The kind of this name: ``cartpole``, ``grid``, or your own.

    Your own is ``package.module:function``, of the parameters of one world (P,), which gives a
    ``gymnasium.Env`` with a ``Box`` of numbers to see and ``Discrete`` actions.

    Args:
        name: of the kind.
        size: ``grid``: of its side.

    Raises:
        InputError: no such kind.
    """
    if ":" in name:
        from umbel.datasets.worlds.own import own

        return own(registry.find("tasks", name, "[task] environment"))
    if name == "cartpole":
        from umbel.datasets.worlds.cartpole import KIND

        return KIND
    if name == "grid":
        from umbel.datasets.worlds.grid import grid

        return grid(size)
    raise InputError(
        f"unknown environment '{name}'",
        where="[task] environment",
        fix="cartpole, grid, or 'package.module:function' that makes a gymnasium.Env",
    )
