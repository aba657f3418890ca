"""Adapters that scale activations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from umbel.tasks.adapters import frame


def ia3(
    module: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    feedforward: Sequence[str] | None = None,
) -> nn.Module:
    """(IA)³: a trained factor for each output of the chosen layers. By PEFT.

    Args:
        module: the model.
        targets: names of layers, or their endings; ``None``: PEFT's choice for the architecture,
            else every linear layer but the head.
        feedforward: those of ``targets`` whose inputs are scaled in place of their outputs;
            ``None``: PEFT's choice, else none.

    Source: Liu et al. 2022, section 3.3 (arXiv:2205.05638).
    """
    chosen = frame.targets(module, targets, "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING")
    inside = list(feedforward) if feedforward is not None else None if chosen is None else []
    config = frame.library().IA3Config(
        target_modules=chosen,
        feedforward_modules=inside,
        modules_to_save=frame.trained_too(module),
        fan_in_fan_out=frame.transposed(module),
        task_type=frame.TASKS.get(frame.kind_of(module)) if frame.model_type(module) else None,
    )
    return frame.with_peft(module, config)
