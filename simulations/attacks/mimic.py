"""Mimic."""

from __future__ import annotations

from umbel.core import randomness
from umbel.core.trees import Tree
from umbel.simulations.attacks.attack import Attack, Scene


def mimic() -> Attack:
    """All copy one honest client, always the same. Karimireddy et al. 2022, section 3 (2006.09365).

    Nothing that is sent is suspect, and that client counts for many: it hurts where clients hold
    different data.
    """

    def forge(scene: Scene) -> Tree:
        assert scene.honest is not None
        names = list(scene.honest.clients)
        keys = randomness.client_keys(scene.seed, "mimic", 0, names)
        row = int(keys.argmin())
        return scene.each({name: stack[row] for name, stack in scene.rows().items()})

    return Attack(forge=forge, sees="honest")
