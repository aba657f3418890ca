"""FedSA-LoRA: A is everybody's, B is each client's own."""

from __future__ import annotations

from umbel.core.settings import Positive
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Strategy
from umbel.strategies.parts.low_rank import B


def fedsa_lora(*, server_lr: Positive = 1.0) -> Strategy:
    """FedSA-LoRA. Guo et al. 2024, section 3.2 (arXiv:2410.01463): only A travels.

    A learns what is common, B what is a client's own; the metrics ``personal_…`` are those of the
    clients' models.

    Args:
        server_lr: as in FedAvg.
    """
    rule = ClientRule(private=lambda names: [n for n in names if n.endswith(B)])
    return fedavg(server_lr=server_lr)._replace(client=rule)
