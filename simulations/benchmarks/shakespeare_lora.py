"""LoRA on Shakespeare's speakers: base model, alone, together, all in one place, and every rule.

    python -m umbel.simulations.benchmarks.shakespeare_lora --data FOLDER [--seeds 3]

Runs the recipes shakespeare-base and shakespeare-lora; FOLDER holds ``tinyshakespeare/``. The base
model learns from half of the speakers; all figures are the loss, in nats a character, on the test
texts of the other half:

- zero-shot: the base model as it is;
- alone: each speaker trains its own adapter, with the settings of the recipe, for as many steps as
  it takes in the federation on average; the mean over speakers, weighted by their test windows;
- central: one adapter on all the speakers' words, for as many steps as all clients take together;
- together: the recipe, with each rule that averages adapters.

It exits with 1 where the federation is not 0.1 nats below zero-shot, or not below alone, or sends
more than 5 % of the parameters.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from umbel.client.training import ClientRuntime
from umbel.core.run_file import RunFile, load
from umbel.core.trees import Model
from umbel.simulations.located import located
from umbel.simulations.prepare import Prepared, prepare
from umbel.simulations.simulate import simulate
from umbel.tasks.evaluate import evaluate

RULES = {
    "fedit": [],
    "ffa-lora": ["task.adapter.freeze_a=true"],
    "rolora": [],
    "flexlora": [],
    "fedex-lora": ["task.adapter.residual=true"],
    "flora": ["task.adapter.residual=true"],
}
"""Strategy -> what its adapter needs."""


def recipe(name: str, data: Path, store: str, settings: list[str]) -> RunFile:
    """A recipe with the settings of this benchmark."""
    path = files("umbel.simulations.recipes").joinpath(f"{name}.toml")
    common = [f"data.path={data}", f"run.store={store}", "evaluate.every=0"]
    return load(str(path), [*common, *settings])


def zero_shot(prepared: Prepared) -> float:
    """The loss of the initial model on the union of the speakers' test texts."""
    assert prepared.data.client_test is not None
    return evaluate(prepared.task, prepared.module, prepared.data.client_test)[1]["loss"]


def alone(run: RunFile, prepared: Prepared) -> float:
    """The loss of each speaker's own adapter on its own test text, weighted by its windows."""
    runtime = ClientRuntime(run, prepared.task, prepared.strategy.client)
    total, count = 0.0, 0
    for place, name in enumerate(prepared.data.names):
        test = prepared.data.test_part(place)
        if test is None:
            continue
        model = prepared.model()
        for number in range(1, run.run.rounds + 1):
            delta = runtime.train(number, name, prepared.data.train_part(place), model).delta
            model = Model({n: p + delta[n][0] for n, p in model.params.items()}, model.buffers)
        examples, metrics = runtime.evaluate(test, model)
        total, count = total + metrics["loss"] * examples, count + examples
    return total / count


def figures(data: Path, store: str, seed: int) -> dict[str, float]:
    """Name -> loss, of one seed; ``wire`` is the share of the parameters that travels."""
    run = located(recipe("shakespeare-lora", data, store, [f"run.seed={seed}"]))
    prepared = prepare(run)
    travelling = sum(p.numel() for p in prepared.model().params.values())
    whole = sum(p.numel() for p in prepared.module.parameters())
    cohort, steps = int(run.strategy.cohort or 0), run.client.local_steps or 0
    fewer = round(run.run.rounds * cohort / len(prepared.data.names))
    own = run.run.model_copy(update={"rounds": fewer})
    pooled = [
        f"run.seed={seed}",
        'data.split={kind="iid",clients=1}',
        "strategy.cohort=1",
        f"client.local_steps={steps * cohort}",
    ]
    found = {
        "wire": travelling / whole,
        "zero-shot": zero_shot(prepared),
        "alone": alone(run.model_copy(update={"run": own}), prepared),
        "central": simulate(recipe("shakespeare-lora", data, store, pooled)).metrics["loss"],
    }
    for rule, needs in RULES.items():
        settings = [f"run.seed={seed}", f"strategy.name={rule}", *needs]
        table = recipe("shakespeare-lora", data, store, settings)
        found[rule] = simulate(table).metrics["loss"]
    return found


def main() -> None:
    """Prints the table; exits 1 where a figure to reach is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        simulate(recipe("shakespeare-base", given.data, store, []))
        seeds = [figures(given.data, store, seed) for seed in range(1, given.seeds + 1)]
    table = Table("loss, nats", *(f"seed {i}" for i in range(1, given.seeds + 1)), "mean")
    mean = {name: statistics.mean(found[name] for found in seeds) for name in seeds[0]}
    for name in mean:
        if name != "wire":
            table.add_row(name, *(f"{found[name]:.3f}" for found in seeds), f"{mean[name]:.3f}")
    console = Console(width=100)
    console.print(table)
    console.print(f"on the wire: {mean['wire']:.1%} of the parameters")
    together = mean["fedit"]
    met = together <= mean["zero-shot"] - 0.1 and together < mean["alone"] and mean["wire"] <= 0.05
    raise SystemExit(int(not met))


if __name__ == "__main__":
    main()
