"""The server's own examples, for strategies that ask for some, and its training on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from umbel.client.training import ClientRuntime
from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.core.run_file import Privacy, RunFile
from umbel.core.trees import Model, Tree
from umbel.datasets.federated import FederatedData, rows, take
from umbel.strategies.parts import ClientRule, Strategy
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.task import Task

NAME = "server"


def with_root(
    run: RunFile, data: FederatedData, task: Task, strategy: Strategy
) -> tuple[FederatedData, Strategy]:
    """The data without the server's examples, and the strategy with what trains on them.

    They are drawn from the global test set, by the seed. The server trains as a client would, with
    the run's ``[client]`` settings, and plainly: its examples are nobody's secret from itself.

    Raises:
        InputError: there is no global test set, or it is too small.
    """
    if strategy.root is None:
        return data, strategy
    wanted, there = strategy.root.examples, 0 if data.test is None else rows(data.test)
    if data.test is None or there <= wanted:
        raise InputError(
            f"root_examples = {wanted}, and the global test set has {there}",
            where="[strategy]",
            fix="set [data] holdout = 0.2, or a lower root_examples",
        )
    order = randomness.permutation(randomness.key(run.run.seed, "root"), there)
    own = take(data.test, np.sort(order[:wanted]))
    left = take(data.test, np.sort(order[wanted:]))
    params = model_of(initial_module(task, run.run.seed)).params.keys()
    plain = run.model_copy(update={"privacy": Privacy()})
    runtime = ClientRuntime(plain, task, ClientRule())

    def train(round_number: int, tensors: Tree) -> Tree:
        model = Model(
            {n: t for n, t in tensors.items() if n in params},
            {n: t for n, t in tensors.items() if n not in params},
        )
        delta = runtime.train(round_number, NAME, own, model).delta
        return {name: stack[0] for name, stack in delta.items()}

    bound = strategy._replace(combine=strategy.root.combine(train))
    return replace(data, test=left), bound
