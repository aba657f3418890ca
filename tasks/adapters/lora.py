"""Low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.settings import Count, Fraction, Positive
from umbel.tasks.adapters import frame

RESIDUAL = "lora_residual"
"""The name of a layer's :class:`Residual`."""


class Residual(nn.Module):
    """A matrix of a layer's full size that is carried along and not trained; 0 at first."""

    def __init__(self, outputs: int, inputs: int, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("full", like.new_zeros(outputs, inputs))
        self.full: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x.to(self.full.dtype), self.full)


def lora(
    module: nn.Module,
    *,
    rank: Count = 8,
    alpha: Positive = 16.0,
    dropout: Fraction = 0.0,
    targets: Sequence[str] | None = None,
    freeze_a: bool = False,
    residual: bool = False,
) -> nn.Module:
    """LoRA: a product of two thin matrices beside each chosen layer. By PEFT.

    ``alpha / rank * B A`` is added to the weight; B starts at 0, and A is random.

    Args:
        module: the model.
        rank: rows of A and columns of B.
        alpha: the factor on the product, times the rank.
        dropout: share of the layer's inputs dropped on the way to A in training.
        targets: names of layers, or their endings; ``None``: PEFT's choice for the architecture,
            else every linear layer but the head.
        freeze_a: whether A stays as the seed initialised it, at all clients the same: half the
            tensors travel, and the mean of products is the product of means (FFA-LoRA).
        residual: whether each layer has a matrix of its full size besides, which is not trained:
            rules that aggregate exactly (``fedex``, ``flora``) need it. It travels both ways.

    Source: Hu et al. 2021, section 4.1 (arXiv:2106.09685); Sun et al. 2024, FFA-LoRA, section 4
    (arXiv:2403.12313).
    """
    return low_rank(module, rank, alpha, dropout, targets, freeze_a, residual, False)


def low_rank(
    module: nn.Module,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | None,
    freeze_a: bool,
    residual: bool,
    dora: bool,
) -> nn.Module:
    """The common frame of LoRA and its kin; arguments as in :func:`lora` and :func:`dora`."""
    config = frame.library().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=frame.targets(
            module, targets, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
        ),
        modules_to_save=frame.trained_too(module),
        fan_in_fan_out=frame.transposed(module),
        task_type=frame.TASKS.get(frame.kind_of(module)) if frame.model_type(module) else None,
        use_dora=dora,
    )
    adapted = frame.with_peft(module, config)
    for name, parameter in adapted.named_parameters():
        if freeze_a and ".lora_A." in name:
            parameter.requires_grad_(False)
    if residual:
        for layer in layers(adapted):
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            layer.add_module(RESIDUAL, Residual(len(b), a.shape[1], a.detach()))
            layer.register_forward_hook(_add_residual)
    return adapted


def layers(module: nn.Module) -> list[Any]:
    """The layers of ``module`` that hold an A and a B."""
    return [m for m in module.modules() if "default" in getattr(m, "lora_A", ())]


def _add_residual(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added: Tensor = layer.lora_residual(inputs[0])
    scale: float = layer.scaling["default"]
    return output + scale * added.to(output.dtype)
