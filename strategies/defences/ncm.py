"""NCM: an example is of the class whose mean is nearest, in the features of the model."""

from __future__ import annotations

from typing import Literal

from umbel.core.settings import Count, Natural
from umbel.datasets.buffer import Buffer
from umbel.strategies.parts.defence import Defence


def ncm(
    *,
    per_class: Natural | None = None,
    examples: Natural | None = None,
    bytes: Count | None = None,
    choice: Literal["balanced", "reservoir", "herding"] = "herding",
    repeat: bool = True,
) -> Defence:
    """Nearest class means. Rebuffi et al. 2017, iCaRL, Algorithm 1 (arXiv:1611.07725).

    The last layer, which forgets first, has no say: classes are told by the mean of their features,
    of length 1, which clients send as sums and counts whenever the model is evaluated. Replay as it
    is; without iCaRL's distillation. Classes of which nothing is kept have the mean that the model
    at the end of their experience gave them.

    Args:
        per_class: as for replay.
        examples: as for replay.
        bytes: as for replay.
        choice: as for replay.
        repeat: as for replay.
    """
    kept = Buffer.bounded(per_class, examples, bytes, choice, repeat)
    return Defence(buffer=kept, prototypes=True)
