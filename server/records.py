"""What a round leaves behind: the record that stores, displays and plots consume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from umbel.core.payloads import Failure
from umbel.core.trees import Model
from umbel.strategies.parts import ServerState


class Scores(NamedTuple):
    """One evaluation of a model.

    Args:
        metrics: on the global test set, or on the union of the clients' test parts.
        per_client: each client's own, where asked for.
        failures: clients that were asked and did not answer.
    """

    metrics: Mapping[str, float]
    per_client: Mapping[str, Mapping[str, float]]
    failures: Sequence[Failure] = ()


@dataclass(frozen=True)
class RoundRecord:
    """One round, as it is stored, shown and plotted.

    Args:
        round: 1 … rounds.
        seconds: wall time of the round, evaluation included.
        participants: the clients whose updates were combined.
        failures: the clients whose were not, each with the reason.
        capped: participants whose weight was lowered to the cap.
        training: means of the clients' training metrics, weighted as their updates were.
        metrics: of the new global model; empty where the round was not evaluated.
        per_client: each client's own metrics; empty where not evaluated.
        note: anything out of the ordinary, such as a missed quorum.
        epsilon: spent so far, where the run has a privacy budget.
        virtual_time: of an asynchronous run's clock, in units of the usual client's time.
        staleness: of an asynchronous run's participants, in their order: server steps since each
            was given its model.
    """

    round: int
    seconds: float
    participants: Sequence[str]
    failures: Sequence[Failure] = ()
    capped: Sequence[str] = ()
    training: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    per_client: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    note: str = ""
    epsilon: float | None = None
    virtual_time: float | None = None
    staleness: Sequence[int] = ()

    def as_json(self) -> dict[str, Any]:
        """The record as plain values; what is empty or absent and optional is left out."""
        table: dict[str, Any] = {
            "round": self.round,
            "seconds": round(self.seconds, 6),
            "participants": list(self.participants),
            "failures": [{"client": f.client, "reason": f.reason} for f in self.failures],
            "training": dict(self.training),
            "metrics": dict(self.metrics),
        }
        optional = {
            "capped": list(self.capped),
            "per_client": {c: dict(m) for c, m in self.per_client.items()},
            "note": self.note,
            "staleness": list(self.staleness),
        }
        table.update({name: value for name, value in optional.items() if value})
        if self.epsilon is not None:
            table["epsilon"] = self.epsilon
        if self.virtual_time is not None:
            table["virtual_time"] = self.virtual_time
        return table

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> RoundRecord:
        """The inverse of :meth:`as_json`."""
        failures = [Failure(f["client"], f["reason"]) for f in table["failures"]]
        return cls(**{**table, "failures": failures})


class RoundResult(NamedTuple):
    """A finished round: its record, and the state from which the next one starts."""

    record: RoundRecord
    model: Model
    state: ServerState
