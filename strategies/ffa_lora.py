"""FFA-LoRA: FedAvg on B alone."""

from __future__ import annotations

from umbel.core.errors import InputError
from umbel.core.settings import Positive
from umbel.core.trees import Tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ServerState, Strategy
from umbel.strategies.parts.low_rank import pairs


def ffa_lora(*, server_lr: Positive = 1.0) -> Strategy:
    """FFA-LoRA. Sun et al. 2024, section 4 (arXiv:2403.12313): A stays as it was initialised.

    With one A for all, the mean of products is the product of means, and noise on B is not
    multiplied by noise on A. It needs ``adapter = { kind = "lora", freeze_a = true }``.

    Args:
        server_lr: as in FedAvg.
    """

    def init(params: Tree) -> ServerState:
        if found := pairs(params):
            raise InputError(
                f"'ffa-lora' leaves A as it is, and '{found[0].a}' is trained",
                where="[task.adapter]",
                fix='adapter = { kind = "lora", freeze_a = true }',
            )
        return {}

    return fedavg(server_lr=server_lr)._replace(init=init)
