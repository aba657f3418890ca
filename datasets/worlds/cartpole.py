"""A pole on a cart, many at once, each with a physics of its own; and who can balance it.

Source: Barto, Sutton and Anderson 1983; the equations, bounds and limit of Gymnasium's
``CartPole-v1``, which a test follows step by step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from umbel.datasets.worlds.world import Actions, Floats, Kind, Mask, Step

PHYSICS = ("gravity", "cart_mass", "pole_mass", "half_length", "force")
"""m/s², kg, kg, m, N: the parameters of one, in this order."""

USUAL = (9.8, 1.0, 0.1, 0.5, 10.0)
TAU = 0.02
"""Seconds of a step."""

ANGLE, PLACE, LIMIT = 12 * 2 * np.pi / 360, 2.4, 500
"""Beyond this angle (rad) or place (m) it is over; after so many steps it is cut."""


class CartPoles:
    """E of them; see ``World``. An observation is place, speed, angle, angular speed.

    Args:
        physics: (E, 5), as :data:`PHYSICS`.
        draw: of the states that they begin with.
    """

    def __init__(self, physics: Floats, draw: np.random.Generator) -> None:
        self._physics = np.asarray(physics, np.float64).T
        self._draw = draw
        self.state = np.zeros((4, len(physics)))
        self._taken = np.zeros(len(physics), np.int64)

    def begin(self, which: Mask) -> None:
        """Starts these anew, each number uniform within ±0.05."""
        # Of all, so that what one begins with does not depend on when others do.
        fresh = self._draw.uniform(-0.05, 0.05, self.state.shape)
        self.state = np.where(which, fresh, self.state)
        self._taken = np.where(which, 0, self._taken)

    def observe(self) -> Floats:
        """(E, 4) float32."""
        return np.ascontiguousarray(self.state.T, np.float32)

    def step(self, actions: Actions) -> Step:
        """0 pushes to the left, 1 to the right; a reward of 1 for each step."""
        gravity, cart, pole, length, strength = self._physics
        place, speed, angle, turning = self.state
        force = np.where(actions == 1, strength, -strength)
        cos, sin = np.cos(angle), np.sin(angle)
        total = cart + pole
        temp = (force + pole * length * np.square(turning) * sin) / total
        turn = (gravity * sin - cos * temp) / (length * (4.0 / 3.0 - pole * np.square(cos) / total))
        push = temp - pole * length * turn * cos / total
        self.state = np.stack(
            [
                place + TAU * speed,
                speed + TAU * push,
                angle + TAU * turning,
                turning + TAU * turn,
            ]
        )
        self._taken = self._taken + 1
        ended = (np.abs(self.state[0]) > PLACE) | (np.abs(self.state[2]) > ANGLE)
        return Step(np.ones(len(ended)), ended, (self._taken >= LIMIT) & ~ended)


KIND = Kind(inputs=4, actions=2, make=CartPoles, parameters=len(PHYSICS))


def expert(seen: Floats) -> Actions:
    """A controller by hand: pushes to where the pole falls, and gently back to the middle.

    Args:
        seen: (E, 4).
    """
    place, speed, angle, turning = seen.T
    return np.asarray(0.1 * place + 0.25 * speed + 3.0 * angle + turning > 0, np.int64)


def various(clients: int, spread: float, draw: np.random.Generator) -> npt.NDArray[np.float32]:
    """(clients, 5): the usual physics, then others, each number off by a factor up to 1 + spread.

    Factors are uniform in their logarithm.
    """
    factors = (1 + spread) ** draw.uniform(-1, 1, (clients, len(USUAL)))
    factors[0] = 1
    return (np.array(USUAL) * factors).astype(np.float32)
