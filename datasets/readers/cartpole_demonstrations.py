"""What somebody did who can balance a CartPole."""

from __future__ import annotations

import numpy as np

from umbel.core import randomness
from umbel.core.settings import Count, Fraction, Natural, NonNegative
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.worlds.cartpole import CartPoles, expert, various


def cartpole_demonstrations(
    *,
    clients: Count = 4,
    steps: Count = 500,
    spread: NonNegative = 0.5,
    noise: Fraction = 0.1,
    draw: Natural = 0,
) -> Dataset:
    """Observations and an expert's actions, on each client's own CartPole; to be imitated.

    The test part holds the physics of the same CartPoles, to be played in.

    Args:
        clients: how many.
        steps: of each.
        spread: as of ``cartpoles``.
        noise: share of steps that go at random, so that more is seen than the straight pole; what
            is told is what the expert would have done.
        draw: of physics and noise.
    """
    physics = various(clients, spread, randomness.generator(draw, "cartpoles"))
    dice = randomness.generator(draw, "demonstrations")
    world = CartPoles(physics, dice)
    over = np.ones(clients, bool)
    seen, done = [], []
    for _ in range(steps):
        world.begin(over)
        seen.append(world.observe())
        done.append(expert(seen[-1]))
        stray = dice.random(clients) < noise
        came = world.step(np.where(stray, dice.integers(2, size=clients), done[-1]))
        over = came.ended | came.cut
    names = np.array([f"pole{i:03d}" for i in range(clients)])
    return Dataset(
        Info("cartpole-demonstrations", (4,), classes=2),
        {"x": np.concatenate(seen), "y": np.concatenate(done)},
        {"x": physics},
        np.tile(names, steps),
        names,
    )
