"""The clients that live in this process: their data, trained and evaluated one at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from umbel.client import own, personal
from umbel.client.state import ClientStates
from umbel.client.training import ClientRuntime
from umbel.core.errors import UmbelError
from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, TrainPlan, Updates
from umbel.core.run_file import RunFile
from umbel.core.trees import unflatten
from umbel.datasets.federated import Arrays, FederatedData, Numbered
from umbel.privacy.sources import seeded_sources
from umbel.strategies.parts import ClientRule
from umbel.tasks.evaluate import evaluate
from umbel.tasks.task import Task


class Residents:
    """What every in-process engine shares.

    An exception of the user's model or loss, raised for one client's data, is that client's
    failure; an :class:`UmbelError` is everybody's and propagates.
    """

    def __init__(self, run: RunFile, data: FederatedData, task: Task, rule: ClientRule) -> None:
        self.data = data
        # Seeded, so that a simulation repeats: it protects nobody, and its record says so.
        self.runtime = ClientRuntime(run, task, rule, seeded_sources(run.run.seed))
        # Numbered names know their places; a million of them need no table.
        listed = () if isinstance(data.names, Numbered) else data.names
        self._states: ClientStates | None = None
        self._places = {name: place for place, name in enumerate(listed)}

    def place(self, client: str) -> int:
        """Where ``client`` stands among the names of the data."""
        return self._places[client] if self._places else self.data.names.index(client)

    def sizes(self) -> npt.NDArray[np.int64]:
        """How many training examples each client has, in the order of the names."""
        return self.data.train_holdings.sizes()

    def settled(self, plan: TrainPlan) -> TrainPlan:
        """The plan, with a place for what clients keep: of this object where nobody gave one."""
        if plan.states is not None or not own.keeps(self.runtime.rule, self.runtime.task):
            return plan
        if self._states is None:
            self._folder = tempfile.TemporaryDirectory(prefix="umbel-clients-")
            path = Path(self._folder.name) / "clients.db"
            self._states = ClientStates(path, own.algorithm(self.runtime.run, self.runtime.task))
        return replace(plan, states=self._states)

    def train(self, plan: TrainPlan, client: str) -> Updates | Failure:
        """Trains one client the plain way."""
        examples, states = self.data.train_part(self.place(client)), plan.states
        try:
            kept = None if states is None else states.get(plan.round, [client])[0]
            shared = unflatten(plan.shared)
            learned = self.runtime.learn(plan.round, client, examples, plan.model, shared, kept)
        except UmbelError:
            raise
        except Exception as error:
            return Failure(client, reason(error))
        if states is not None and learned.kept and own.is_finite(learned.kept):
            states.put(plan.round, {client: learned.kept})
        return learned.updates

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        """Evaluates the plan's clients in its order; those without a test part yield nothing."""
        if self.data.client_test is None:  # a million clients need not be asked
            return
        module = self.runtime.module(plan.model)
        for client in plan.clients:
            examples = self.data.test_part(self.place(client))
            if examples is None:
                continue
            try:
                count, found = evaluate(
                    self.runtime.task, module, examples, device=self.runtime.device
                )
                if personal.wanted(self.runtime):
                    found = {**found, **self._personal(plan, client, examples)}
                yield Evaluation(client, count, found)
            except UmbelError:
                raise
            except Exception as error:
                yield Failure(client, reason(error))

    def _personal(self, plan: EvaluatePlan, client: str, test: Arrays) -> dict[str, float]:
        states = plan.states or self._states
        kept = None if states is None else states.get(plan.round + 1, [client])[0]
        train = self.data.train_part(self.place(client))
        return personal.scores(self.runtime, plan.round, client, plan.model, kept, train, test)


def reason(error: Exception) -> str:
    """``<ExceptionType>: <first line>``."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
