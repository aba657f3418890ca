"""Two networks against each other: one makes examples, one tells them from real ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from umbel.core.run_file import Part
from umbel.core.settings import Count, NonNegative
from umbel.datasets.federated import Info
from umbel.tasks.draws import repeated
from umbel.tasks.generative.decode import decoder as decoder_of
from umbel.tasks.generative.decode import discrepancy, require_numbers
from umbel.tasks.models.build import builder
from umbel.tasks.task import Batch, Forward, Task


class GAN(nn.Module):
    """A generator and a discriminator: two trees of parameters in one model."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    def forward(self, x: Tensor | None, noise: Tensor) -> Tensor:
        """(B, …), (B, latent) -> three logits of being real, (B, 3).

        Of ``x`` and of what the generator makes of the noise, for the discriminator to learn; and
        of the latter by a discriminator that does not learn, for the generator to. So the gradient
        of a sum of losses is, in each tree, that of its own loss alone. Without ``x``, the samples
        themselves, (B, numbers).
        """
        made = torch.sigmoid(self.generator(noise))
        if x is None:
            return made
        fake = made.view_as(x)
        held = {n: p.detach() for n, p in self.discriminator.named_parameters()}
        judged = [
            self.discriminator(x),
            self.discriminator(fake.detach()),
            functional_call(self.discriminator, held, (fake,)),
        ]
        return torch.cat(judged, 1)


def gan(
    info: Info,
    model: Part | str | None,
    *,
    latent: Count = 16,
    generator: str | dict[str, Any] = "mlp",
    weight: NonNegative = 1.0,
    smoothing: NonNegative = 0.0,
) -> Task:
    """Generative adversarial network, both networks a step at a time, with the same batch.

    One loss has the gradient of the discriminator's in its tree and of the generator's in its own,
    and optimizers keep a state for each parameter: with ``adam`` and the like, that is two
    optimizers of the same settings, at any client and under any strategy. Each loss is of one real
    example and one sample. Evaluation measures how far samples are from the test examples
    (``discrepancy``, a squared MMD near 0 for good ones).

    Args:
        info: of the data; ``x`` is numbers of 0 … 1.
        model: the discriminator.
        latent: numbers that the generator is given.
        generator: a name, or a table of a name and the model's own keys.
        weight: of the generator's loss; matters to ``sgd`` alone.
        smoothing: real examples are to be told with 1 minus this: Salimans et al. 2016, section 3.4
            (arXiv:1606.03498).

    Source: Goodfellow et al. 2014, Algorithm 1 with k = 1 and the loss of section 3 that does not
    saturate (arXiv:1406.2661).
    """
    require_numbers(info, "gan")
    judge = builder(model, info, 1)
    make = decoder_of(generator, info, latent)

    def build() -> nn.Module:
        return GAN(make(), judge())

    def draw(x: Tensor) -> Tensor:
        return torch.randn(len(x), latent, device=x.device, dtype=x.dtype)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        x = batch["x"]
        real, fake, wanted = forward(x, draw(x)).unbind(1)
        judged = F.softplus(-real) + smoothing * real + F.softplus(fake)
        return judged + weight * F.softplus(-wanted)

    def samples(forward: Forward, x: Tensor) -> Tensor:
        return forward(None, draw(x)).view_as(x)

    def figures(forward: Forward, batch: Batch) -> Tensor:
        return discrepancy(batch["x"], samples(forward, batch["x"]))

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        return {"discrepancy": repeated(figures)(forward, batch)}

    def pictures(forward: Forward, batch: Batch) -> Tensor:
        x = batch["x"]
        return torch.stack([x, *(samples(forward, x) for _ in range(5))])

    test = Task(build, repeated(losses), metrics)
    return Task(build, losses, lambda forward, batch: {}, test=test, pictures=pictures)
