"""Classes of texts."""

from __future__ import annotations

from umbel.core.run_file import Part
from umbel.core.settings import Fraction
from umbel.datasets.federated import Info
from umbel.tasks.kinds.classification import classification
from umbel.tasks.language import symbols
from umbel.tasks.models.build import builder
from umbel.tasks.task import Task


def sequence_classification(
    info: Info, model: Part | str | None, *, label_smoothing: Fraction = 0.0
) -> Task:
    """One of several classes for each text: cross-entropy, accuracy; padding is not looked at.

    Args:
        info: of the data; ``x`` is symbols, ``y`` is classes.
        model: takes symbols (B, T), gives (B, 1) for two classes and (B, classes) for more;
            ``None``: ``gpt``, which sees both ways.
        label_smoothing: as in ``classification``.
    """
    symbols.vocabulary(info, "sequence-classification")
    task = classification(info, "gpt", label_smoothing=label_smoothing)
    outputs = 1 if info.classes == 2 else info.classes or 1
    build = builder(model or "gpt", info, outputs, "class")
    return task._replace(build=build, unit="text with its class")
