"""Replay: clients train again on a few of their earlier examples."""

from __future__ import annotations

from typing import Literal

from umbel.core.settings import Count, Natural
from umbel.datasets.buffer import Buffer
from umbel.strategies.parts.defence import Defence


def replay(
    *,
    per_class: Natural | None = None,
    examples: Natural | None = None,
    bytes: Count | None = None,
    choice: Literal["balanced", "reservoir", "herding"] = "balanced",
    repeat: bool = True,
) -> Defence:
    """Experience replay. Chaudhry et al. 2019, Algorithm 1 (arXiv:1902.10486).

    A client keeps some examples of earlier experiences, which never leave it, and trains on them
    along with the new ones. ``examples = 0`` is naive.

    Args:
        per_class: the most kept of one class; ``None``: 40 where nothing else is set.
        examples: the most kept in all.
        bytes: the same, as the memory that they take.
        choice: ``balanced``: as many of each class; ``herding``: of each class those whose mean,
            in features of the last model of their experience, is nearest the class's (Rebuffi et
            al. 2017, Algorithm 4, arXiv:1611.07725); ``reservoir``: of all met, without a look at
            the class.
        repeat: whether they are repeated until half of an epoch is old.
    """
    return Defence(buffer=Buffer.bounded(per_class, examples, bytes, choice, repeat))
