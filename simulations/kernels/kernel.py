"""What every kernel is given, and what it gives back."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from umbel.client.batches import Padded
from umbel.client.training import ClientRuntime
from umbel.core.trees import Tree
from umbel.simulations.kernels.around import Around
from umbel.strategies.parts import Trees
from umbel.strategies.parts.rule import NONE
from umbel.tasks.task import Batch


class Obstacle(Exception):
    """Why a kernel cannot train a model; raised by its constructor."""


class Subject(NamedTuple):
    """What a kernel is made for.

    Args:
        runtime: the plain twin; a kernel trains as it does, with its run, task, rule and device.
        module: holds the frozen parameters and the buffers; the global model is loaded into it
            before each round, and no kernel changes it.
        draws: whether the model draws random numbers in training.
        shared: what the strategy broadcasts besides the model, for trials.
        compiled: whether a step is compiled.
    """

    runtime: ClientRuntime
    module: nn.Module
    draws: bool
    shared: Trees = NONE
    compiled: bool = False


class Chunk(NamedTuple):
    """The work of C clients, those with most steps first.

    Args:
        columns: name -> (R, …): the examples, those of others too where that saves a copy.
        rows: (steps, C, B) int64: rows of ``columns``.
        counts: (steps, C) int64: how many of the B are the client's batch; 0 past its last step.
        active: how many clients take each step: the first so many.
        widths: the largest batch of each step.
        full: whether all batches of a step have that size.
        seeds: of torch's generator, a client each, where the model draws random numbers.
        around: what the rule's parts may read, where that is more than the global parameters.
    """

    columns: Batch
    rows: Tensor
    counts: Tensor
    active: list[int]
    widths: list[int]
    full: list[bool]
    seeds: list[int] | None = None
    around: Around | None = None

    @classmethod
    def of(
        cls,
        columns: Batch,
        padded: Padded,
        device: torch.device,
        seeds: list[int] | None = None,
    ) -> Chunk:
        """From the schedules of clients whose ``rows`` are already into ``columns``."""
        active = (padded.counts > 0).sum(1)
        widths = padded.counts.max(1)
        # Batches that are still to come are 0, hence the sum and not the minimum.
        full = padded.counts.sum(1) == active * widths
        return cls(
            columns,
            torch.from_numpy(padded.rows).to(device),
            torch.from_numpy(padded.counts).to(device),
            active.tolist(),
            widths.tolist(),
            full.tolist(),
            seeds,
        )

    def clients(self) -> int:
        """How many clients there are."""
        return self.counts.shape[1]

    def batch(self, step: int) -> dict[str, Tensor]:
        """The examples of one step, of the clients that take it: name -> (n, B, …)."""
        at = self.rows[step, : self.active[step], : self.widths[step]]
        return {
            name: column.index_select(0, at.reshape(-1)).view(*at.shape, *column.shape[1:])
            for name, column in self.columns.items()
        }


class Trained(NamedTuple):
    """The result of a chunk.

    Args:
        tensors: name -> (C, *shape): the local parameters, what is trained along with them, and the
            buffers if training may change them.
        totals: name -> (C,): the sums of the figures over all examples seen.
    """

    tensors: dict[str, Tensor]
    totals: Tree


class Kernel(Protocol):
    """Trains chunks. The result for a client depends on its chunk within float tolerance only."""

    @property
    def even(self) -> bool:
        """Whether it takes only chunks whose batches are all of one size in each step."""

    def train(self, anchor: Tree, chunk: Chunk, lr: float) -> Trained:
        """Trains the clients of ``chunk`` from the global parameters ``anchor``."""
