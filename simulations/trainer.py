"""Trains chunks of clients on the data of one federation, in whichever process it lives."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from umbel.client import batches, optimizers
from umbel.client.training import load
from umbel.core import randomness
from umbel.core.payloads import Updates
from umbel.core.trees import Model, to_device
from umbel.simulations import chunks
from umbel.simulations.kernels.kernel import Chunk, Kernel, Subject
from umbel.simulations.residents import Residents
from umbel.tasks.evaluate import tensor_of


class Trainer:
    """Where chunks are put together and trained.

    The updates of a chunk are a function of (round, places, model) and of the kernel: of nothing
    that was trained before.

    Args:
        residents: the clients.
        memory: bytes; where the data take less than half of it, they stay on the device.
    """

    def __init__(self, residents: Residents, memory: int) -> None:
        self._residents = residents
        self._runtime = residents.runtime
        self.module = self._runtime.module()
        self.columns = {n: tensor_of(c) for n, c in residents.data.train.items()}
        device = self._runtime.device
        held = sum(c.nbytes for c in self.columns.values())
        if device.type != "cpu" and held <= memory // 2:
            self.columns = to_device(self.columns, device)

    def subject(self, draws: bool) -> Subject:
        """What kernels are made for."""
        return Subject(self._runtime, self.module, draws)

    def examples(self, place: int, most: int) -> dict[str, Tensor]:
        """The first examples of a client, on the device."""
        rows = self._residents.data.train_holdings.of_client(place)[:most]
        index = torch.from_numpy(rows.astype(np.int64))
        return {
            name: column[index.to(column.device)].to(self._runtime.device)
            for name, column in self.columns.items()
        }

    def chunk(
        self, round_number: int, places: chunks.Places, draws: bool, head: int | None = None
    ) -> Chunk:
        """The work of one round for some clients, those with most steps first.

        Args:
            round_number: 1 … rounds.
            places: of the clients among the names of the data.
            draws: whether the model draws random numbers in training.
            head: only so many steps.
        """
        run, device, data = self._runtime.run, self._runtime.device, self._residents.data
        clients = [data.names[place] for place in places.tolist()]
        holdings = data.train_holdings
        padded = batches.schedules(
            run.run.seed,
            round_number,
            clients,
            _size(holdings.offsets, places),
            run.client.batch_size,
            *run.round_length,
        )
        padded = batches.Padded(padded.rows[:head], padded.counts[:head])
        columns = self.columns
        offsets = holdings.offsets[places]
        pooled = holdings.index[padded.rows + offsets[:, None]].astype(np.int64)
        if any(c.device.type != device.type for c in columns.values()):
            # All data did not fit there: only the rows of this chunk go, each once.
            held, inverse = np.unique(pooled, return_inverse=True)
            pooled = inverse.reshape(pooled.shape)
            columns = {n: c[torch.from_numpy(held)].to(device) for n, c in columns.items()}
        seeds = None
        if draws:
            seed = run.run.seed
            seeds = [randomness.torch_seed(seed, "dropout", round_number, c) for c in clients]
        return Chunk.of(columns, batches.Padded(pooled, padded.counts), device, seeds)

    def train(
        self, kernel: Kernel, round_number: int, places: chunks.Places, model: Model, draws: bool
    ) -> Updates:
        """Trains some clients in one computation.

        Args:
            kernel: trains them.
            round_number: 1 … rounds.
            places: of the clients among the names of the data, those with most steps first.
            model: the global model.
            draws: whether the model draws random numbers in training.
        """
        run, device, data = self._runtime.run, self._runtime.device, self._residents.data
        load(self.module, model)
        work = self.chunk(round_number, places, draws)
        lr = optimizers.learning_rate(run.client, round_number, run.run.rounds)
        anchor = to_device(model.params, device)
        tensors, totals = kernel.train(anchor, work, lr)
        seen = work.counts.sum(0).cpu()
        return Updates(
            round_number,
            [data.names[place] for place in places.tolist()],
            _delta(model, tensors, len(places)),
            torch.from_numpy(_size(data.train_holdings.offsets, places).astype(np.float64)),
            {name: total.cpu().double() / seen for name, total in totals.items()},
        )


def _size(offsets: chunks.Places, places: chunks.Places) -> chunks.Places:
    """How many examples each client holds, without a look at the others."""
    return offsets[places + 1] - offsets[places]


def _delta(model: Model, tensors: dict[str, Tensor], clients: int) -> dict[str, Tensor]:
    """Local minus global, on the device of ``model``; takes the memory of ``tensors``."""
    delta: dict[str, Tensor] = {}
    for name, given in model.tensors().items():
        if name not in tensors:  # a buffer that training leaves as it is
            delta[name] = torch.zeros_like(given).expand(clients, *given.shape)
            continue
        local = tensors[name].to(given.device).contiguous()
        delta[name] = local.logical_xor_(given) if given.dtype is torch.bool else local.sub_(given)
    return delta
