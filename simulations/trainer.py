"""Trains chunks of clients on the data of one federation, in whichever process it lives."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from umbel.client import batches, optimizers, own
from umbel.client.private import Clip, schedule
from umbel.client.training import fill
from umbel.core import randomness
from umbel.core.payloads import States, TrainPlan, Updates
from umbel.core.trees import Model, Tree, to_device, unflatten
from umbel.datasets.federated import Arrays, rows
from umbel.privacy import participation
from umbel.simulations import chunks, together
from umbel.simulations.kernels.around import Around
from umbel.simulations.kernels.kernel import Chunk, Kernel, Subject, Trained
from umbel.simulations.kernels.private import Bound, Private, PrivateChunk
from umbel.simulations.residents import Residents
from umbel.tasks.build import model_of
from umbel.tasks.evaluate import evaluate, tensor_of


class _Lot(NamedTuple):
    """What the clients of a chunk train on, those with most steps first.

    Args:
        places: of the clients among the names of the data.
        columns: name -> (R, …), the examples.
        rows: of ``columns``, of one client after another.
        offsets: (C,), where each client begins in ``rows``.
        sizes: (C,), how many each has.
        kept: what each keeps of them, ``letter/name`` -> tensor; empty where nothing is.
    """

    places: chunks.Places
    columns: dict[str, Tensor]
    rows: npt.NDArray[np.integer[Any]]
    offsets: chunks.Places
    sizes: chunks.Places
    kept: Sequence[Tree] = ()


class Trainer:
    """Where chunks are put together and trained.

    The updates of a chunk are a function of (round, places, model), of what its clients kept from
    earlier rounds, and of the kernel.

    Args:
        residents: the clients.
        memory: bytes; where the data take less than half of it, they stay on the device.
    """

    def __init__(self, residents: Residents, memory: int) -> None:
        self._residents = residents
        self._runtime = residents.runtime
        self.module = self._runtime.module()
        model = model_of(self.module)
        # A module may rebind a buffer as it runs; who has none is looked through once.
        self._model = None if model.buffers else model
        self._names = [n for n, p in self.module.named_parameters() if p.requires_grad]
        self.columns = {n: tensor_of(c) for n, c in residents.data.train.items()}
        device = self._runtime.device
        held = sum(c.nbytes for c in self.columns.values())
        if device.type != "cpu" and held <= memory // 2:
            self.columns = to_device(self.columns, device)

    def _own(self) -> Model:
        """The tensors of the module."""
        return self._model or model_of(self.module)

    def subject(self, draws: bool, shared: Tree) -> Subject:
        """What kernels are made for; ``shared`` is what the strategy broadcasts besides."""
        return Subject(self._runtime, self.module, draws, unflatten(shared))

    def examples(self, place: int, most: int) -> dict[str, Tensor]:
        """The first examples of a client, or its first batch where that is fixed; on the device."""
        data, task = self._residents.data, self._runtime.task
        if task.collect is not None:
            made = self._made(self.module, 1, place)
            return {n: tensor_of(c[:most]).to(self._runtime.device) for n, c in made.items()}
        held = data.train_holdings.of_client(place)
        if task.episodes is None:
            held = held[:most]
        else:
            labels, name = data.train["y"][held], data.names[place]
            held = held[batches.episodic(0, 0, name, labels, task.episodes, None, 1)[0]]
        index = torch.from_numpy(held.astype(np.int64))
        return {
            name: column[index.to(column.device)].to(self._runtime.device)
            for name, column in self.columns.items()
        }

    def growth(self, place: int) -> int:
        """How many examples the client trains on in a round for each that it holds, rounded up."""
        if self._runtime.task.collect is None:
            return 1
        made = rows(self._made(self.module, 1, place))
        return -(-made // int(self._residents.data.train_holdings.sizes()[place]))

    def chunk(
        self,
        round_number: int,
        places: chunks.Places,
        draws: bool,
        shared: Tree,
        states: States | None,
        head: int | None = None,
    ) -> Chunk:
        """The work of one round for some clients, those with most steps first.

        Args:
            round_number: 1 … rounds.
            places: of the clients among the names of the data.
            draws: whether the model draws random numbers in training.
            shared: what the strategy broadcasts besides the model, ``letter/name`` -> (*shape).
            states: where clients keep what they keep; ``None``: they have just begun.
            head: only so many steps.
        """
        lot = self._lot(round_number, places, states)
        return self._work(round_number, lot, draws, shared, states, head)

    def _made(
        self, module: nn.Module, round_number: int, place: int, kept: Tree | None = None
    ) -> Arrays:
        """What a client trains on, where its task makes that; with its model in ``module``."""
        data = self._residents.data
        held = data.train_part(place)
        return self._runtime.made(module, round_number, data.names[place], held, kept)

    def _lot(self, round_number: int, places: chunks.Places, states: States | None) -> _Lot:
        data, runtime = self._residents.data, self._runtime
        if runtime.task.collect is None:
            offsets, index = data.train_holdings.offsets, data.train_holdings.index
            return _Lot(places, self.columns, index, offsets[places], _size(offsets, places))
        found = []
        for place in places.tolist():
            client, module, kept = data.names[place], self.module, None
            if states is not None and own.keeps(runtime.rule, runtime.task):
                kept = states.get(round_number, [client])[0]
            if runtime.at_home:  # it is the client's own model that makes them
                module = copy.deepcopy(module)
                runtime.own(module, client, kept)
            found.append(self._made(module, round_number, place, kept))
        sizes = np.array([rows(made) for made in found])
        order = np.argsort(-sizes, kind="stable")
        columns = {
            name: tensor_of(np.concatenate([found[i][name] for i in order])).to(runtime.device)
            for name in found[0]
        }
        ends = np.cumsum(sizes[order])
        keeps = [own.left_over(runtime.task, found[i]) for i in order]
        begins, sizes = ends - sizes[order], sizes[order]
        return _Lot(places[order], columns, np.arange(ends[-1]), begins, sizes, keeps)

    def _work(
        self,
        round_number: int,
        lot: _Lot,
        draws: bool,
        shared: Tree,
        states: States | None,
        head: int | None = None,
    ) -> Chunk:
        run, device, data = self._runtime.run, self._runtime.device, self._residents.data
        places = lot.places
        clients = [data.names[place] for place in places.tolist()]
        holdings = data.train_holdings
        length, episodes = run.round_length, self._runtime.task.episodes
        if episodes is None:
            size = run.client.batch_size
            padded = batches.schedules(
                run.run.seed, round_number, clients, lot.sizes, size, *length
            )
        else:
            labels = [data.train["y"][holdings.of_client(place)] for place in places.tolist()]
            padded = batches.stacked(
                [
                    batches.episodic(run.run.seed, round_number, client, y, episodes, *length)
                    for client, y in zip(clients, labels, strict=True)
                ]
            )
        padded = batches.Padded(padded.rows[:head], padded.counts[:head])
        pooled = lot.rows[padded.rows + lot.offsets[:, None]].astype(np.int64)
        columns, at_device = _there(lot.columns, pooled, device)
        seeds = self._seeds(round_number, clients) if draws else None
        work = Chunk.of(columns, batches.Padded(at_device, padded.counts), device, seeds)
        steps = (work.counts > 0).sum(0)
        return work._replace(around=self._around(round_number, clients, shared, states, steps))

    def train(
        self,
        kernel: Kernel | Private,
        plan: TrainPlan,
        places: chunks.Places,
        draws: bool,
        bound: Bound,
    ) -> Updates:
        """Trains some clients together; by DP-SGD without metrics, which would be a release.

        Args:
            kernel: trains them.
            plan: of the round.
            places: of the clients among the names of the data, those with most steps first.
            draws: whether the model draws random numbers in training.
            bound: of one computation of a private kernel; the others take all.
        """
        runtime, data, model = self._runtime, self._residents.data, plan.model
        fill(self._own(), model, runtime.at_home)
        lot = self._lot(plan.round, places, plan.states)
        if kernel.even and runtime.task.collect is not None and len(set(lot.sizes.tolist())) > 1:
            raise ValueError("clients made examples of different numbers")
        places = lot.places
        lr = optimizers.learning_rate(runtime.run.client, plan.round, runtime.run.run.rounds)
        train: Callable[[Tree], Trained]
        about = plan.round, lot, draws, plan.shared, plan.states
        if isinstance(kernel, Private):
            private = self._private_work(*about, bound)
            train, around, counts = (
                partial(kernel.train, chunk=private, lr=lr),
                private.around,
                torch.zeros(0),
            )
        else:
            work = self._work(*about)
            train, around, counts = (
                partial(kernel.train, chunk=work, lr=lr),
                work.around,
                work.counts,
            )
        sizes = _size(data.train_holdings.offsets, places)
        clients = [data.names[place] for place in places.tolist()]
        if around is None:
            tensors, totals = train(to_device(model.params, runtime.device))
            delta = _delta(model, tensors, len(places))
            self._keep(plan, clients, lot)
        else:
            tensors, totals = train(around.anchor)
            examples = torch.from_numpy(sizes).to(runtime.device, torch.float32)
            assert around.steps is not None
            taken = own.Taken(around.steps, examples, self._losses(around, places))
            closed = together.closed(runtime, around, tensors, taken, lr)
            self._keep(plan, clients, lot, closed)
            # What is sent besides may be the very tensors that were trained.
            moved = _delta(model, {n: t.clone() for n, t in tensors.items()}, len(places))
            besides = {**closed.delta, **closed.uploads}
            home = next(iter(model.tensors().values())).device
            delta = {**moved, **to_device(besides, home)}
        seen = counts.sum(0).cpu()
        return Updates(
            plan.round,
            clients,
            delta,
            torch.from_numpy(sizes.astype(np.float64)),
            {name: total.cpu().double() / seen for name, total in totals.items()},
        )

    def _keep(
        self,
        plan: TrainPlan,
        clients: Sequence[str],
        lot: _Lot,
        closed: together.Closed | None = None,
    ) -> None:
        """Puts down what the clients of a chunk keep: of the rule, and of the task's examples."""
        kept = {} if closed is None else closed.kept
        if plan.states is None or not (kept or any(lot.kept)):
            return
        found = {}
        for i, client in enumerate(clients):
            examples = lot.kept[i] if lot.kept else {}
            if (closed is None or closed.whole[i]) and own.is_finite(examples):
                found[client] = {**{n: t[i] for n, t in kept.items()}, **examples}
        plan.states.put(plan.round, found)

    def private_chunk(
        self,
        round_number: int,
        places: chunks.Places,
        draws: bool,
        shared: Tree,
        states: States | None,
        bound: Bound,
        head: int | None = None,
    ) -> PrivateChunk:
        """:meth:`chunk` for DP-SGD.

        Args:
            round_number: 1 … rounds.
            places: of the clients among the names of the data.
            draws: whether the model draws random numbers in training.
            shared: what the strategy broadcasts besides the model, ``letter/name`` -> (*shape).
            states: where clients keep what they keep; ``None``: they have just begun.
            bound: of one computation.
            head: only so many steps.
        """
        lot = self._lot(round_number, places, states)
        return self._private_work(round_number, lot, draws, shared, states, bound, head)

    def _private_work(
        self,
        round_number: int,
        lot: _Lot,
        draws: bool,
        shared: Tree,
        states: States | None,
        bound: Bound,
        head: int | None = None,
    ) -> PrivateChunk:
        runtime = self._runtime
        run, device, sizes = runtime.run, runtime.device, lot.sizes.tolist()
        clients = [self._residents.data.names[place] for place in lot.places.tolist()]
        plans = [participation.plan(run, n) for n in sizes]
        clips = [
            Clip(run.privacy, self._names, n / p.parts) for n, p in zip(sizes, plans, strict=True)
        ]
        sources = [runtime.sources(round_number, client) for client in clients]
        steps = max(p.steps for p in plans) if head is None else head
        counts = np.zeros((steps, len(clients)), np.int64)
        drawn = np.zeros((steps, len(clients)))
        dealt: dict[tuple[int, int], chunks.Places] = {}
        for at, (own_plan, clip) in enumerate(zip(plans, clips, strict=True)):
            taken = schedule(own_plan, sizes[at], clip, sources[at])
            for step, (batch, noise) in enumerate(itertools.islice(taken, head)):
                dealt[step, at] = lot.rows[batch + lot.offsets[at]].astype(np.int64)
                counts[step, at], drawn[step, at] = len(batch), noise
        pooled = np.zeros((steps, len(clients), int(counts.max(initial=0))), np.int64)
        for (step, at), batch in dealt.items():
            # Padding repeats an example of the same batch; an empty one is computed nowhere.
            pooled[step, at] = batch[0] if len(batch) else 0
            pooled[step, at, : len(batch)] = batch
        columns, at_device = _there(lot.columns, pooled, device)
        active = [sum(p.steps > step for p in plans) for step in range(steps)]
        work = PrivateChunk(
            columns,
            torch.from_numpy(at_device).to(device),
            counts,
            active,
            drawn,
            sources,
            clips,
            bound,
            self._seeds(round_number, clients) if draws else None,
        )
        lengths = torch.tensor([p.steps for p in plans])
        return work._replace(around=self._around(round_number, clients, shared, states, lengths))

    def _seeds(self, round_number: int, clients: Sequence[str]) -> list[int]:
        seed = self._runtime.run.run.seed
        return [randomness.torch_seed(seed, "dropout", round_number, c) for c in clients]

    def _around(
        self,
        round_number: int,
        clients: Sequence[str],
        shared: Tree,
        states: States | None,
        steps: Tensor,
    ) -> Around | None:
        """What the rule reads of clients that take so many ``steps`` each, if it reads any."""
        if not together.needed(self._runtime.rule, shared):
            return None
        kept: list[dict[str, Tensor] | None] = [None] * len(clients)
        if states is not None and self._runtime.rule.keeps:
            kept = states.get(round_number, clients)
        return together.opened(self._runtime, self._own(), shared, clients, kept, steps)

    def _losses(self, around: Around, places: chunks.Places) -> Tensor:
        """The global model's mean loss over each client's examples, where the rule asks; (C,)."""
        runtime = self._runtime
        if not runtime.rule.initial_loss:
            return torch.zeros(len(places), device=runtime.device)
        module = copy.deepcopy(self.module)
        mine = around.own.get(own.PRIVATE, {})
        found = []
        with torch.no_grad():
            for row, place in enumerate(places.tolist()):
                for name, tensor in model_of(module).tensors().items():
                    if name in mine:
                        tensor.copy_(mine[name][row])
                examples = self._residents.data.train_part(place)
                scores = evaluate(runtime.task, module, examples, device=runtime.device)[1]
                found.append(scores["loss"])
        return torch.tensor(found, dtype=torch.float32, device=runtime.device)


def _there(
    columns: Tree, pooled: chunks.Places, device: torch.device
) -> tuple[Tree, chunks.Places]:
    """Columns on the device, and the rows of them that ``pooled`` were."""
    if all(c.device.type == device.type for c in columns.values()):
        return columns, pooled
    # All data did not fit there: only the rows of this chunk go, each once.
    held, inverse = np.unique(pooled, return_inverse=True)
    there = {n: c[torch.from_numpy(held)].to(device) for n, c in columns.items()}
    return there, inverse.reshape(pooled.shape)


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
