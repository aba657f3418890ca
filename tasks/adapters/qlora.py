"""Low-rank adapters on a base model of four bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from umbel.core.errors import InputError
from umbel.core.settings import Count, Fraction, Positive
from umbel.tasks.adapters import frame
from umbel.tasks.adapters.lora import low_rank


def qlora(
    module: nn.Module,
    *,
    rank: Count = 8,
    alpha: Positive = 16.0,
    dropout: Fraction = 0.0,
    targets: Sequence[str] | None = None,
) -> nn.Module:
    """QLoRA: LoRA beside layers whose frozen weights are NF4, with double quantisation.

    Args:
        module: the model; its linear layers but the head are quantised.
        rank: as in ``lora``.
        alpha: as in ``lora``.
        dropout: as in ``lora``.
        targets: as in ``lora``.

    Raises:
        InputError: bitsandbytes is not installed, or does not run here.

    Source: Dettmers et al. 2023, section 3 (arXiv:2305.14314).
    """
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        raise InputError(
            f"qlora needs the library bitsandbytes, which does not run here: {error}",
            where=frame.WHERE,
            fix='kind = "lora"; or pip install bitsandbytes, where it has a build',
        ) from None
    model: Any = frame.inner(module)
    for name in frame.linear_names(module):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, _quantised(bitsandbytes.nn, layer))
    model.is_loaded_in_4bit = True  # what PEFT asks
    return low_rank(module, rank, alpha, dropout, targets, False, False, False)


def _quantised(layers: Any, layer: nn.Linear) -> nn.Module:
    made: nn.Module = layers.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.float32,
        compress_statistics=True,
        quant_type="nf4",
    )
    made.weight = layers.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    made.bias = layer.bias
    return made.to(layer.weight.device)  # the move is what quantises
