"""Many clients in one computation, wherever the model allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from umbel.client import batches, optimizers
from umbel.client.training import load
from umbel.core.errors import UmbelError
from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, Federation, TrainPlan, Updates
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, to_device
from umbel.datasets.federated import FederatedData
from umbel.simulations import chunks, stacks, trial
from umbel.simulations.residents import Residents, reason
from umbel.simulations.stacked import Chunk, Kernel
from umbel.strategies.parts import ClientRule
from umbel.tasks.evaluate import tensor_of
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
) -> Federation:
    """Many clients in one computation; the same model as sequential, to float tolerance.

    A model that cannot be trained so (found by a trial on the largest client's data) is announced
    once and trained one client after another.

    Args:
        run: the run file.
        data: who holds what.
        task: what is learned.
        rule: what clients do besides.
        announce: told what a user should know.
        memory: bytes that the clients of one chunk may take; ``None``: a share of what is free.
        largest_chunk: the most clients in one computation; ``None``: as many as memory allows.

    Raises:
        InputError: the device or precision is not here, or the model has nothing to train.
    """
    return Vectorised(Residents(run, data, task, rule), announce, memory, largest_chunk)


class Vectorised:
    """A federation in process; clients are trained chunk by chunk, when they are asked for."""

    def __init__(
        self,
        residents: Residents,
        announce: Callable[[str], None],
        memory: int | None,
        largest_chunk: int | None,
    ) -> None:
        self._residents = residents
        self._runtime = residents.runtime
        self._announce = announce
        self._memory = chunks.memory_bound(self._runtime.device) if memory is None else memory
        self._largest = largest_chunk
        self._module = self._runtime.module()
        self._kernel = Kernel(self._runtime, self._module)
        self._verdict: trial.Verdict | None = None
        self._columns = {n: tensor_of(c) for n, c in residents.data.train.items()}
        if self._runtime.device.type != "cpu":
            held = sum(c.nbytes for c in self._columns.values())
            if held <= self._memory // 2:
                self._columns = to_device(self._columns, self._runtime.device)

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

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure]:
        """Trains the plan's clients in its order, in stacks; reserves one at a time."""
        verdict = self._try()
        wanted = plan.clients[: plan.wanted] if verdict.obstacle is None else []
        if wanted:
            load(self._module, plan.model)
            places = np.array([self._residents.place(c) for c in wanted])
            footprint = self._footprint(plan.model, verdict.activation_bytes)
            for span in chunks.spans(len(wanted), footprint, self._memory):
                yield from self._span(plan, wanted[span], places[span], footprint)
        for client in plan.clients[len(wanted) :]:
            yield self._residents.train(plan.round, client, plan.model)

    def _try(self) -> trial.Verdict:
        """The verdict on this model, found at the first round.

        From the initial model and the largest client, so that it is the same in a resumed run.
        """
        if self._verdict is not None:
            return self._verdict
        holdings = self._residents.data.train_holdings
        rows = holdings.of_client(int(holdings.sizes().argmax()))
        size = self._runtime.run.client.batch_size
        rows = rows[: TRIAL if size == "full" else min(size, TRIAL)]
        batch = {
            name: column[torch.from_numpy(rows.astype(np.int64))].to(self._runtime.device)
            for name, column in self._columns.items()
        }
        try:
            self._verdict = trial.attempt(self._runtime, self._runtime.module(), batch)
        except UmbelError:
            raise
        except Exception as error:  # it fails in a plain loop as well: each client will say so
            self._verdict = trial.Verdict(reason(error), 0)
        if self._verdict.obstacle is not None:
            self._announce(
                f"cannot vectorise model: {self._verdict.obstacle}; "
                "running one client after another"
            )
        return self._verdict

    def _footprint(self, model: Model, activation_bytes: int) -> chunks.Footprint:
        row = sum(c[:1].nbytes for c in self._columns.values())
        copies = 3 + optimizers.slots(self._runtime.run.client)
        return chunks.Footprint(model.bytes(), copies, 2 * row + 2 * activation_bytes)

    def _span(
        self, plan: TrainPlan, clients: Sequence[str], places: chunks.Places, fp: chunks.Footprint
    ) -> Iterator[Updates | Failure]:
        """Trains consecutive clients of the plan, and yields them in its order."""
        sizes = self._residents.data.train_holdings.sizes()[places]
        size = self._runtime.run.client.batch_size
        batch_size = None if size == "full" else size
        dealt = chunks.chunks(sizes, batch_size, fp, self._memory, self._largest)
        whole: Updates | None = None
        failures: dict[int, Failure] = {}
        for chunk in dealt:
            names = [clients[i] for i in chunk]
            try:
                updates = self._chunk(plan, names, places[chunk], sizes[chunk])
                done: Sequence[int] = range(len(names))
            except UmbelError:
                raise
            except Exception as error:
                self._announce(
                    f"round {plan.round}: {len(names)} clients failed in one computation "
                    f"({reason(error)}); running them one after another"
                )
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

    def _chunk(
        self, plan: TrainPlan, clients: list[str], places: chunks.Places, sizes: chunks.Places
    ) -> Updates:
        """Trains some clients in one computation."""
        run, device = self._runtime.run, self._runtime.device
        padded = batches.schedules(
            run.run.seed,
            plan.round,
            clients,
            sizes,
            run.client.batch_size,
            *run.round_length,
        )
        holdings = self._residents.data.train_holdings
        columns = self._columns
        offsets = holdings.offsets[places]
        pooled = holdings.index[padded.rows + offsets[:, None]].astype(np.int64)
        if any(c.device.type != device.type for c in columns.values()):
            # All data did not fit there: only the rows of this chunk go, each once.
            held, inverse = np.unique(pooled, return_inverse=True)
            pooled = inverse.reshape(pooled.shape)
            columns = {n: c[torch.from_numpy(held)].to(device) for n, c in columns.items()}
        work = Chunk.of(columns, batches.Padded(pooled, padded.counts), device)
        anchor = to_device(plan.model.params, device)
        lr = optimizers.learning_rate(run.client, plan.round, run.run.rounds)
        params, totals = self._kernel.train(anchor, work, lr)
        for name, stack in params.items():
            stack.sub_(anchor[name])
        buffers = {
            name: torch.zeros_like(b).expand(len(clients), *b.shape)
            for name, b in plan.model.buffers.items()
        }
        seen = torch.from_numpy(padded.counts.sum(0))
        return Updates(
            plan.round,
            clients,
            {n: s.to(plan.model.params[n].device) for n, s in params.items()} | buffers,
            torch.from_numpy(sizes.astype(np.float64)),
            {name: total.cpu().double() / seen for name, total in totals.items()},
        )
