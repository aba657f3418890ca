"""Label flip."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.datasets.federated import Arrays, FederatedData
from umbel.simulations.attacks.attack import Attack


def label_flip() -> Attack:
    """Class y is trained as classes - 1 - y. Fang et al. 2020, section 5.1.3 (arXiv:1911.11815)."""

    def poison(data: FederatedData, rows: npt.NDArray[np.int64], seed: int) -> Arrays:
        if data.info.classes is None:
            raise InputError(
                f"data set '{data.info.name}' has no classes, and label-flip flips them",
                where="[attack]",
                fix="choose sign-flip",
            )
        y = data.train["y"].copy()
        y[rows] = data.info.classes - 1 - y[rows]
        return {**data.train, "y": y}

    return Attack(poison=poison)
