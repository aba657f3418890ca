"""Model-replacement backdoor."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.core.settings import Count, Natural, Positive, Share
from umbel.core.trees import Tree
from umbel.datasets.federated import Arrays, FederatedData, rows, take
from umbel.simulations.attacks.attack import Attack, Scene


def backdoor(
    *, target: Natural = 0, size: Count = 3, poisoned: Share = 0.5, boost: Positive | None = None
) -> Attack:
    """A trigger means a class; the update is boosted to survive the mean. Bagdasaryan et al. 2020.

    Section 4.2, equation 3 (arXiv:1807.00459), with the pixel trigger of Gu et al. 2017
    (arXiv:1708.06733): a bright square in the lower right corner, or the first values of a row.
    Records have ``attack_success_rate``: the share of triggered test examples of other classes that
    are taken for the target.

    Args:
        target: the class that the trigger shall mean.
        size: side of the square, or how many values.
        poisoned: share of a hostile client's examples that get trigger and target.
        boost: what the update is multiplied by; ``None``: clients in the round over hostile ones.
    """

    def poison(data: FederatedData, held: npt.NDArray[np.int64], seed: int) -> Arrays:
        _check(data, target)
        order = randomness.permutation(randomness.key(seed, "backdoor"), len(held))
        chosen = held[order[: max(1, round(poisoned * len(held)))]]
        x, y = data.train["x"].copy(), data.train["y"].copy()
        x[chosen] = stamped(x[chosen], size, data.train["x"].max())
        y[chosen] = target
        return {**data.train, "x": x, "y": y}

    def forge(scene: Scene) -> Tree:
        assert scene.own is not None
        factor = boost
        if factor is None:
            factor = scene.cohort / len(scene.hostile)
        return {name: factor * scene.own.delta[name].double() for name in scene.floating()}

    def trigger(test: Arrays) -> Arrays:
        others = take(test, np.flatnonzero(test["y"] != target))
        x = stamped(others["x"], size, test["x"].max()) if rows(others) else others["x"]
        return {**others, "x": x, "y": np.full_like(others["y"], target)}

    return Attack(poison, forge, "own", trigger)


def stamped(x: npt.NDArray[Any], size: int, value: Any) -> npt.NDArray[Any]:
    """The inputs (B, …) with the trigger: images are (B, channels, height, width)."""
    x = x.copy()
    if x.ndim == 4:
        x[:, :, -size:, -size:] = value
    else:
        x.reshape(len(x), -1)[:, :size] = value
    return x


def _check(data: FederatedData, target: int) -> None:
    if data.info.classes is None or data.info.vocabulary is not None:
        raise InputError(
            f"data set '{data.info.name}' has no classes of numbers, which a backdoor needs",
            where="[attack]",
            fix="choose sign-flip",
        )
    if target >= data.info.classes:
        raise InputError(
            f"target = {target} is no class: there are {data.info.classes}",
            where="[attack]",
            fix=f"target ≤ {data.info.classes - 1}",
        )
