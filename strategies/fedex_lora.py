"""FedEx-LoRA: FedAvg on the factors, and what that loses goes to a residual."""

from __future__ import annotations

from umbel.core.trees import Model, Tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import Combined, Strategy
from umbel.strategies.parts.low_rank import error, lost, moved, pairs, with_products


def fedex_lora() -> Strategy:
    """FedEx-LoRA. Singhal et al. 2024, equations 8-11 (arXiv:2410.09432).

    The model moves by the exact mean of the clients' ``B A``: the residual of each layer takes
    ``mean(B_k A_k) - mean B mean A``. It needs ``adapter = { kind = "lora", residual = true }``,
    and a layer's residual is as large on the wire as the layer.
    """

    def buffers(model: Model, combined: Combined) -> Tree:
        steps = {p.residual: lost(combined, p) for p in pairs(model.params)}
        return moved(model, steps, "fedex-lora")

    return fedavg()._replace(combine=with_products(), buffers=buffers, figures=error)
