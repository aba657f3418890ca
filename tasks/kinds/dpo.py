"""A policy straight from preferences."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from torch import Tensor

from umbel.core.run_file import Part
from umbel.core.settings import Positive
from umbel.datasets.federated import Info
from umbel.tasks.language import symbols
from umbel.tasks.models.build import builder
from umbel.tasks.preferences import losses as of
from umbel.tasks.preferences import pairs
from umbel.tasks.preferences.policy import Policy
from umbel.tasks.task import Batch, Forward, Task


def dpo(
    info: Info,
    model: Part | str | None,
    *,
    loss: Literal["sigmoid", "ipo"] = "sigmoid",
    beta: Positive = 0.1,
    label_smoothing: pairs.Smoothing = 0.0,
    reference_free: bool = False,
) -> Task:
    """A policy from pairs of completions: DPO, IPO; label-smoothed or reference-free.

    The reference is the model as the run began (``init_from``): frozen, built by each side, never
    sent. Its SHA-256 stands in the run's record.

    Args:
        info: of the data; pairs of completions.
        model: takes symbols (B, T), gives (B, T, symbols); ``None``: ``gpt``.
        loss: ``sigmoid`` is DPO's; ``ipo`` draws the ratio to ``1 / (2 beta)`` and no further.
        beta: how dear it is to leave the reference.
        label_smoothing: ``sigmoid``: share of the preferences that are taken for flipped.
        reference_free: whether any policy is as good as the reference: there is none.

    Source: Rafailov et al. 2023, equation 7 (arXiv:2305.18290); Azar et al. 2023, equation 17
    (arXiv:2310.12036).
    """
    vocabulary = symbols.vocabulary(info, "dpo")

    def ratio(forward: Forward, batch: Batch) -> Tensor:
        return pairs.ratio(forward, batch, info, reference=not reference_free)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        if loss == "ipo":
            return of.ipo(ratio(forward, batch), beta)
        return of.dpo(ratio(forward, batch), beta, label_smoothing)

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        margin = beta * ratio(forward, batch)
        return {"accuracy": (margin > 0).float(), "margin": margin}

    build = builder(model or "gpt", info, vocabulary, "causal")
    around = partial(Policy, reference=not reference_free)
    return Task(build, losses, metrics, unit=pairs.UNIT, around=around)
