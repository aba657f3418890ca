"""Losses that draw random numbers, the same ones each time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from umbel.tasks.task import Batch, Forward


def repeated(
    function: Callable[[Forward, Batch], Tensor], seed: int = 0
) -> Callable[[Forward, Batch], Tensor]:
    """``function`` with its draws from ``seed`` at each call, as evaluation wants them."""

    def again(forward: Forward, batch: Batch) -> Tensor:
        device = batch["x"].device
        cards = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cards):
            torch.manual_seed(seed)
            return function(forward, batch)

    return again
