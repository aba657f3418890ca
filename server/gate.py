"""The update gate: nothing reaches a combiner that was not checked here.

One client's NaN, absurd weight or wrong shape must neither enter the model nor end the run: the
client is named with the reason, and the round goes on without it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umbel.core.payloads import Failure, Updates
from umbel.core.trees import Tree

# Where [strategy] max_weight is silent: no client weighs more than ten times the median client.
CAP_FACTOR = 10.0


class Passed(NamedTuple):
    """What came through.

    Args:
        updates: the valid ones, weights capped.
        failures: the others, each with the reason.
        capped: valid clients whose weight was lowered.
    """

    updates: Updates
    failures: Sequence[Failure]
    capped: Sequence[str]


def weight_cap(examples: Sequence[int] | npt.NDArray[np.int64], max_weight: float | None) -> float:
    """The most that one client may weigh, in examples.

    Args:
        examples: what each client of the federation declares.
        max_weight: the user's own cap, or ``None`` for ten times the median.
    """
    if max_weight is not None:
        return max_weight
    return CAP_FACTOR * float(np.median(np.asarray(examples))) if len(examples) else float("inf")


def weight_of_all(
    examples: Sequence[int] | npt.NDArray[np.int64], cap: float, weights: str
) -> float:
    """What all clients of a federation weigh together, in the units of ``weights``."""
    if weights == "uniform":
        return float(len(examples))
    return float(np.minimum(np.asarray(examples, np.float64), cap).sum())


class Gate:
    """Checks the updates of one round.

    Args:
        round_number: the round that updates must answer.
        asked: the clients that were asked.
        model: the global tensors: the names, shapes and dtypes that a delta must have.
        cap: the most that one client may weigh.
    """

    def __init__(self, round_number: int, asked: Collection[str], model: Tree, cap: float) -> None:
        self._round = round_number
        self._asked = frozenset(asked)
        self._seen: set[str] = set()
        self._model = model
        self._cap = cap

    def check(self, updates: Updates) -> Passed:
        """Splits ``updates`` into those that may be combined and those that may not."""
        reasons = self._identities(updates)
        if whole := self._structure(updates):
            reasons = [reason or whole for reason in reasons]
        else:
            for found in (self._finite(updates.delta), _weights(updates.weights)):
                reasons = [reason or other for reason, other in zip(reasons, found, strict=True)]
        kept, failures = updates, []
        if any(reasons):
            kept = _rows(updates, [row for row, reason in enumerate(reasons) if not reason])
            pairs = zip(updates.clients, reasons, strict=True)
            failures = [Failure(client, reason) for client, reason in pairs if reason]
        capped: list[str] = []
        if len(kept.clients) and bool((heavy := kept.weights > self._cap).any()):
            capped = [c for c, above in zip(kept.clients, heavy.tolist(), strict=True) if above]
            weights = kept.weights.clamp(max=self._cap)
            kept = Updates(kept.round, kept.clients, kept.delta, weights, kept.metrics)
        return Passed(kept, failures, capped)

    def _identities(self, updates: Updates) -> list[str]:
        """For each row, what is wrong with who sent it and when, or nothing."""
        names = set(updates.clients)
        if (
            updates.round == self._round
            and len(names) == len(updates.clients)
            and names <= self._asked
            and not names & self._seen
        ):
            self._seen |= names
            return [""] * len(names)
        return [self._identity(updates.round, client) for client in updates.clients]

    def _identity(self, round_number: int, client: str) -> str:
        if client not in self._asked:
            return "was not asked in this round"
        if round_number != self._round:
            return f"answers round {round_number}, this is round {self._round}"
        if client in self._seen:
            return "answered twice; the first answer stands"
        self._seen.add(client)
        return ""

    def _structure(self, updates: Updates) -> str:
        """What is wrong with the whole stack, if anything."""
        count = len(updates.clients)
        if updates.weights.shape != (count,):
            return f"{tuple(updates.weights.shape)} weights for {count} client(s)"
        if missing := sorted(self._model.keys() - updates.delta.keys()):
            return f"delta lacks '{missing[0]}'" + _more(missing)
        if unknown := sorted(updates.delta.keys() - self._model.keys()):
            return f"delta has unknown '{unknown[0]}'" + _more(unknown)
        for name, expected in self._model.items():
            found = updates.delta[name]
            if found.shape[:1] != (count,) or found.shape[1:] != expected.shape:
                return (
                    f"delta '{name}' has shape {tuple(found.shape[1:])}, "
                    f"expected {tuple(expected.shape)}; is it another version of the model?"
                )
            if found.dtype != expected.dtype:
                return f"delta '{name}' is {_name(found)}, expected {_name(expected)}"
        return ""

    def _finite(self, delta: Tree) -> list[str]:
        """For each row, what is not finite in it, or nothing."""
        reasons = [""] * len(next(iter(delta.values())))
        for name, tensor in delta.items():
            if not tensor.dtype.is_floating_point or _all_finite(tensor):
                continue
            rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
            for row in (~rows.isfinite().all(1)).nonzero()[:, 0].tolist():
                count = int((~rows[row].isfinite()).sum())
                reasons[row] = (
                    reasons[row] or f"delta '{name}' has {count} value(s) NaN or infinite"
                )
        return reasons


def _all_finite(tensor: Tensor) -> bool:
    # One pass without a mask in memory: a sum is finite unless a value is not, or it overflows,
    # and then the slow look decides.
    return bool(tensor.sum().isfinite())


def _weights(weights: Tensor) -> list[str]:
    """For each row, what is wrong with its weight, or nothing."""
    if bool((weights.isfinite() & (weights > 0)).all()):
        return [""] * len(weights)
    return [_weight(weight) for weight in weights.tolist()]


def _weight(weight: float) -> str:
    if not np.isfinite(weight):
        return f"weight {weight} is not finite"
    return "" if weight > 0 else f"weight {weight:g} is not positive"


def _rows(updates: Updates, rows: Sequence[int]) -> Updates:
    if not rows:  # malformed stacks cannot be indexed
        return Updates(updates.round, [], {}, torch.zeros(0, dtype=torch.float64))
    return updates.take(rows)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
