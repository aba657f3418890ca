"""What people prefer, as a number for each completion."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from umbel.core.run_file import Part
from umbel.core.settings import NonNegative
from umbel.datasets.federated import Info
from umbel.tasks.language import symbols
from umbel.tasks.models.build import builder
from umbel.tasks.preferences import pairs
from umbel.tasks.preferences.losses import bradley_terry
from umbel.tasks.task import Batch, Forward, Task


def reward(
    info: Info,
    model: Part | str | None,
    *,
    label_smoothing: pairs.Smoothing = 0.0,
    centre: NonNegative = 0.0,
) -> Task:
    """A reward model from pairs of completions: Bradley-Terry, accuracy over pairs.

    Args:
        info: of the data; pairs of completions.
        model: takes symbols (B, T), gives (B, 1); ``None``: ``gpt``, which sees both ways.
        label_smoothing: share of the preferences that are taken for flipped; below 0.5.
        centre: weight of the squared sum of a pair's rewards, which the preferences leave open.

    Source: Ouyang et al. 2022, equation 1 (arXiv:2203.02155); Eisenstein et al. 2023, section 4
    (arXiv:2312.09244), for ``centre``.
    """
    symbols.vocabulary(info, "reward")

    def rewards(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        chosen, rejected = (forward(tokens).float()[:, 0] for tokens in pairs.sides(batch))
        return chosen, rejected

    def losses(forward: Forward, batch: Batch) -> Tensor:
        chosen, rejected = rewards(forward, batch)
        fit = bradley_terry(chosen - rejected, label_smoothing)
        return fit + centre * (chosen + rejected).square() if centre else fit

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        chosen, rejected = rewards(forward, batch)
        return {"accuracy": (chosen > rejected).float(), "margin": chosen - rejected}

    return Task(builder(model or "gpt", info, 1, "class"), losses, metrics, unit=pairs.UNIT)
