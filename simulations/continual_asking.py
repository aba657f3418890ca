"""Rounds outside the count, in which clients learn nothing and say something about a model."""

from __future__ import annotations

from typing import Any

import torch

from umbel.core import run_file
from umbel.core.errors import RunError
from umbel.core.payloads import Federation
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, Tree, zeros_like
from umbel.datasets.federated import FederatedData
from umbel.server.records import Scores
from umbel.server.rounds import Start, rounds
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.secure import SecureFederation
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.defence import IMPORTANCE, Measure, measuring
from umbel.strategies.parts.prototypes import PROTOTYPES, class_sums
from umbel.tasks.evaluate import BATCH
from umbel.tasks.features import Means
from umbel.tasks.task import Task


def importance(
    run: RunFile, measure: Measure, data: FederatedData, task: Task, number: int, model: Model
) -> Tree:
    """How much each parameter counts, in the mean over all clients' examples.

    A round of single examples, with all clients, by the plain engine.

    Args:
        run: the run file.
        measure: what is found out.
        data: of those who are asked.
        task: with the head that the examples were trained with.
        number: the round that the model is of.
        model: the global model.
    """
    strategy = measuring(measure)
    travelling = strategy.travelling(model).params
    if not data.names:
        return zeros_like(travelling)
    client = _client(run).model_copy(update={"batch_size": 1, "local_steps": measure.examples})
    found: Tree = _ask(run, client, strategy, data, task, number, model, IMPORTANCE, {})
    return found


def class_means(
    run: RunFile, data: FederatedData, task: Task, number: int, model: Model, width: int
) -> Means:
    """The mean feature of each class over all clients' examples; arguments as above.

    Args:
        run: the run file.
        data: of those who are asked.
        task: without a head.
        number: the round that the model is of.
        model: the global model.
        width: of the features.
    """
    classes = data.info.classes or 0
    if not data.names:
        return Means(torch.zeros(classes, width), torch.zeros(classes, dtype=torch.bool))
    even = {"weights": "uniform", "max_weight": None}
    strategy = class_sums(classes, width)
    client = _client(run).model_copy(update={"batch_size": BATCH, "local_epochs": 1})
    found = _ask(run, client, strategy, data, task, number, model, PROTOTYPES, even)
    # Under secure aggregation, what nobody has is nought but for rounding.
    sums, known = found["sums"].float(), found["counts"] * len(data.names) > 0.5
    return Means(torch.nn.functional.normalize(sums, dim=1), known)


def _client(run: RunFile) -> run_file.Client:
    """Plain steps, on the device of the run."""
    return run_file.Client(lr=1.0, device=run.client.device, precision=run.client.precision)


def _ask(
    run: RunFile,
    client: run_file.Client,
    strategy: Strategy,
    data: FederatedData,
    task: Task,
    number: int,
    model: Model,
    letter: str,
    section: dict[str, Any],
) -> Any:
    everybody = {"cohort": None, "over_selection": 0.0, **section}
    # A sum over examples is as long as there are examples, and not as a delta.
    masks = run.secure_aggregation
    clip = max(masks.clip, float(data.train_holdings.sizes().max(initial=0)))
    asked = run.model_copy(
        update={
            "run": run.run.model_copy(update={"rounds": number + 1}),
            "client": client,
            "secure_aggregation": masks.model_copy(update={"clip": clip}),
            "strategy": run.strategy.model_copy(update=everybody),
            # What is said is not an adapter's step, which must move something.
            "task": run.task.model_copy(update={"adapter": None}),
        }
    )
    federation: Federation = sequential(asked, data, task, strategy.client)
    if run.secure_aggregation.enabled:
        federation = SecureFederation(federation, asked, strategy)
    try:
        results = rounds(
            asked,
            strategy,
            federation,
            Start(number, model, {}),
            lambda number, model: Scores({}, {}),
        )
        result = next(results)
        results.close()  # type: ignore[attr-defined]
    finally:
        federation.close()
    if letter not in result.state:
        raise RunError(
            f"clients did not say what '{letter}' needs: {result.record.note}",
            where=f"after round {number}",
            fix="a smaller [strategy] quorum, or mend what the clients report",
        )
    return result.state[letter]
