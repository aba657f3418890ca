"""From a run file to the things that it names, all checked before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from umbel.client.batches import episodic
from umbel.core.errors import InputError, UmbelError, suggest
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, flatten, map_tree
from umbel.datasets.build import load
from umbel.datasets.federated import FederatedData, rows, take
from umbel.server import secure
from umbel.server.gate import weight_cap
from umbel.server.personal_scores import base
from umbel.server.sampling import cohort_size
from umbel.simulations.attacks.build import build_attack, hostile_count
from umbel.simulations.root import with_root
from umbel.strategies.build import build_strategy
from umbel.strategies.parts import Strategy
from umbel.tasks.begin import base_hash
from umbel.tasks.build import build_task, initial_module, model_of
from umbel.tasks.collect import collected
from umbel.tasks.task import Task

SHOWN = 20
"""Names of clients, at most, that an error lists."""


class Prepared(NamedTuple):
    """A run, ready to start: its data are read, its parts found, its model tried."""

    run: RunFile
    data: FederatedData
    task: Task
    strategy: Strategy
    module: nn.Module
    metrics: tuple[str, ...]

    def model(self) -> Model:
        """A copy of the initial global model."""
        params, buffers = model_of(self.module)
        return Model(map_tree(torch.clone, params), map_tree(torch.clone, buffers))


def prepare(run: RunFile) -> Prepared:
    """Reads the data, builds task, strategy and model, and tries the model on two examples.

    Raises:
        InputError: whatever is wrong with the run file, the data files or the model.
    """
    strategy = build_strategy(run.strategy)
    data = load(run.data, run.run.seed)
    _check_names(strategy.client.speaks_of, data.names)
    build_attack(run.attack)
    joined = hostile_count(run.attack, len(data.names)) if run.attack.join else 0
    cohort_size(run.strategy, len(data.names) + joined, strategy.combine.fewest)
    secure.check(run, strategy.combine, len(data.names))
    task = build_task(run.task, data.info)
    data, strategy = with_root(run, data, task, strategy)
    module = initial_module(task, run.run.seed)
    metrics = _try(task, module, data)
    _check_evaluation(run, data, metrics)
    run = _private(run, data, task, strategy, module)
    return Prepared(run, data, task, strategy, module, metrics)


def _check_names(named: Sequence[str], clients: Sequence[str]) -> None:
    """Refuses a parameter for a client that there is not: it would have no effect."""
    if unknown := [name for name in named if name not in clients]:
        raise InputError(
            f"no client is called '{unknown[0]}'",
            where="[strategy]",
            fix=suggest(unknown[0], islice(clients, SHOWN)),
        )


def plan(prepared: Prepared) -> dict[str, Any]:
    """What the run will be, as plain values: sizes, memory, and what a user should know."""
    run, data, model = prepared.run, prepared.data, prepared.model()
    sizes = data.train_holdings.sizes()
    cohort = cohort_size(run.strategy, len(data.names))
    strategy = prepared.strategy
    sent = strategy.travelling(model)
    server_state = strategy.init(sent.params)
    state = flatten(server_state)
    besides = [strategy.upload_template(sent.params)]
    if strategy.broadcast is not None:
        besides.append(flatten(strategy.broadcast(sent.params, server_state)))
    besides_bytes = sum(t.numel() * t.element_size() for tree in besides for t in tree.values())
    state_bytes = sum(t.numel() * t.element_size() for t in state.values())
    data_bytes = sum(
        column.nbytes
        for arrays in (data.train, data.test, data.client_test)
        for column in (arrays or {}).values()
    )
    return {
        "ok": True,
        "name": run.run.name,
        "rounds": run.run.rounds,
        "clients": len(data.names),
        "cohort": cohort,
        "examples": int(sizes.sum()),
        "examples_per_client": {
            "min": int(sizes.min()),
            "median": float(torch.from_numpy(sizes).double().median()),
            "max": int(sizes.max()),
        },
        "parameters": sum(p.numel() for p in model.params.values()),
        # Down and up: the global model and a delta of the same size, without what never travels,
        # and what the strategy sends besides.
        "bytes_per_client_round": 2 * sent.bytes() + besides_bytes,
        # Data, the global model, its float64 sum, the server's state, and one client in training
        # (parameters, gradient, two moments).
        "memory_bytes": data_bytes + 3 * model.bytes() + state_bytes + 4 * model.bytes(),
        "base_model": base_hash(prepared.module),
        "metrics": list(prepared.metrics),
        "privacy": _privacy(run, sizes),
        "notes": _notes(prepared, cohort),
    }


def _notes(prepared: Prepared, cohort: int) -> list[str]:
    run, data = prepared.run, prepared.data
    notes = []
    sizes = data.train_holdings.sizes()
    if run.strategy.weights == "examples":
        cap = weight_cap(sizes.tolist(), run.strategy.max_weight)
        if heavy := int((sizes > cap).sum()):
            notes.append(
                f"{heavy} client(s) hold more than {cap:g} examples and weigh {cap:g}; "
                "[strategy] max_weight changes that"
            )
    if run.strategy.deadline is not None:
        notes.append("deadline binds remote clients only; a simulated client is never late")
    total = sum(p.numel() for p in prepared.module.parameters())
    trained = sum(p.numel() for p in prepared.model().params.values())
    if trained < total:
        notes.append(
            f"{trained / total:.1%} of {total:,} parameters are trained and travel; the others are "
            "the base model, the same at all clients"
        )
    if prepared.model().buffers:
        notes.append("buffers (running statistics) are averaged, not stepped by the strategy")
    strategy = prepared.strategy
    if private := len(prepared.model().tensors()) - len(
        strategy.travelling(prepared.model()).tensors()
    ):
        notes.append(
            f"{private} tensor(s) of the model never travel; the global model holds their initial "
            "values, and personal_… are the figures that count"
        )
    if strategy.client.personalises and data.client_test is None:
        notes.append("personal models are not evaluated: set [data] client_holdout")
    if data.test is None and data.client_test is None:
        notes.append("no test examples: set [data] holdout or client_holdout")
    return notes


def _private(
    run: RunFile, data: FederatedData, task: Task, strategy: Strategy, module: nn.Module
) -> RunFile:
    """The run, calibrated; refuses what ``[privacy]`` does not cover."""
    if run.privacy.unit == "none":
        return run
    from umbel.client.private import check_rule  # accountants take seconds to load
    from umbel.client.private_model import check_model
    from umbel.server import private_plan
    from umbel.server.private_sum import check_mean

    private_plan.check(run, len(data.names))
    if run.privacy.unit == "example":
        check_rule(strategy.client)
    else:
        check_mean(strategy, run.strategy.name, model_of(module).params)
    check_model(run, task, module, _few(task, module, data))
    return private_plan.calibrated(run, data.train_holdings.sizes())


def _privacy(run: RunFile, sizes: npt.NDArray[np.int64]) -> dict[str, Any] | None:
    if run.privacy.unit == "none":
        return None
    from umbel.server import private_plan

    return private_plan.describe(run, sizes, "seeded")


def _try(task: Task, module: nn.Module, data: FederatedData) -> tuple[str, ...]:
    """Runs the model on a few examples; the names of its metrics."""
    batch = _few(task, module, data)
    count = len(next(iter(batch.values())))
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            losses = task.losses(module, batch)
            metrics = task.metrics(module, batch)
    except UmbelError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        shape = data.info.input_shape
        raise InputError(
            f"the model fails on {count} examples of shape {shape}: {str(error).splitlines()[0]}",
            where="[task.model]",
            fix=f"it must take (B, {', '.join(map(str, shape))})",
        ) from error
    finally:
        module.train(was_training)
    for name, values in {"losses": losses, **metrics}.items():
        if values.shape != (count,):
            raise InputError(
                f"the task's {name} have shape {tuple(values.shape)} for {count} examples",
                where="[task]",
                fix="give one number an example",
            )
    return ("loss", *metrics, *task.derived(dict.fromkeys(("loss", *metrics), 0.0)))


def _few(task: Task, module: nn.Module, data: FederatedData) -> dict[str, torch.Tensor]:
    """Two examples, or the first client's first episode; or what the task makes of its first."""
    if task.collect is not None:
        held = take(data.train, data.train_holdings.of_client(0)[:2])
        made = collected(task.collect, module, held, 0, 1, 1, data.names[0])
        return {n: torch.from_numpy(c[:2]) for n, c in made.items()}
    if task.episodes is None:
        index = data.train_holdings.index[:2]
    else:
        index = data.train_holdings.of_client(0)
        labels = data.train["y"][index]
        index = index[episodic(0, 0, data.names[0], labels, task.episodes, None, 1)[0]]
    return {n: torch.from_numpy(c) for n, c in take(data.train, index).items()}


def _check_evaluation(run: RunFile, data: FederatedData, metrics: tuple[str, ...]) -> None:
    stopping = run.evaluate.early_stopping
    for name in (*(run.evaluate.metrics or ()), *((stopping.metric,) if stopping else ())):
        if base(name) not in metrics:
            raise InputError(
                f"unknown metric '{name}'", where="[evaluate]", fix=f"known: {', '.join(metrics)}"
            )
    if run.evaluate.fine_tune_steps and data.client_test is None:
        raise InputError(
            "fine_tune_steps is set, and no client holds test examples",
            where="[evaluate]",
            fix="set [data] client_holdout = 0.2",
        )
    if run.evaluate.per_client and data.client_test is None:
        raise InputError(
            "per_client = true, and no client holds test examples",
            where="[evaluate]",
            fix="set [data] client_holdout = 0.2",
        )
    for part, arrays in (("test", data.test), ("client test", data.client_test)):
        if arrays is not None and not rows(arrays):
            raise InputError(f"the {part} part is empty", where="[data]", fix="raise the holdout")
