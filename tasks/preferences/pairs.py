"""Batches of pairs: ``x`` (B, T) is what was chosen, ``rejected`` (B, T) what was not.

Both begin with the same prompt of ``prompt`` (B,) symbols. A language model can be trained on such
data as they are: on what was chosen.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from umbel.core.errors import InputError
from umbel.datasets.federated import Info
from umbel.tasks.language import symbols
from umbel.tasks.preferences.losses import log_probs
from umbel.tasks.task import Batch, Forward

UNIT = "pair of completions"

Smoothing: TypeAlias = Annotated[float, Ge(0), Lt(0.5)]
"""Share of preferences that are taken for flipped."""


def sides(batch: Batch) -> tuple[Tensor, Tensor]:
    """What was chosen and what was rejected, as the batch holds them.

    Raises:
        InputError: the data hold no pairs.
    """
    if "rejected" not in batch:
        raise InputError(
            "the data hold no pairs: there is no column 'rejected'",
            where="[data] name",
            fix="'preferences' for your own, or 'synthetic-preferences'",
        )
    return batch["x"], batch["rejected"]


def ratio(forward: Forward, batch: Batch, info: Info, *, reference: bool = False) -> Tensor:
    """(B,): log p of what was chosen minus that of what was rejected, given the prompt.

    Args:
        forward: the policy.
        batch: pairs.
        info: of the data.
        reference: whether both are seen relative to the reference.
    """
    found = [_log_prob(forward(tokens), tokens, batch, info) for tokens in sides(batch)]
    if reference:
        found = [
            mine - _log_prob(forward(tokens, reference=True), tokens, batch, info)
            for mine, tokens in zip(found, sides(batch), strict=True)
        ]
    return found[0] - found[1]


def _log_prob(logits: Tensor, tokens: Tensor, batch: Batch, info: Info) -> Tensor:
    """(B,): the sum over the symbols behind the prompt, without padding."""
    assert info.vocabulary is not None
    each = log_probs(symbols.check(logits, tokens, info.vocabulary), tokens)
    place = torch.arange(1, tokens.shape[1], device=tokens.device)
    counted = (place >= batch["prompt"][:, None]) & symbols.inside(tokens[:, 1:], info.padding)
    return (each * counted).sum(1)
