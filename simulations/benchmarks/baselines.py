"""What federation buys: a recipe beside each client alone and all data in one place.

    umbel bench baselines RECIPE [--set key=value] [--clients 3]

RECIPE is a run file, or the name of a recipe that comes with Umbel. All start from the same model
and are measured by the task's own evaluation on the same examples:

- start: the initial model, such as the base model of an adapter, or an untrained encoder;
- alone: a client trains by itself, for as many of its rounds as it takes part in on average; the
  mean over clients. It is measured on the global test set or, where there is none, on its own test
  part, weighted by its examples: the mean that the federation's figure is, too;
- in one place: one client holds all data, and takes as many steps, or passes over the data, as all
  clients take together;
- federated: the run as it is.

Alone and in one place there is nothing to aggregate: both are FedAvg with one client, without
privacy, attackers and secure sums.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from umbel.client.training import ClientRuntime
from umbel.core import run_file
from umbel.core.errors import InputError, suggest
from umbel.core.run_file import Attack, Privacy, RunFile, SecureAggregation, Split, Strategy
from umbel.core.trees import Model
from umbel.server.sampling import cohort_size
from umbel.simulations.located import located
from umbel.simulations.prepare import Prepared, prepare
from umbel.simulations.simulate import simulate
from umbel.tasks.evaluate import evaluate

RECIPES = "umbel.simulations.recipes"

Figures = dict[str, float]


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="umbel bench baselines")
    found.add_argument("recipe", help="a run file, or the name of a recipe")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    found.add_argument(
        "--clients", type=int, help="how many of them train alone, evenly spaced; default: all"
    )
    return found


def place(recipe: str) -> str:
    """The path of a run file or of a recipe.

    Raises:
        InputError: there is neither.
    """
    if Path(recipe).is_file():
        return recipe
    path = files(RECIPES).joinpath(f"{recipe}.toml")
    if not path.is_file():
        known = [f.name[:-5] for f in files(RECIPES).iterdir() if f.name.endswith(".toml")]
        raise InputError(
            f"no run file and no recipe '{recipe}'",
            where="umbel bench baselines",
            fix=suggest(recipe, known),
        )
    return str(path)


def read(path: str, settings: list[str]) -> RunFile:
    """The run, measured at its end alone.

    Raises:
        InputError: it cannot be read, or it is of a kind that has no such baselines.
    """
    run = run_file.load(path, [*settings, "evaluate.every=0", "evaluate.per_client=false"])
    if run.continual.experiences > 1 or run.task.kind == "kmeans":
        what = "of experiences" if run.continual.experiences > 1 else "of kind 'kmeans'"
        raise InputError(
            f"a run {what} has no baselines of this form",
            where="umbel bench baselines",
            fix="name another; kmeans in a federation is kmeans in one place, whatever the split",
        )
    return run


def plain(run: RunFile) -> RunFile:
    """The run by FedAvg in clear, with the same cohorts."""
    strategy = Strategy(cohort=run.strategy.cohort, weights=run.strategy.weights)
    return run.model_copy(
        update={
            "strategy": strategy,
            "privacy": Privacy(),
            "secure_aggregation": SecureAggregation(),
            "attack": Attack(),
        }
    )


def own_rounds(prepared: Prepared) -> int:
    """How many rounds a client takes part in, on average and rounded; at least one."""
    clients, run = len(prepared.data.names), prepared.run
    return max(1, round(run.run.rounds * cohort_size(run.strategy, clients) / clients))


def of_rounds(run: RunFile, rounds: int) -> RunFile:
    """The run with this many rounds, over which schedules are counted."""
    return run.model_copy(update={"run": run.run.model_copy(update={"rounds": rounds})})


def pooled(prepared: Prepared) -> RunFile:
    """The run with all data at one client, which takes the steps of all."""
    run = prepared.run
    section = run.client
    if section.local_steps is None:
        run = of_rounds(run, own_rounds(prepared))
    else:
        cohort = cohort_size(run.strategy, len(prepared.data.names))
        section = section.model_copy(update={"local_steps": section.local_steps * cohort})
    data = run.data.model_copy(update={"split": Split(kind="iid", clients=1)})
    return run.model_copy(update={"data": data, "client": section, "strategy": Strategy()})


def alone(runtime: ClientRuntime, prepared: Prepared, client: int) -> Model:
    """The model that one client arrives at by itself, after all rounds of the runtime's run."""
    model, name = prepared.model(), prepared.data.names[client]
    examples = prepared.data.train_part(client)
    for number in range(1, runtime.run.run.rounds + 1):
        delta = runtime.train(number, name, examples, model).delta
        model = Model(*({n: t + delta[n][0] for n, t in tree.items()} for tree in model))
    return model


def start(prepared: Prepared) -> Figures:
    """The initial model on the global test set, or on the union of the clients'.

    Raises:
        InputError: there is neither.
    """
    data = prepared.data
    test = data.test if data.test is not None else data.client_test
    if test is None:
        raise InputError(
            "the run has no test examples",
            where="umbel bench baselines",
            fix="--set data.holdout=0.2",
        )
    means = evaluate(prepared.task, prepared.module, test)[1]
    return {**means, **prepared.task.derived(means)}


def each_alone(prepared: Prepared, clients: int | None = None) -> Figures:
    """The mean figures of clients that train by themselves.

    Args:
        prepared: a run whose strategy is FedAvg.
        clients: how many of them, evenly spaced; ``None``: all.
    """
    run, data = of_rounds(prepared.run, own_rounds(prepared)), prepared.data
    runtime = ClientRuntime(run, prepared.task, prepared.strategy.client)
    count = len(data.names)
    chosen = range(0, count, max(1, count // (clients or count)))[: clients or count]
    found: list[tuple[int, Figures]] = []
    for client in chosen:
        test = data.test if data.test is not None else data.test_part(client)
        if test is not None:
            found.append(runtime.evaluate(test, alone(runtime, prepared, client)))
    total = sum(examples for examples, _ in found)
    means = {
        name: sum(examples * figures[name] for examples, figures in found) / total
        for name in found[0][1]
    }
    return {**means, **prepared.task.derived(means)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Name of the way -> name of the figure -> value."""
    run = located(read(place(options.recipe), options.set))
    with tempfile.TemporaryDirectory() as store:
        run = run.model_copy(update={"run": run.run.model_copy(update={"store": store})})
        prepared = prepare(plain(run))
        found = {
            "start": start(prepared),
            "alone": each_alone(prepared, options.clients),
            "in one place": dict(simulate(pooled(prepared)).metrics),
            "federated": dict(simulate(run).metrics),
        }
    shared = set.intersection(*(set(figures) for figures in found.values()))
    return {
        "recipe": run.run.name,
        "clients": len(prepared.data.names),
        "alone": options.clients or len(prepared.data.names),
        "figures": {
            way: {n: v for n, v in figures.items() if n in shared} for way, figures in found.items()
        },
    }


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    figures = result["figures"]
    names = list(figures["start"])
    table = Table(result["recipe"], *names)
    for way, values in figures.items():
        table.add_row(way, *(f"{values[n]:.3f}" for n in names))
    Console(width=100).print(table)
    print(f"{result['clients']} clients; alone: the mean of {result['alone']}")


def main() -> None:
    """From the command line."""
    show(measure(parser().parse_args()))


if __name__ == "__main__":
    main()
