"""Gaussian noise."""

from __future__ import annotations

import torch

from umbel.core.settings import Positive
from umbel.core.trees import Tree
from umbel.simulations.attacks.attack import Attack, Scene


def gaussian(*, std: Positive = 1.0) -> Attack:
    """Pure noise in place of an update. Blanchard et al. 2017, section 5 (arXiv:1703.02757).

    Args:
        std: of every value, in parameter units; the paper's is about 14.
    """

    def forge(scene: Scene) -> Tree:
        draws = [scene.normal(client) for client in scene.hostile]
        return {name: std * torch.stack([d[name] for d in draws]) for name in scene.floating()}

    return Attack(forge=forge)
