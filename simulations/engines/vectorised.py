"""Many clients in one computation, wherever the model allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from umbel.client import optimizers
from umbel.core.errors import UmbelError
from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, Federation, TrainPlan, Updates
from umbel.core.run_file import RunFile
from umbel.core.trees import Model
from umbel.datasets.federated import FederatedData
from umbel.simulations import chunks, stacks, trial
from umbel.simulations.choose import choose
from umbel.simulations.kernels.kernel import Chunk, Kernel, Obstacle
from umbel.simulations.plan import Choice, EnginePlan
from umbel.simulations.residents import Residents, reason
from umbel.simulations.trainer import Trainer
from umbel.strategies.parts import ClientRule
from umbel.tasks.task import Task

TRIAL = 32
"""Examples that the trial looks at, at most."""


def vectorised(
    run: RunFile,
    data: FederatedData,
    task: Task,
    rule: ClientRule,
    announce: Callable[[str], None] = lambda message: None,
    memory: int | None = None,
    largest_chunk: int | None = None,
    plan: str | None = None,
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
        plan: the kernel and its chunk, such as ``grouped:chunk=5``; ``None``: the fastest. A run
            ends with the same bits only under the same plan.

    Raises:
        InputError: the device or precision is not here, the model has nothing to train, or the plan
            is not one.
    """
    pinned = None if plan is None else EnginePlan.parse(plan)
    return Vectorised(Residents(run, data, task, rule), announce, memory, largest_chunk, pinned)


class _Found(NamedTuple):
    """What the first round found out; no kernel: each client goes through the runtime."""

    kernel: Kernel | None
    choice: Choice | None
    draws: bool
    footprint: chunks.Footprint


class Vectorised:
    """A federation in process; clients are trained chunk by chunk, when they are asked for."""

    def __init__(
        self,
        residents: Residents,
        announce: Callable[[str], None],
        memory: int | None,
        largest_chunk: int | None,
        pinned: EnginePlan | None,
    ) -> None:
        self._residents = residents
        self._runtime = residents.runtime
        self._announce = announce
        self._memory = chunks.memory_bound(self._runtime.device) if memory is None else memory
        self._largest = largest_chunk
        self._pinned = pinned
        self._trainer = Trainer(residents, self._memory)
        self._found: _Found | None = None

    def clients(self) -> Sequence[str]:
        """The names of the clients."""
        return self._residents.data.names

    def examples(self) -> Sequence[int]:
        """How many training examples each has."""
        return self._residents.sizes()

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        """Evaluates the plan's clients in its order."""
        return self._residents.evaluate(plan)

    def close(self) -> None:
        """Nothing to end."""

    def plan_record(self) -> dict[str, object]:
        """The plan and the trial's figures, as plain values; empty before the first round."""
        if self._found is None or self._found.choice is None:
            return {}
        return self._found.choice.record()

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure]:
        """Trains the plan's clients in its order, in stacks; reserves one at a time."""
        if self._found is None and plan.clients:
            self._found = self._find(plan)
        wanted = plan.clients[: plan.wanted] if self._found and self._found.kernel else []
        if self._found and wanted:
            places = np.array([self._residents.place(c) for c in wanted])
            for span in chunks.spans(len(wanted), self._found.footprint, self._memory):
                yield from self._span(plan, wanted[span], places[span], self._found)
        for client in plan.clients[len(wanted) :]:
            yield self._residents.train(plan.round, client, plan.model)

    def _find(self, plan: TrainPlan) -> _Found:
        """The kernel for this model, from the initial model and the largest clients."""
        sizes = self._residents.data.train_holdings.sizes()
        largest = int(sizes.argmax())
        size = self._runtime.run.client.batch_size
        most = TRIAL if size == "full" else min(size, TRIAL)
        try:
            examination = trial.examine(
                self._runtime, self._runtime.module(), self._trainer.examples(largest, most)
            )
        except UmbelError:
            raise
        except Exception as error:  # it fails in a plain loop as well: each client will say so
            self._say(reason(error))
            return _Found(None, None, False, self._footprint(plan.model, 0))
        footprint = self._footprint(plan.model, examination.activation_bytes)
        width = int(sizes[largest]) if size == "full" else min(int(sizes[largest]), size)
        room = max(1, self._memory // footprint.client(width))
        together = min(room, len(plan.clients), plan.wanted, self._largest or room)

        def sample(clients: int, steps: int) -> Chunk:
            places = np.argsort(-sizes, kind="stable")[:clients]
            return self._trainer.chunk(1, places, examination.draws, steps)

        subject = self._trainer.subject(examination.draws)
        try:
            choice, kernel = choose(subject, examination, sample, together, self._pinned)
        except Obstacle as obstacle:
            self._say(str(obstacle))
            return _Found(None, None, False, footprint)
        why = examination.obstacle or choice.refused.get("vmap")
        if choice.plan.kernel == "lean" and choice.source != "pinned" and why:
            self._say(why)
        return _Found(kernel, choice, examination.draws, footprint)

    def _say(self, why: str) -> None:
        self._announce(f"cannot vectorise model: {why}; running one client after another")

    def _footprint(self, model: Model, activation_bytes: int) -> chunks.Footprint:
        row = sum(c[:1].nbytes for c in self._trainer.columns.values())
        copies = 3 + optimizers.slots(self._runtime.run.client)
        return chunks.Footprint(model.bytes(), copies, 2 * row + 2 * activation_bytes)

    def _span(
        self, plan: TrainPlan, clients: Sequence[str], places: chunks.Places, found: _Found
    ) -> Iterator[Updates | Failure]:
        """Trains consecutive clients of the plan, and yields them in its order."""
        assert found.kernel is not None
        assert found.choice is not None
        size = self._runtime.run.client.batch_size
        bounds = [n for n in (self._largest, found.choice.plan.chunk) if n is not None]
        dealt = chunks.chunks(
            self._residents.data.train_holdings.sizes()[places],
            None if size == "full" else size,
            found.footprint,
            self._memory,
            min(bounds, default=None),
        )
        whole: Updates | None = None
        failures: dict[int, Failure] = {}
        for chunk in dealt:
            try:
                updates = self._trainer.train(
                    found.kernel, plan.round, places[chunk], plan.model, found.draws
                )
                done: Sequence[int] = range(len(chunk))
            except UmbelError:
                raise
            except Exception as error:
                if found.choice.plan.kernel != "lean":
                    self._announce(
                        f"round {plan.round}: {len(chunk)} clients failed in one computation "
                        f"({reason(error)}); running them one after another"
                    )
                names = [clients[i] for i in chunk]
                one_by_one = [self._residents.train(plan.round, c, plan.model) for c in names]
                failures |= {
                    int(chunk[i]): f for i, f in enumerate(one_by_one) if isinstance(f, Failure)
                }
                done = [i for i, u in enumerate(one_by_one) if isinstance(u, Updates)]
                if not done:
                    continue
                updates = stacks.join([u for u in one_by_one if isinstance(u, Updates)])
            rows = chunk[list(done)]
            if len(rows) == len(clients) and (rows == np.arange(len(rows))).all():
                whole = updates
            else:
                whole = stacks.scatter(whole, updates, rows, list(clients))
        start = 0
        for stop in [*sorted(failures), len(clients)]:
            if stop > start and whole is not None:
                yield whole if stop - start == len(clients) else stacks.rows(whole, start, stop)
            if stop in failures:
                yield failures[stop]
            start = stop + 1
