"""Each client alone and all data in one place: the same steps, the same figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from umbel.cli.main import run as command
from umbel.core.errors import InputError
from umbel.core.run_file import resolve
from umbel.simulations.benchmarks import baselines
from umbel.simulations.benchmarks.baselines import own_rounds, plain, pooled
from umbel.simulations.prepare import prepare

TABLE = """
[run]
name = "small"
rounds = 4
processes = 0

[data]
name = "digits"
split = { kind = "shards", clients = 4, shards_per_client = 2 }

[task]
kind = "classification"
model = "logistic"

[client]
lr = 0.1
batch_size = 32
local_steps = 5

[strategy]
name = "fedadam"
cohort = 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(TABLE)
    return str(path)


def test_alone_start_and_in_one_place_stand_beside_the_run(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["bench", "baselines", recipe, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    accuracy = {way: figures["accuracy"] for way, figures in found["figures"].items()}
    assert found["clients"] == found["alone"] == 4
    # Two shards of labels: a client alone knows four classes at most.
    assert accuracy["start"] < 0.3 < accuracy["in one place"]
    assert accuracy["alone"] < 0.5 < accuracy["in one place"]
    assert "loss" in found["figures"]["federated"]


def test_all_take_the_same_steps(recipe: str) -> None:
    prepared = prepare(plain(baselines.read(recipe, [])))
    assert prepared.run.strategy.name == "fedavg"
    assert own_rounds(prepared) == 2
    one = pooled(prepared)
    assert (one.run.rounds, one.client.local_steps) == (4, 10)
    run = prepared.run
    section = run.client.model_copy(update={"local_steps": None, "local_epochs": 1})
    passes = prepared._replace(run=run.model_copy(update={"client": section}))
    assert (pooled(passes).run.rounds, pooled(passes).client.local_steps) == (2, None)


def test_the_model_in_one_place_holds_all_examples(recipe: str) -> None:
    prepared = prepare(plain(baselines.read(recipe, [])))
    whole = prepare(pooled(prepared)).data.train_holdings.sizes().tolist()
    assert whole == [prepared.data.train_holdings.sizes().sum()]


def test_runs_without_such_baselines_and_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run file and no recipe 'digits-simclt'") as caught:
        baselines.place("digits-simclt")
    assert "digits-simclr" in (caught.value.fix or "")
    with pytest.raises(InputError, match="of kind 'kmeans'"):
        baselines.read(baselines.place("digits-kmeans"), [])
    nothing = resolve({"data": {"name": "digits", "holdout": 0.0}, "task": {"kind": "autoencoder"}})
    with pytest.raises(InputError, match="no test examples"):
        baselines.start(prepare(plain(nothing)))
