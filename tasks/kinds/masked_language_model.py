"""Masked language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from umbel.core.run_file import Part
from umbel.core.settings import Natural, Share
from umbel.datasets.federated import Info
from umbel.tasks.language import symbols
from umbel.tasks.language.hidden import hide, uniform
from umbel.tasks.models.build import builder
from umbel.tasks.task import Batch, Forward, Task


def masked_language_model(
    info: Info, model: Part | str | None, *, share: Share = 0.15, mask: Natural | None = None
) -> Task:
    """Hidden symbols of a text, from all others: cross-entropy, perplexity, accuracy.

    Which symbols of a record are hidden follows from the record alone, as in BERT's own training,
    and so does its loss: the mean over its hidden symbols, one at least, in nats.

    Args:
        info: of the data; ``x`` is symbols.
        model: takes symbols (B, T), gives (B, T, symbols); ``None``: ``gpt``, which sees both ways.
        share: of the symbols that are hidden.
        mask: the symbol that stands for hidden ones; ``None``: the tokenizer's, or one more than
            the data have.

    Source: Devlin et al. 2019, section 3.1 (arXiv:1810.04805).
    """
    count = symbols.vocabulary(info, "masked-language-model")
    stand_in = mask if mask is not None else count if info.mask is None else info.mask

    def pieces(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        tokens = batch["x"]
        draw = torch.where(symbols.inside(tokens, info.padding), uniform(tokens, 1), 2.0)
        chosen = (draw < share) | (draw == draw.amin(-1, keepdim=True))
        logits = forward(hide(tokens, chosen, stand_in, count))
        return symbols.check(logits, tokens, wide.vocabulary or count), tokens, chosen

    def losses(forward: Forward, batch: Batch) -> Tensor:
        return symbols.losses(*pieces(forward, batch))

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        return {"token_accuracy": symbols.accuracy(*pieces(forward, batch))}

    wide = replace(info, vocabulary=max(count, stand_in + 1))
    build = builder(model or "gpt", wide, wide.vocabulary or count, "masked")
    return Task(build, losses, metrics, unit="record of text", derived=symbols.perplexity)
