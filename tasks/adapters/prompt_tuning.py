"""Prompts that are learned."""

from __future__ import annotations

from typing import Any

from torch import nn

from umbel.core.errors import InputError
from umbel.core.settings import Count
from umbel.tasks.adapters import frame
from umbel.tasks.models.transformers import Language


def prompt_tuning(module: nn.Module, *, tokens: Count = 8) -> nn.Module:
    """Prompt tuning: trained vectors before the embeddings of each record. By PEFT.

    Args:
        module: a model of transformers.
        tokens: how many vectors; with them, records must fit into the model's context.

    Source: Lester et al. 2021, section 2 (arXiv:2104.08691).
    """
    return with_prompt(module, "prompt-tuning", frame.library().PromptTuningConfig, tokens)


def with_prompt(module: nn.Module, name: str, config: Any, tokens: int) -> nn.Module:
    """The common frame of prompt and prefix tuning.

    Raises:
        InputError: not a model of transformers, or one that must not look at padding.
    """
    if not isinstance(module, Language):
        raise InputError(
            f"'{name}' is for models of transformers",
            where=frame.WHERE,
            fix='kind = "lora", or [task.model] name = "transformers"',
        )
    if module.padding is not None:
        raise InputError(
            f"'{name}' does not go with padded records in a model that sees both ways",
            where=frame.WHERE,
            fix='kind = "lora"; or records of full length',
        )
    task = frame.TASKS[module.kind]
    return frame.with_peft(module, config(num_virtual_tokens=tokens, task_type=task))
