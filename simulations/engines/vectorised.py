"""Many clients in one computation, wherever the model allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from umbel.client import optimizers, own
from umbel.core.errors import UmbelError
from umbel.core.payloads import (
    EvaluatePlan,
    Evaluation,
    Failure,
    Federation,
    Folded,
    TrainPlan,
    Updates,
)
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, flatten, unflatten
from umbel.datasets.federated import FederatedData
from umbel.simulations import chunks, stacks, trial
from umbel.simulations.choose import STEPS, AnyKernel, choose
from umbel.simulations.dispatch import Dispatch, Dispatcher
from umbel.simulations.groups import Group, groups
from umbel.simulations.kernels.kernel import Obstacle
from umbel.simulations.kernels.private import Bound, Private
from umbel.simulations.plan import Choice, EnginePlan
from umbel.simulations.residents import Residents, reason
from umbel.simulations.trainer import Trainer
from umbel.simulations.workers import cores
from umbel.strategies.parts import ClientRule
from umbel.tasks.build import model_of
from umbel.tasks.task import Task

TRIAL = 32
"""Examples that the trial looks at, at most."""

LONG = 1e8
"""Examples times bytes of the model in a round, from which on no single chunk takes it all: on one
core some milliseconds of a perceptron, a tenth of a second of a small convolutional network."""

NARROW = 4
"""Clients of a chunk that is made smaller for the sake of other cores, at least."""


def vectorised(
    run: RunFile,
    data: FederatedData,
    task: Task,
    rule: ClientRule,
    announce: Callable[[str], None] = lambda message: None,
    memory: int | None = None,
    largest_chunk: int | None = None,
    plan: str | None = None,
    processes: int | None = None,
) -> Federation:
    """Many clients in one computation; the same model as sequential, to float tolerance.

    The kernel that trains them is found by a trial on the largest clients' data. A model of which
    only one can be trained at a time is announced once.

    Args:
        run: the run file.
        data: who holds what.
        task: what is learned.
        rule: what clients do besides.
        announce: told what a user should know.
        memory: bytes that the clients of one chunk may take; ``None``: a share of what is there.
        largest_chunk: the most clients in one computation; ``None``: as many as memory allows.
        plan: the kernel and its chunk, such as ``grouped:chunk=5``; ``None``: as ``[run]``. A run
            ends with the same bits only under the same plan.
        processes: worker processes, 0 for none; ``None``: ``[run] processes``. The result does not
            depend on it.

    Raises:
        InputError: the device or precision is not here, the model has nothing to train, or the plan
            is not one.
    """
    plan = plan or run.run.engine_plan
    pinned = None if plan is None else EnginePlan.parse(plan)
    count = run.run.processes if processes is None else processes
    residents = Residents(run, data, task, rule)
    return Vectorised(residents, announce, memory, largest_chunk, pinned, count)


class _Found(NamedTuple):
    """What the first round found out; no kernel: each client goes through the runtime.

    ``growth`` is how many examples are trained on for each that is held.
    """

    kernel: AnyKernel | None
    choice: Choice | None
    draws: bool
    footprint: chunks.Footprint
    growth: int = 1


class Vectorised:
    """A federation on this machine; clients are trained chunk by chunk, when they are asked for."""

    def __init__(
        self,
        residents: Residents,
        announce: Callable[[str], None],
        memory: int | None,
        largest_chunk: int | None,
        pinned: EnginePlan | None,
        processes: int | None,
        dispatch: Callable[[Vectorised], Dispatcher] | None = None,
        parts: int | None = None,
    ) -> None:
        self._residents = residents
        self._runtime = residents.runtime
        self._announce = announce
        self._memory = chunks.memory_bound(self._runtime.device) if memory is None else memory
        self._largest = largest_chunk
        self._pinned = pinned
        self._trainer = Trainer(residents, self._memory)
        self._found: _Found | None = None
        on_cpu = self._runtime.device.type == "cpu"
        self._parts = parts or (2 * cores() if on_cpu else 1)
        self._dispatch: Dispatcher = (
            Dispatch(self.compute, processes, self._runtime.device, announce)
            if dispatch is None
            else dispatch(self)
        )

    def clients(self) -> Sequence[str]:
        """The names of the clients."""
        return self._residents.data.names

    def examples(self) -> npt.NDArray[np.int64]:
        """How many training examples each has."""
        return self._residents.sizes()

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        """Evaluates the plan's clients in its order."""
        return self._residents.evaluate(plan)

    def close(self) -> None:
        """Ends the workers."""
        self._dispatch.close()

    def workers(self) -> list[int]:
        """The process ids of the workers there are; none before they proved worth it."""
        return self._dispatch.pids()

    def plan_record(self) -> dict[str, object]:
        """The plan and the trial's figures, as plain values; empty before the first round."""
        if self._found is None or self._found.choice is None:
            return {}
        return self._found.choice.record()

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure | Folded]:
        """Trains the plan's clients; reserves one at a time.

        With a ``fold``, what comes is folded, group by group. Without, it comes in the order of the
        plan, in stacks.
        """
        plan = self._residents.settled(plan)
        asked = min(len(plan.clients), plan.wanted)
        if self._found is None and plan.clients:
            with self._dispatch.threads(asked):
                self._found = self._find(plan)
        wanted = plan.clients[:asked] if self._found and self._found.kernel else []
        if self._found and wanted:
            places = np.array([self._residents.place(c) for c in wanted])
            if plan.fold is not None:
                yield from self._each(plan, self._groups(places, self._found))
            else:
                for span in chunks.spans(len(wanted), self._found.footprint, self._memory):
                    yield from self._span(plan, wanted[span], places[span], self._found)
        for client in plan.clients[len(wanted) :]:
            with self._dispatch.threads(asked):
                item = self._residents.train(plan, client)
            yield item

    def _find(self, plan: TrainPlan) -> _Found:
        """The kernel for this model, from the initial model and the largest clients."""
        sizes = self._residents.data.train_holdings.sizes()
        largest = int(sizes.argmax())
        size = self._runtime.run.client.batch_size
        most = TRIAL if size == "full" else min(size, TRIAL)
        try:
            examination = trial.examine(
                self._runtime,
                self._runtime.module(),
                self._trainer.examples(largest, most),
                unflatten(plan.shared),
            )
        except UmbelError:
            raise
        except Exception as error:  # it fails in a plain loop as well: each client will say so
            self._say(reason(error))
            return _Found(None, None, False, self._footprint(plan.model, 0))
        footprint = self._footprint(plan.model, examination.activation_bytes)
        growth = self._trainer.growth(largest)
        width = growth * int(sizes[largest])
        width = width if size == "full" else min(width, size)
        room = max(1, self._memory // footprint.client(width))
        together = min(room, len(plan.clients), plan.wanted, self._largest or room)

        order = np.argsort(-sizes, kind="stable")[:together]

        def sample(clients: int, steps: int) -> Any:
            draws, some = examination.draws, order[:clients]
            if self._runtime.private is not None:
                bound = Bound(None, self._examples(footprint))
                return self._trainer.private_chunk(1, some, draws, plan.shared, None, bound, steps)
            return self._trainer.chunk(1, some, draws, plan.shared, None, steps)

        subject = self._trainer.subject(examination.draws, plan.shared)
        try:
            work = self._work(float(sizes.mean()) * growth, min(len(plan.clients), plan.wanted))
            choice, kernel = choose(subject, examination, sample, together, self._pinned, work)
        except Obstacle as obstacle:
            self._say(str(obstacle))
            return _Found(None, None, False, footprint)
        last = "vmap" if self._runtime.private is None else "stacked"
        why = examination.obstacle or choice.refused.get(last)
        if choice.plan.kernel == "lean" and choice.source != "pinned" and why:
            self._say(why)
        return _Found(kernel, choice, examination.draws, footprint, growth)

    def _work(self, size: float, clients: int) -> float:
        """How often, in the run, some client takes as many steps as in the trial."""
        run, (epochs, steps) = self._runtime.run, self._runtime.run.round_length
        batch = run.client.batch_size
        taken = steps or (epochs or 1) * (1.0 if batch == "full" else max(1.0, size / batch))
        return run.run.rounds * clients * taken / STEPS

    def _examples(self, footprint: chunks.Footprint) -> int:
        """How many a private computation may hold."""
        return max(1, self._memory // max(footprint.example, 1))

    def _say(self, why: str) -> None:
        self._announce(f"cannot vectorise model: {why}; running one client after another")

    def _footprint(self, model: Model, activation_bytes: int) -> chunks.Footprint:
        row = sum(c[:1].nbytes for c in self._trainer.columns.values())
        copies = 3 + optimizers.slots(self._runtime.run.client) + self._kept_copies(model)
        return chunks.Footprint(model.bytes(), copies, 2 * row + 2 * activation_bytes)

    def _kept_copies(self, model: Model) -> int:
        """What a client keeps, before and after a round, in copies of the model, rounded up."""
        kept = flatten(own.first(self._runtime.rule, model_of(self._trainer.module)))
        size = sum(t.numel() * t.element_size() for t in kept.values())
        return -(-2 * size // max(model.bytes(), 1))

    def _groups(self, places: chunks.Places, found: _Found) -> list[Group]:
        """The clients at these places, dealt to chunks and these to groups."""
        assert found.choice is not None
        run = self._runtime.run
        sizes = self._residents.data.train_holdings.sizes_at(places) * found.growth
        # A private kernel cuts its computations itself, of more clients than one takes.
        pooled = isinstance(found.kernel, Private)
        bounds = [self._largest, None if pooled else found.choice.plan.chunk]
        if pooled or found.choice.plan.chunk is None:
            bounds.append(_share(sizes, found.footprint, self._parts))
        dealt = chunks.chunks(
            sizes,
            chunks.Length(run.client.batch_size, *run.round_length),
            found.footprint,
            self._memory,
            min((n for n in bounds if n is not None), default=None),
            found.kernel is not None and found.kernel.even,
            float("inf") if pooled else chunks.PADDING,
        )
        return groups([places[chunk] for chunk in dealt], [float(sizes[c].sum()) for c in dealt])

    def _each(self, plan: TrainPlan, dealt: Sequence[Group]) -> Iterator[Any]:
        """What each group came to, in their order."""
        for result, said in self._dispatch.run(plan, dealt):
            for text in said:
                self._announce(text)
            yield result

    def compute(
        self, plan: TrainPlan, dealt: Sequence[chunks.Places]
    ) -> tuple[Folded | list[Updates | Failure], list[str]]:
        """Trains chunks, in this process or in a worker: the result, and what is to be announced.

        The result is a function of the arguments and of what the first round found. A worker that
        was not there then finds the same where the plan is pinned.
        """
        if self._found is None:
            self._found = self._find(plan)
        said: list[str] = []
        items = (item for places in dealt for item in self._items(plan, places, said))
        if plan.fold is None:
            return list(items), said
        names = self._residents.data.names
        return plan.fold(plan.part([names[p] for c in dealt for p in c.tolist()]), items), said

    def _items(
        self, plan: TrainPlan, places: chunks.Places, said: list[str]
    ) -> Iterator[Updates | Failure]:
        """Trains the clients of one chunk together, or where that fails one after another."""
        found = self._found
        assert found is not None
        assert found.kernel is not None
        assert found.choice is not None
        try:
            updates = None  # where no kernel has the per-example gradients, the runtime has
            if self._runtime.private is None or isinstance(found.kernel, Private):
                bound = Bound(found.choice.plan.chunk, self._examples(found.footprint))
                updates = self._trainer.train(found.kernel, plan, places, found.draws, bound)
        except UmbelError:
            raise
        except Exception as error:
            if found.choice.plan.kernel != "lean":
                said.append(
                    f"round {plan.round}: {len(places)} clients failed in one computation "
                    f"({reason(error)}); running them one after another"
                )
        else:
            if updates is not None:
                yield self._runtime.released(updates, plan.model)
                return
        for place in places.tolist():
            client = self._residents.data.names[place]
            yield self._residents.train(plan, client)

    def _span(
        self, plan: TrainPlan, clients: Sequence[str], places: chunks.Places, found: _Found
    ) -> Iterator[Updates | Failure]:
        """Trains consecutive clients of the plan, and yields them in its order."""
        row = {client: i for i, client in enumerate(clients)}
        whole: Updates | None = None
        failures: dict[int, Failure] = {}
        for items in self._each(plan, self._groups(places, found)):
            for item in items:
                if isinstance(item, Failure):
                    failures[row[item.client]] = item
                else:
                    at = np.array([row[c] for c in item.clients])
                    whole = stacks.scatter(whole, item, at, list(clients))
        start = 0
        for stop in [*sorted(failures), len(clients)]:
            if stop > start and whole is not None:
                yield whole if stop - start == len(clients) else stacks.rows(whole, start, stop)
            if stop in failures:
                yield failures[stop]
            start = stop + 1


def _share(sizes: chunks.Places, footprint: chunks.Footprint, parts: int) -> int | None:
    """The most clients in a chunk where a round is long enough to be cut; else ``None``."""
    # At least a multiplication for each parameter and example, forward and twice backward.
    if parts == 1 or float(sizes.sum()) * footprint.model < LONG:
        return None
    return max(NARROW, -(-len(sizes) // parts))
