"""What passes between a server and the place where clients live, and how it is written down.

Tensors are written as safetensors and everything else as canonical JSON: nothing is ever pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
from torch import Tensor

from umbel.core.canonical import canonical_json as canonical_json
from umbel.core.errors import InputError
from umbel.core.trees import Model, Tree


class States(Protocol):
    """Where the clients of a run keep their own tensors; a version a round, on disk.

    A round that is repeated reads what it read the first time. It can be pickled.
    """

    def get(self, round_number: int, clients: Sequence[str]) -> list[dict[str, Tensor] | None]:
        """Each client's tensors as they were before the round; ``None`` before its first."""

    def put(self, round_number: int, states: Mapping[str, Tree]) -> None:
        """Keeps what clients have after the round, all or nothing: client -> name -> tensor."""

    def settle(self, round_number: int) -> None:
        """To be called before a round is committed: what was put so far outlasts a failure."""

    def rewind(self, round_number: int) -> None:
        """Drops what came after a round: the run goes on from there."""


class Folded(Protocol):
    """The updates of some clients as one; what it holds is its maker's business."""

    @property
    def participants(self) -> Sequence[str]:
        """The clients whose updates are in it."""


@dataclass(frozen=True)
class TrainPlan:
    """One round of training, for the federation that will carry it out.

    Args:
        round: 1 … rounds.
        clients: whom to ask. In-process federations answer in this order.
        model: the global model at the start of the round.
        wanted: how many valid updates are enough. ``clients`` past that are reserves
            (over-selection): in-process federations reach them only when earlier ones failed.
        deadline: seconds after which late clients are failures; ``None`` waits. Clients in process
            are never late.
        fold: (the plan for some of the clients, what they deliver) -> one item for the stream in
            their place, gated and summed. A federation that computes in several processes folds
            where updates are made, in parts that depend on the plan alone; others need not. It can
            be pickled. ``None``: whoever asks needs every update.
        shared: what clients are sent besides the model, ``letter/name`` -> (*shape).
        uploads: zeros such as they send besides their deltas, ``letter/name`` -> (*shape).
        run_id: of the run, under which clients keep their own tensors.
        states: where clients in process keep them; never sent. ``None``: for as long as they live.
    """

    round: int
    clients: Sequence[str]
    model: Model
    wanted: int
    deadline: float | None = None
    fold: Callable[[TrainPlan, Iterator[Updates | Failure]], Folded] | None = None
    shared: Tree = field(default_factory=dict)
    uploads: Tree = field(default_factory=dict)
    run_id: str = ""
    states: States | None = None

    def expected(self) -> dict[str, Tensor]:
        """Tensors of the names, shapes and dtypes that an update's delta has."""
        return {**self.model.tensors(), **self.uploads}

    def part(self, clients: Sequence[str]) -> TrainPlan:
        """The same for some of the clients, all of whom are wanted."""
        return replace(self, clients=clients, wanted=len(clients))


@dataclass(frozen=True)
class Updates:
    """The updates of one or more clients, stacked along the first axis.

    Args:
        round: the round that they answer.
        clients: C names.
        delta: name -> (C, *shape): local minus global, for parameters and buffers; and what clients
            send besides, under ``letter/name``.
        weights: (C,) float64: the number of examples each was trained on.
        metrics: name -> (C,) float64: means over the client's training examples.
    """

    round: int
    clients: Sequence[str]
    delta: Tree
    weights: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def take(self, rows: Sequence[int]) -> Updates:
        """The updates of these rows alone, in this order."""
        index = list(rows)
        return Updates(
            self.round,
            [self.clients[i] for i in index],
            {name: t[index] for name, t in self.delta.items()},
            self.weights[index],
            {name: t[index] for name, t in self.metrics.items()},
        )


@dataclass(frozen=True)
class Failure:
    """A client that did not deliver, by name and with the reason; never skipped in silence."""

    client: str
    reason: str


@dataclass(frozen=True)
class EvaluatePlan:
    """One evaluation of ``model`` on the clients' own test parts, after ``round``.

    ``run_id``, ``states`` and ``shared`` are those of :class:`TrainPlan`.
    """

    round: int
    clients: Sequence[str]
    model: Model
    deadline: float | None = None
    run_id: str = ""
    states: States | None = None
    shared: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """How the model did at one client: means over ``examples`` test examples."""

    client: str
    examples: int
    metrics: Mapping[str, float]


class Federation(Protocol):
    """Where clients live. The same strategy, task and seed give the same model on every one."""

    def clients(self) -> Sequence[str]:
        """The names of the clients, in lexicographic order."""

    def examples(self) -> Sequence[int] | npt.NDArray[np.int64]:
        """How many training examples each client declares, in the order of :meth:`clients`."""

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure | Folded]:
        """Trains the plan's clients; each is in exactly one item."""

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        """Evaluates at the plan's clients; those without a test part yield nothing."""

    def plan_record(self) -> Mapping[str, Any]:
        """How updates are computed, for the run's record; empty where nothing was chosen."""

    def close(self) -> None:
        """Ends workers and connections."""


def pack(tensors: Tree, metadata: Mapping[str, Any] | None = None) -> bytes:
    """Tensors and JSON metadata as one safetensors document."""
    meta = {"umbel": canonical_json(metadata)} if metadata is not None else None
    return safetensors.torch.save(
        {k: t.detach().contiguous().cpu() for k, t in tensors.items()}, meta
    )


def unpack(document: bytes, where: str = "payload") -> tuple[dict[str, Tensor], Any]:
    """The inverse of :func:`pack`.

    Raises:
        InputError: the document is not safetensors, or its metadata is not JSON.
    """
    try:
        tensors = safetensors.torch.load(document)
        header = json.loads(document[8 : 8 + int.from_bytes(document[:8], "little")])
        meta = header.get("__metadata__", {}).get("umbel")
        return tensors, None if meta is None else json.loads(meta)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"not a safetensors document: {error}", where=where, fix="is the file cut short?"
        ) from None
