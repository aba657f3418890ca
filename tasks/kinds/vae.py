"""A distribution of examples, learned by a code that has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.run_file import Part
from umbel.core.settings import Count, NonNegative
from umbel.datasets.federated import Info
from umbel.tasks.draws import repeated
from umbel.tasks.generative.decode import decoder as decoder_of
from umbel.tasks.generative.decode import discrepancy, require_numbers, worth
from umbel.tasks.models.build import builder
from umbel.tasks.task import Batch, Forward, Task


class VAE(nn.Module):
    """An encoder that gives means and log-variances of the code, and a decoder."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor | None, noise: Tensor) -> Tensor:
        """(B, …), (B, latent) -> mean, log-variance and reconstruction, side by side.

        Without ``x``, what the decoder makes of the noise as a code, (B, numbers).
        """
        if x is None:
            sample: Tensor = self.decoder(noise)
            return sample
        found = self.encoder(x)
        mean, log_variance = found.chunk(2, 1)
        code = mean + (log_variance / 2).exp() * noise
        return torch.cat([found, self.decoder(code)], 1)


def vae(
    info: Info,
    model: Part | str | None,
    *,
    latent: Count = 8,
    beta: NonNegative = 1.0,
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
    decoder: str | dict[str, Any] = "mlp",
) -> Task:
    """Variational auto-encoder: minus the evidence lower bound, in nats an example.

    Evaluation also measures how far samples are from the test examples (``discrepancy``, a squared
    MMD near 0 for good ones) and what the codes' means are worth (``probe``, ``knn``).

    Args:
        info: of the data; ``x`` is numbers.
        model: the encoder.
        latent: numbers of a code.
        beta: weight of the divergence from the prior: Higgins et al. 2017 (ICLR).
        likelihood: ``bernoulli`` for numbers of 0 … 1; ``gaussian`` has variance 1.
        decoder: the model that takes codes back; a name, or a table of a name and its own keys.

    Source: Kingma and Welling 2014, equation 10 (arXiv:1312.6114), one sample of the code.
    """
    require_numbers(info, "vae")
    encode = builder(model, info, 2 * latent, head="class")
    decode = decoder_of(decoder, info, latent)

    def build() -> nn.Module:
        return VAE(encode(), decode())

    def draw(x: Tensor) -> Tensor:
        return torch.randn(len(x), latent, device=x.device, dtype=x.dtype)

    def shown(numbers: Tensor, x: Tensor) -> Tensor:
        return (numbers.sigmoid() if likelihood == "bernoulli" else numbers).view_as(x)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        x = batch["x"]
        found = forward(x, draw(x))
        mean, log_variance = found[:, :latent], found[:, latent : 2 * latent]
        numbers, target = found[:, 2 * latent :], x.flatten(1)
        if likelihood == "bernoulli":
            missed = F.binary_cross_entropy_with_logits(numbers, target, reduction="none")
        else:
            missed = (numbers - target).square() / 2
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
        return missed.sum(1) + beta * divergence.sum(1)

    def figures(forward: Forward, batch: Batch) -> Tensor:
        x = batch["x"]
        return discrepancy(x, shown(forward(None, draw(x)), x))

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        x = batch["x"]
        code = forward(x, torch.zeros_like(draw(x)))[:, :latent]
        return {"discrepancy": repeated(figures)(forward, batch), **worth(code, batch, info)}

    def pictures(forward: Forward, batch: Batch) -> Tensor:
        x = batch["x"]
        again = shown(forward(x, torch.zeros_like(draw(x)))[:, 2 * latent :], x)
        return torch.stack([x, again, *(shown(forward(None, draw(x)), x) for _ in range(4))])

    test = Task(build, repeated(losses), metrics)
    return Task(build, losses, lambda forward, batch: {}, test=test, pictures=pictures)
