"""Rounds outside the count, in which clients learn nothing and say something about a model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from umbel.core import run_file
from umbel.core.errors import RunError
from umbel.core.messages import Question
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, Tree, zeros_like
from umbel.server.course_ground import Ground, Models
from umbel.server.records import Scores
from umbel.server.rounds import Start, rounds
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.defence import IMPORTANCE, Measure, measuring
from umbel.strategies.parts.prototypes import PROTOTYPES, class_sums
from umbel.tasks.evaluate import BATCH
from umbel.tasks.features import Means
from umbel.tasks.task import Task


class Asked(NamedTuple):
    """Whom is asked, about what.

    Args:
        run: the run file.
        ground: where clients are.
        task: as they have it.
        stage: that they are asked in, from 0.
        number: the round that the model is of.
        model: the global model.
        run_id: of the run.
        models: those that earlier stages ended with.
    """

    run: RunFile
    ground: Ground
    task: Task
    stage: int
    number: int
    model: Model
    run_id: str
    models: Models | None


def importance(asked: Asked, measure: Measure) -> Tree:
    """How much each parameter counts, in the mean over all clients' examples.

    A round of single examples, with all clients who leave an experience.
    """
    strategy = measuring(measure)
    if not max(asked.ground.sizes("importance", asked.stage), default=0):
        return zeros_like(strategy.travelling(asked.model).params)
    client = _client(asked.run).model_copy(
        update={"batch_size": 1, "local_steps": measure.examples}
    )
    found: Tree = _ask(asked, "importance", client, strategy, IMPORTANCE, {})
    return found


def class_means(asked: Asked, classes: int, width: int) -> Means:
    """The mean feature of each class over all clients' examples.

    Args:
        asked: whom; the task without a head.
        classes: of the data.
        width: of the features.
    """
    sizes = asked.ground.sizes("prototypes", asked.stage)
    there = sum(size > 0 for size in sizes)
    if not there:
        return Means(torch.zeros(classes, width), torch.zeros(classes, dtype=torch.bool))
    strategy = class_sums(classes, width)
    client = _client(asked.run).model_copy(update={"batch_size": BATCH, "local_epochs": 1})
    # A sum over examples is as long as there are examples, and not as a delta.
    masks = asked.run.secure_aggregation
    masks = masks.model_copy(update={"clip": max(masks.clip, float(max(sizes)))})
    even = {"weights": "uniform", "max_weight": None}
    asked = asked._replace(run=asked.run.model_copy(update={"secure_aggregation": masks}))
    found = _ask(asked, "prototypes", client, strategy, PROTOTYPES, even)
    # Under secure aggregation, what nobody has is nought but for rounding.
    sums, known = found["sums"].float(), found["counts"] * there > 0.5
    return Means(torch.nn.functional.normalize(sums, dim=1), known)


def _client(run: RunFile) -> run_file.Client:
    """Plain steps, on the device of the run."""
    return run_file.Client(lr=1.0, device=run.client.device, precision=run.client.precision)


def _ask(
    asked: Asked,
    question: Question,
    client: run_file.Client,
    strategy: Strategy,
    letter: str,
    section: dict[str, Any],
) -> Any:
    run, number = asked.run, asked.number
    everybody = {"cohort": None, "over_selection": 0.0, **section}
    run = run.model_copy(
        update={
            "run": run.run.model_copy(update={"rounds": number + 1}),
            "client": client,
            "strategy": run.strategy.model_copy(update=everybody),
        }
    )
    federation = asked.ground.learning(
        run, question, asked.stage, asked.task, strategy, asked.models
    )
    # What is said is not an adapter's step, which must move something.
    plain = run.model_copy(update={"task": run.task.model_copy(update={"adapter": None})})
    try:
        results = rounds(
            plain,
            strategy,
            federation,
            Start(number, asked.model, {}),
            lambda number, model: Scores({}, {}),
            asked.run_id,
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
