"""One client after another, each through the same runtime as a real site: the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, Federation, TrainPlan, Updates
from umbel.core.run_file import RunFile
from umbel.datasets.federated import FederatedData
from umbel.simulations.residents import Residents
from umbel.strategies.parts import ClientRule
from umbel.tasks.task import Task


def sequential(
    run: RunFile,
    data: FederatedData,
    task: Task,
    rule: ClientRule,
    announce: Callable[[str], None] = lambda message: None,
) -> Federation:
    """One client after another; the obvious one, which the others must agree with.

    Args:
        run: the run file.
        data: who holds what.
        task: what is learned.
        rule: what clients do besides.
        announce: told what a user should know; this engine has nothing to tell.

    Raises:
        InputError: the device or precision is not here, or the model has nothing to train.
    """
    return Sequential(Residents(run, data, task, rule))


class Sequential:
    """A federation in process; a client is trained when its update is asked for."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents

    def clients(self) -> Sequence[str]:
        """The names of the clients."""
        return self._residents.data.names

    def examples(self) -> npt.NDArray[np.int64]:
        """How many training examples each has."""
        return self._residents.sizes()

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure]:
        """Trains the plan's clients in its order."""
        plan = self._residents.settled(plan)
        for client in plan.clients:
            yield self._residents.train(plan, client)

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        """Evaluates the plan's clients in its order."""
        return self._residents.evaluate(plan)

    def plan_record(self) -> Mapping[str, Any]:
        """Nothing was chosen."""
        return {}

    def close(self) -> None:
        """Nothing to end."""
