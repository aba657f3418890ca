"""Losses and figures of a record of text, as means over those of its symbols that count."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.datasets.federated import Info


def vocabulary(info: Info, kind: str) -> int:
    """How many symbols the data have.

    Raises:
        InputError: they are numbers, not symbols.
    """
    if info.vocabulary is None:
        raise InputError(
            f"{kind} needs text; data set '{info.name}' holds numbers",
            where="[task]",
            fix='[data] name = "text" for your own files, or "tinyshakespeare"',
        )
    return info.vocabulary


def mean(values: Tensor, counted: Tensor) -> Tensor:
    """(B, T) values -> (B,) means over the symbols that count; 0 where none does."""
    share = counted.to(values.dtype)
    return (values * share).sum(-1) / share.sum(-1).clamp(min=1)


def losses(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy in nats: (B, T, symbols), (B, T) and (B, T) -> (B,)."""
    each = F.cross_entropy(logits.transpose(-1, -2).float(), targets, reduction="none")
    return mean(each, counted)


def accuracy(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """The share of symbols guessed right: same shapes."""
    return mean((logits.argmax(-1) == targets).float(), counted)


def check(logits: Tensor, tokens: Tensor, symbols: int) -> Tensor:
    """``logits``, if there is one vector of ``symbols`` for each symbol of ``tokens``.

    Raises:
        InputError: there is not.
    """
    if logits.shape != (expected := (*tokens.shape, symbols)):
        raise InputError(
            f"the model gives shape {tuple(logits.shape)} for {len(tokens)} records of "
            f"{tokens.shape[-1]} symbols, expected {tuple(expected)}",
            where="[task.model]",
            fix="choose 'gpt' or 'transformers'; or give one output for each symbol",
        )
    return logits


def perplexity(means: Mapping[str, float]) -> Mapping[str, float]:
    """``exp(loss)``: of the mean over records of each record's mean over its symbols."""
    return {"perplexity": math.exp(min(means["loss"], 700.0))} if "loss" in means else {}


def inside(tokens: Tensor, padding: int | None) -> Tensor:
    """Which symbols are not padding, (B, T) bool."""
    return torch.ones_like(tokens, dtype=torch.bool) if padding is None else tokens != padding
