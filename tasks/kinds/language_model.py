"""Causal language models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from umbel.core.run_file import Part
from umbel.datasets.federated import Info
from umbel.tasks.language import symbols
from umbel.tasks.models.build import builder
from umbel.tasks.task import Batch, Forward, Task


def language_model(info: Info, model: Part | str | None) -> Task:
    """The next symbol of a text, at each of its symbols: cross-entropy, perplexity, accuracy.

    The loss of a record is the mean over its symbols, in nats; a record is what example-level
    privacy hides. Data whose label is the symbol after the record have it as the last target.

    Args:
        info: of the data; ``x`` is symbols.
        model: takes symbols (B, T), gives (B, T, symbols); ``None``: ``gpt``.
    """
    count = symbols.vocabulary(info, "language-model")
    follows = info.classes == info.vocabulary

    def pieces(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        tokens = batch["x"]
        logits = symbols.check(forward(tokens), tokens, count)
        inside = symbols.inside(tokens, info.padding)
        if follows:
            targets = torch.cat([tokens[:, 1:], batch["y"][:, None]], 1)
            return logits, targets, inside
        return logits[:, :-1], tokens[:, 1:], inside[:, 1:]

    def losses(forward: Forward, batch: Batch) -> Tensor:
        return symbols.losses(*pieces(forward, batch))

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        return {"token_accuracy": symbols.accuracy(*pieces(forward, batch))}

    build = builder(model or "gpt", info, count, "causal")
    return Task(build, losses, metrics, unit="record of text", derived=symbols.perplexity)
