"""What adapters share: the PEFT library, the layers that they change, and what stays trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from umbel.core.errors import InputError
from umbel.tasks.models.transformers import Language
from umbel.tasks.preferences.policy import Policy

WHERE = "[task.adapter]"

TASKS = {"causal": "CAUSAL_LM", "masked": "FEATURE_EXTRACTION", "class": "SEQ_CLS"}
"""PEFT's words for the heads of a model."""


def library() -> Any:
    """The peft package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"adapters need the library peft: {error}",
            where=WHERE,
            fix="pip install 'umbel[llm]'",
        ) from None
    return peft


def inner(module: nn.Module) -> nn.Module:
    """The model itself, where ``module`` is a shell around one of transformers, or a policy's."""
    module = module.policy if isinstance(module, Policy) else module
    return module.model if isinstance(module, Language) else module


def kind_of(module: nn.Module) -> str:
    """``causal``, ``masked``, ``class``; or nothing for a model that does not read symbols."""
    return str(getattr(module, "kind", ""))


def model_type(module: nn.Module) -> str | None:
    """The architecture of a model of transformers."""
    config = getattr(inner(module), "config", None)
    return getattr(config, "model_type", None)


def with_peft(module: nn.Module, config: Any) -> nn.Module:
    """``module`` with the adapter that ``config`` describes in it; only that is trained.

    Raises:
        InputError: PEFT cannot put it there.
    """
    try:
        model = library().get_peft_model(inner(module), config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the adapter does not fit the model: {str(error).splitlines()[0]}",
            where=WHERE,
            fix=f"targets among: {', '.join(linear_names(module)) or 'no linear layer'}",
        ) from None
    if isinstance(module, Language):
        module.model = model
        return module
    shell: nn.Module = model
    return shell


def peft_of(module: nn.Module) -> Any:
    """The PeftModel in ``module``, or ``None``."""
    found = inner(module)
    return found if hasattr(found, "peft_config") else None


def trained_too(module: nn.Module) -> list[str] | None:
    """Modules that are trained beside the adapter: a new head is of no use as it began."""
    fresh = kind_of(module) == "class" and not isinstance(module, Language)
    return ["head"] if fresh else None  # PEFT finds those of transformers itself


def targets(
    module: nn.Module, asked: Sequence[str] | None, known: str
) -> Sequence[str] | str | None:
    """The layers that an adapter changes: those asked for, PEFT's own choice, or every linear one.

    Args:
        module: the model.
        asked: names or their endings.
        known: the name of PEFT's table of choices by architecture.
    """
    if asked is not None:
        return list(asked)
    from peft.utils import constants

    if model_type(module) in getattr(constants, known):
        return None
    return linear_names(module)


def linear_names(module: nn.Module) -> list[str]:
    """The linear layers of a model but its head, by their full names."""
    head = "head" if kind_of(module) else None
    layers = inner(module).named_modules()
    return [n for n, m in layers if width(m) and n != head and not n.endswith("lm_head")]


def width(layer: nn.Module) -> int:
    """The outputs of a linear layer, transformers' transposed one included; 0 for any other."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return int(getattr(layer, "nf", 0)) if type(layer).__name__ == "Conv1D" else 0


def transposed(module: nn.Module) -> bool:
    """Whether the linear layers are GPT-2's, which hold their weights the other way round."""
    return any(type(layer).__name__ == "Conv1D" for layer in module.modules())


def freeze(module: nn.Module) -> None:
    """Leaves nothing of ``module`` trained."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
