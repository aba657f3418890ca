"""Low-rank adapters with a magnitude of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from umbel.core.settings import Count, Fraction, Positive
from umbel.tasks.adapters.lora import low_rank


def dora(
    module: nn.Module,
    *,
    rank: Count = 8,
    alpha: Positive = 16.0,
    dropout: Fraction = 0.0,
    targets: Sequence[str] | None = None,
) -> nn.Module:
    """DoRA: LoRA for the direction of each chosen weight, and a trained magnitude. By PEFT.

    Args:
        module: the model.
        rank: as in ``lora``.
        alpha: as in ``lora``.
        dropout: as in ``lora``.
        targets: as in ``lora``.

    Source: Liu et al. 2024, section 4 (arXiv:2402.09353).
    """
    return low_rank(module, rank, alpha, dropout, targets, False, False, True)
