"""PEFT's low-rank adapters for many clients at once: two thin products beside the frozen one."""

from __future__ import annotations

from typing import Any

from torch import nn

from umbel.simulations.kernels.kernel import Obstacle
from umbel.simulations.kernels.layers import PLAIN, Finder, Layer, Scope, Value, rows


def is_lora(module: nn.Module) -> bool:
    """Whether it is PEFT's LoRA around a linear layer; PEFT need not be installed to ask."""
    kind = type(module)
    return (kind.__module__, kind.__qualname__) == ("peft.tuners.lora.layer", "Linear")


def lora(module: Any, find: Finder) -> Layer:
    """``W x + b + sum_a scaling_a B_a A_a dropout(x)`` over the active adapters a.

    Source: Hu et al. 2021, equation 3 (arXiv:2106.09685).
    """
    if module.lora_variant or module.merged or module.disable_adapters:
        raise Obstacle("an adapter that is merged, disabled or a variant of LoRA")
    if module._forward_hooks:  # a residual, which is zero while the gradients are compared
        raise Obstacle("a LoRA with hooks")
    if type(module.base_layer) is not nn.Linear:
        raise Obstacle(f"LoRA around a {type(module.base_layer).__name__}")
    base = PLAIN[nn.Linear](module.base_layer, find)
    names = [name for name in module.active_adapters if name in module.lora_A]
    parts = []
    for name in names:
        drop = module.lora_dropout[name]
        chain = [drop, module.lora_A[name], module.lora_B[name]]
        if any(type(part) not in PLAIN for part in chain):
            raise Obstacle("a LoRA of other layers")
        parts.append((module.scaling[name], [PLAIN[type(part)](part, find) for part in chain]))

    def layer(scope: Scope, x: Value) -> Value:
        out = base(scope, x).tensor
        for scaling, chain in parts:
            inner: Any = x
            for part in chain:
                inner = part(scope, inner)
            out = out + inner.as_rows() * scaling
        return rows(out)

    return layer


def without_wrapper(module: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, which passes everything on where the adapter is LoRA."""
    kind = type(module)
    if not kind.__module__.startswith("peft.peft_model"):
        return module
    whole: Any = module
    if "lora" not in str(whole.active_peft_config.peft_type).lower():
        raise Obstacle(f"no kernel knows {kind.__name__}")
    inner: nn.Module = whole.get_base_model()
    return inner
