"""How a model is scored: on a test set that the server has, or where the data live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from umbel.core.errors import InputError, suggest
from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, Federation, States
from umbel.core.run_file import RunFile
from umbel.core.trees import Model
from umbel.datasets.federated import Arrays
from umbel.server.personal_scores import base, is_personal, of_global, spread
from umbel.server.records import Scores
from umbel.server.rounds import Evaluate
from umbel.strategies.parts import Strategy
from umbel.tasks.evaluate import evaluate
from umbel.tasks.task import Task

# Above this many clients, per-client figures are made only where the run file asks for them.
MANY = 100


def at_server(task: Task, module: nn.Module, test: Arrays, device: str) -> Evaluate:
    """Scores a model on ``test``, with ``module`` as the scratch model that it is loaded into."""

    def scores(round_number: int, model: Model) -> Scores:
        module.load_state_dict(model.tensors(), strict=False)
        _, metrics = evaluate(task, module, test, device=device)
        return Scores(metrics, {})

    return scores


def at_clients(
    run: RunFile,
    federation: Federation,
    per_client: bool,
    strategy: Strategy | None = None,
    run_id: str = "",
    states: States | None = None,
) -> Evaluate:
    """Scores a model on the clients' own test parts; the global figures are those of their union.

    A mean over the union is the mean of the clients' means, weighted by their test examples.

    Args:
        run: the run file.
        federation: where the clients are.
        per_client: whether each client's own figures are kept.
        strategy: says what of a model travels; ``None``: all.
        run_id: under which clients keep what they keep.
        states: where clients in process keep it.
    """

    def scores(round_number: int, model: Model) -> Scores:
        clients = federation.clients()
        deadline = run.strategy.deadline
        sent = model if strategy is None else strategy.travelling(model)
        plan = EvaluatePlan(round_number, clients, sent, deadline, run_id, states)
        found: list[Evaluation] = []
        failures: list[Failure] = []
        for item in federation.evaluate(plan):
            if isinstance(item, Failure):
                failures.append(Failure(item.client, f"evaluation: {item.reason}"))
            else:
                found.append(item)
        found.sort(key=lambda e: e.client)  # sums are taken in client order
        each = {e.client: e.metrics for e in found} if per_client else {}
        return Scores({**_union(found), **spread(found)}, each, failures)

    return scores


def evaluation(
    run: RunFile,
    federation: Federation,
    task: Task,
    module: nn.Module,
    test: Arrays | None,
    device: str,
    strategy: Strategy | None = None,
    run_id: str = "",
    states: States | None = None,
) -> Evaluate:
    """The evaluation that a run file asks for.

    Args:
        run: its [evaluate] says what is shown.
        federation: where the clients' own test parts are.
        task: what is measured.
        module: scratch model.
        test: the global test set, or ``None``: then the union of the clients' parts is.
        device: where ``test`` is evaluated.
        strategy: as in :func:`at_clients`.
        run_id: as there.
        states: as there.
    """
    per_client = run.evaluate.per_client
    if per_client is None:
        per_client = len(federation.clients()) <= MANY and not run.secure_aggregation.enabled
    clients = at_clients(run, federation, per_client, strategy, run_id, states)
    server = at_server(task, module, test, device) if test is not None else None
    personal = strategy is not None and strategy.client.personalises
    asked = server is None or per_client or personal or run.evaluate.fine_tune_steps > 0

    def shown(means: Mapping[str, float]) -> Mapping[str, float]:
        return _choose({**means, **task.derived(means)}, run.evaluate.metrics)

    def scores(round_number: int, model: Model) -> Scores:
        own = clients(round_number, model) if asked else Scores({}, {})
        if server is not None:
            theirs = {n: v for n, v in own.metrics.items() if is_personal(n)}
            own = own._replace(metrics={**server(round_number, model).metrics, **theirs})
        return own._replace(
            metrics=shown(own.metrics),
            per_client={c: shown(m) for c, m in own.per_client.items()},
        )

    return scores


def _union(found: Sequence[Evaluation]) -> dict[str, float]:
    total = sum(e.examples for e in found)
    names = of_global(found[0].metrics) if found else ()
    return {n: sum(e.metrics[n] * e.examples for e in found) / total for n in names}


def _choose(metrics: Mapping[str, float], chosen: Sequence[str] | None) -> Mapping[str, float]:
    if chosen is None or not metrics:
        return metrics
    for name in chosen:
        if name not in metrics and base(name) == name:  # a client's own may have none of its own
            raise InputError(
                f"unknown metric '{name}'", where="[evaluate]", fix=suggest(name, metrics)
            )
    return {name: metrics[name] for c in chosen for name in metrics if c in (name, base(name))}
