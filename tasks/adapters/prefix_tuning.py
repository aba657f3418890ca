"""Prefixes that are learned."""

from __future__ import annotations

from torch import nn

from umbel.core.settings import Count
from umbel.tasks.adapters import frame
from umbel.tasks.adapters.prompt_tuning import with_prompt


def prefix_tuning(module: nn.Module, *, tokens: Count = 8) -> nn.Module:
    """Prefix tuning: trained keys and values before those of each record, in all layers. By PEFT.

    Args:
        module: a model of transformers.
        tokens: how many.

    Source: Li and Liang 2021, section 4.2 (arXiv:2101.00190), without its reparametrisation.
    """
    return with_prompt(module, "prefix-tuning", frame.library().PrefixTuningConfig, tokens)
