"""Rewards: what a completion is worth; verified from the record, or by a model of preferences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from umbel.core import registry
from umbel.core.errors import InputError, suggest

Reward: TypeAlias = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(completions (R, length) without the end symbol, padded; how many symbols each has, (R,); the
columns of their records, name -> (R, …)) -> (R,), best between 0 and 1."""

JUDGED = "judged"
"""The column of a record that holds what a reward model gives."""

PADDING = -1
"""What fills up completions and answers for rewards: no symbol is."""


def share(completions: Tensor, lengths: Tensor, record: Mapping[str, Tensor]) -> Tensor:
    """The share of the answer's symbols that stand in their places."""
    answer, counted = _answer(record)
    right = (_fitted(completions, answer.shape[1]) == answer) & counted
    return right.sum(1) / counted.sum(1).clamp(min=1)


def exact(completions: Tensor, lengths: Tensor, record: Mapping[str, Tensor]) -> Tensor:
    """1 where the completion is the answer and nothing else, 0 elsewhere."""
    answer, counted = _answer(record)
    same = (_fitted(completions, answer.shape[1]) == answer).all(1)
    return (same & (lengths == counted.sum(1))).float()


def learned(completions: Tensor, lengths: Tensor, record: Mapping[str, Tensor]) -> Tensor:
    """What a reward model gives for prompt and completion."""
    if JUDGED not in record:
        raise InputError(
            "there is no reward model",
            where="[task] judge_from",
            fix="name the run of kind 'reward' that trained it",
        )
    return record[JUDGED]


REWARDS: Mapping[str, Reward] = {"share": share, "exact": exact, "learned": learned}


def find(name: str) -> Reward:
    """The reward of this name, or the user's own, ``module:object``.

    Raises:
        InputError: there is none.
    """
    if ":" in name:
        return registry.find("rewards", name, "[task] reward")
    if name not in REWARDS:
        raise InputError(
            f"unknown reward '{name}'",
            where="[task] reward",
            fix=f"{suggest(name, REWARDS)}; or 'package.module:object' for your own",
        )
    return REWARDS[name]


def _answer(record: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if "answer" not in record:
        raise InputError(
            "the data hold no column 'answer' to verify completions by",
            where="[task] reward",
            fix='[data] name = "prompts", or a reward of your own',
        )
    answer = record["answer"]
    return answer, answer != PADDING


def _fitted(completions: Tensor, width: int) -> Tensor:
    missing = width - completions.shape[1]
    return torch.nn.functional.pad(completions, (0, max(missing, 0)), value=PADDING)[:, :width]
