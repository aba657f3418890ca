"""Ends a run whose metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from umbel.core.errors import InputError, suggest
from umbel.core.run_file import EarlyStopping
from umbel.server.records import RoundRecord

Until: TypeAlias = Callable[[RoundRecord], str]
"""Why a run ends after this round; empty where it goes on."""

LOWER_IS_BETTER = ("loss", "perplexity", "error")


def lower_is_better(metric: str) -> bool:
    """Whether a metric of that name falls as the model improves."""
    return metric.endswith(LOWER_IS_BETTER)


class Patience:
    """Counts evaluations since the best one; a function of the records alone.

    An evaluation without a number, such as a loss of NaN, is not an improvement.

    Args:
        section: ``[evaluate.early_stopping]``.

    Source: Prechelt 1998, "Early stopping – but when?", criterion UP, with a least improvement.
    """

    def __init__(self, section: EarlyStopping) -> None:
        self._section = section
        better = section.better
        lower = lower_is_better(section.metric) if better is None else better == "lower"
        self._sign = 1 if lower else -1
        self._best = math.inf
        self._best_round = 0
        self._since = 0

    def __call__(self, record: RoundRecord) -> str:
        """Takes a record in; says why the run ends after it, if it does.

        Raises:
            InputError: the metric is not among the record's.
        """
        section = self._section
        if not record.metrics:  # this round was not evaluated
            return ""
        if section.metric not in record.metrics:
            raise InputError(
                f"unknown metric '{section.metric}'",
                where="[evaluate.early_stopping]",
                fix=suggest(section.metric, record.metrics),
            )
        value = record.metrics[section.metric] * self._sign
        if value < self._best - section.min_delta:
            self._best, self._best_round, self._since = value, record.round, 0
        else:
            self._since += 1
        if self._since < section.patience:
            return ""
        best = (
            f"{self._sign * self._best:.6g} in round {self._best_round}"
            if self._best_round
            else "none"
        )
        return (
            f"stopped early: {section.metric} has not improved by more than {section.min_delta:g} "
            f"in {self._since} evaluation(s); the best is {best}"
        )
