"""A slippery grid: from one corner to the other, where a step may go aside.

An observation is the cell, as ones and zeros; so a table is a linear layer.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from umbel.datasets.worlds.world import Actions, Floats, Kind, Mask, Step

MOVES = np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])
"""Right, down, left, up: (rows, columns)."""


class Grids:
    """E of them; see ``World``. The last cell ends it with a reward of 1; all else is worth 0.

    Args:
        slip: (E, 1), the chance that a step goes to one of the two sides instead.
        draw: of what slips.
        size: cells a side.
    """

    def __init__(self, slip: Floats, draw: np.random.Generator, size: int) -> None:
        self._slip, self._draw, self._size = np.asarray(slip)[:, 0], draw, size
        self.cell = np.zeros(len(slip), np.int64)
        self._taken = np.zeros(len(slip), np.int64)

    def begin(self, which: Mask) -> None:
        """Puts these into the first cell."""
        self.cell = np.where(which, 0, self.cell)
        self._taken = np.where(which, 0, self._taken)

    def observe(self) -> Floats:
        """(E, size²) float32."""
        return np.eye(self._size**2, dtype=np.float32)[self.cell]

    def step(self, actions: Actions) -> Step:
        """Goes right, down, left or up, where there is no wall; cut after 10 · size steps."""
        turn = self._draw.random(len(actions))
        aside = np.where(turn < self._slip / 2, 1, np.where(turn < self._slip, 3, 0))
        self.cell = moved(self.cell, (actions + aside) % 4, self._size)
        self._taken = self._taken + 1
        ended = self.cell == self._size**2 - 1
        return Step(ended.astype(np.float64), ended, (self._taken >= 10 * self._size) & ~ended)


def moved(cell: Actions, direction: Actions, size: int) -> Actions:
    """The cell that a step leads to."""
    place = np.stack(np.divmod(cell, size), 1) + MOVES[direction]
    place = np.clip(place, 0, size - 1)
    return np.asarray(place[:, 0] * size + place[:, 1], np.int64)


def chances(size: int, slip: float) -> Floats:
    """(cells, 4, cells): what each action leads to, by which values can be computed exactly."""
    found = np.zeros((size**2, 4, size**2))
    cells = np.arange(size**2)
    for action in range(4):
        for aside, chance in ((0, 1 - slip), (1, slip / 2), (3, slip / 2)):
            to = moved(cells, np.full_like(cells, (action + aside) % 4), size)
            found[cells, action, to] += chance  # of one cell and action, each ``to`` once
    return found


def grid(size: int) -> Kind:
    """Grids of so many cells a side."""
    return Kind(size**2, 4, partial(Grids, size=size), parameters=1, states=True)
