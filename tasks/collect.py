"""Examples that a task makes anew each round, where the data live: from these and from the model.

Experience in an environment, answers to a prompt: what is trained on depends on the model that the
round began with. What a client holds is then only what they are made from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from umbel.core import randomness
from umbel.core.errors import InputError

Columns: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""As :data:`umbel.datasets.federated.Arrays`."""

NOTHING: Columns = MappingProxyType({})


class Moment(NamedTuple):
    """When examples are made, and what is still there of earlier ones.

    Args:
        seed: of all that is drawn for this round and client; 0 … 2**63-1.
        round: 1 … rounds.
        rounds: of the run.
        kept: what the client kept of the examples of its last round, as the task's ``keeps`` gave
            it; empty: nothing yet.
    """

    seed: int
    round: int
    rounds: int
    kept: Columns = NOTHING


Collect: TypeAlias = Callable[[nn.Module, Columns, Moment], Columns]
"""(the model that the client begins the round with, what the client holds, when) -> examples, one
or more, of the columns that the task's losses read. The module is in evaluation mode and not to be
changed; torch's generators start from the moment's seed."""


def collected(
    collect: Collect,
    module: nn.Module,
    held: Columns,
    seed: int,
    round_number: int,
    rounds: int,
    client: str,
    kept: Columns = NOTHING,
) -> Columns:
    """What a client trains on in a round; a function of the arguments alone.

    Args:
        collect: of the task.
        module: the model, on any device; in its own mode afterwards.
        held: what the client holds.
        seed: of the run.
        round_number: 1 … rounds.
        rounds: of the run.
        client: its name.
        kept: as in :class:`Moment`.

    Raises:
        InputError: nothing was made, or columns of different lengths.
    """
    own = randomness.torch_seed(seed, "collect", round_number, client)
    was_training = module.training
    module.eval()
    cards = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=cards):
            torch.manual_seed(own)
            made = collect(module, held, Moment(own, round_number, rounds, kept))
    finally:
        module.train(was_training)
    lengths = {name: len(column) for name, column in made.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise InputError(
            f"client '{client}', round {round_number}: the task made columns of lengths {lengths}",
            where="[task]",
            fix="make one example at least, with a value in each column",
        )
    return {name: np.ascontiguousarray(column) for name, column in made.items()}
