"""Examples squeezed through a few numbers and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from umbel.core.run_file import Part
from umbel.core.settings import Count, NonNegative
from umbel.datasets.federated import Info
from umbel.tasks.draws import repeated
from umbel.tasks.generative.decode import decoder as decoder_of
from umbel.tasks.generative.decode import require_numbers, worth
from umbel.tasks.models.build import builder
from umbel.tasks.task import Batch, Forward, Task


class AutoEncoder(nn.Module):
    """(B, …) -> code and reconstruction, side by side: (B, code + numbers of an example)."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> (B, code + numbers)."""
        h = self.encoder(x)
        return torch.cat([h, self.decoder(h)], 1)


def autoencoder(
    info: Info,
    model: Part | str | None,
    *,
    embedding: Count = 16,
    decoder: str | dict[str, Any] = "mlp",
    noise: NonNegative = 0.0,
) -> Task:
    """Auto-encoder: the mean squared error of an example that went through a few numbers.

    ``probe`` and ``knn`` say what the numbers are worth, as for ``self-supervised``, and the
    encoder hands over as that task's does.

    Args:
        info: of the data; ``x`` is numbers.
        model: the encoder.
        embedding: numbers in between.
        decoder: the model that takes them back; a name, or a table of a name and its own keys.
        noise: standard deviation of what is added to the encoder's input in training: Vincent et
            al. 2008, section 2.3 (ICML).

    Source: Hinton and Salakhutdinov 2006 (Science 313).
    """
    require_numbers(info, "autoencoder")
    encode = builder(model, info, embedding, head="features")
    decode = decoder_of(decoder, info, embedding)

    def build() -> nn.Module:
        return AutoEncoder(encode(), decode())

    def painted(forward: Forward, x: Tensor) -> Tensor:
        return forward(x)[:, -x[0].numel() :].view_as(x)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        x = batch["x"]
        given = x + noise * torch.randn_like(x) if noise else x
        return (painted(forward, given) - x).flatten(1).square().mean(1)

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        x = batch["x"]
        return worth(forward(x)[:, : -x[0].numel()], batch, info)

    def pictures(forward: Forward, batch: Batch) -> Tensor:
        return torch.stack([batch["x"], painted(forward, batch["x"])])

    test = Task(build, repeated(losses), metrics)
    return Task(build, losses, lambda forward, batch: {}, test=test, pictures=pictures)
