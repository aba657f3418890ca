"""What people get wrong in a run file, and what they are told: value, bound, place, next step."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from umbel.core import run_file, settings
from umbel.core.errors import InputError, UmbelError

BASE: dict[str, Any] = {"data": {"name": "digits"}, "task": {"kind": "classification"}}

WRONG = {
    "[client]\nlearning_rat = 0.1": ("unknown key 'learning_rat' in [client]; did you mean 'lr'?"),
    "[client]\nlr = -1": "[client]: lr = -1: must be a number above 0; the default is 0.1",
    '[client]\nlr = "0.1"': (
        "[client]: lr = '0.1': must be a number above 0; write lr = 0.1 without quotes"
    ),
    "[client]\nlr = nan": "lr = nan: must be a finite number above 0",
    "[client]\nlr = inf": "lr = inf: must be a finite number above 0",
    "[client]\nlr = true": "lr = true: must be a number above 0",
    "[client]\nbatch_size = 0": "batch_size = 0: must be a whole number at least 1, or 'full'",
    '[client]\nbatch_size = "ful"': "or 'full'; did you mean 'full'?",
    "[client]\nmomentum = 1.0": "momentum = 1.0: must be a number at least 0 and below 1",
    "[client]\nlocal_epochs = 1\nlocal_steps = 2": (
        "[client]: local_epochs and local_steps exclude each other; remove one"
    ),
    "[client]\nnesterov = true": "nesterov needs a momentum above 0; set momentum = 0.9",
    '[client]\nschedule = "cosin"': "[client]: schedule = 'cosin': must be a table, or 'constant'",
    '[client]\nschedule = { kind = "step", steps = 3 }': (
        "unknown key 'steps' in [client.schedule]; did you mean 'step'?"
    ),
    '[client]\nschedule = { kind = "step", factor = 0 }': (
        "[client.schedule]: factor = 0: must be a number above 0 and at most 1"
    ),
    '[client]\nprecision = "fp16"': "must be 'float32', 'bfloat16' or 'float16'",
    "[strategy]\ncohort = 0": (
        "[strategy]: cohort = 0: must be a whole number at least 1, or a number above 0 and at most"
    ),
    "[strategy]\ncohort = 1.5": "cohort = 1.5: must be a whole number at least 1, or a number",
    "[strategy]\nquorum = 0": "quorum = 0: must be a whole number at least 1",
    '[strategy]\nweights = "exampls"': "did you mean 'examples'?",
    "[run]\nrounds = 1e3": "must be a whole number at least 1; write rounds = 1000",
    "[run]\nrounds = true": "rounds = true: must be a whole number",
    "[run]\nseed = -1": "seed = -1: must be a whole number at least 0",
    '[run]\nname = "a b"': "name = 'a b': must be text matching",
    "[run]\nstore = 3": 'store = 3: must be text; write store = "3"',
    '[evaluate]\nmetrics = "accuracy"': (
        "metrics = 'accuracy': must be a list of text; write metrics = ['accuracy']"
    ),
    '[evaluate]\nmetrics = ["accuracy", 1]': "metrics[1] = 1: must be text",
    '[privacy]\nunit = "client"': "unit = 'client' needs a budget or a noise; set epsilon = 3.0",
    "[privacy]\nclip_norm = 2.0": "unit = 'example' needs a budget or a noise",
    "[secure_aggregation]\nmin_cohort = 5": "nothing says whether it is on; set enabled = true",
    "[secure_aggregation]\nbits = 8": "bits = 8: must be a whole number at least 16 and at most 32",
    '[attack]\nkind = "nan"': "[attack]: one of count and fraction says how many are hostile; "
    "set count = 1",
    "[clint]\nlr = 1": "unknown table [clint]; did you mean 'client'?",
    "run = 3": "run = 3 is not a table; write [run]",
    "lr = 0.1": "key 'lr' stands outside any table; write it below [client]",
    '[data]\nname = "digits"\nsplit = "iid"': 'must be a table; split = { kind = "iid" }',
    '[data]\nname = "digits"\nsplit = { clients = 3 }': "'kind' is missing in [data.split]",
    '[data]\nnam = "digits"': "'name' is missing in [data]; did you mean 'name' by 'nam'?",
    '[data]\nname = "digits"\nholdout = 1.5': (
        "holdout = 1.5: must be a number at least 0 and below 1"
    ),
    '[task]\nkind = "classification"\nmodel = 3': "[task]: model = 3: must be a table, or text",
    '[task]\nkind = "classification"\nmodel = { hidden = [3] }': (
        "'name' is missing in [task.model]"
    ),
    "[task]": "'kind' is missing in [task]; add kind = …",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_run_file_says_what_where_and_what_next(text: str) -> None:
    with pytest.raises(InputError) as caught:
        run_file.resolve({**BASE, **tomllib.loads(text)})
    assert WRONG[text] in str(caught.value)
    assert caught.value.fix
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("table", ["data", "task"])
def test_a_missing_table_is_named(table: str) -> None:
    with pytest.raises(InputError, match=rf"table \[{table}\] is missing; add \[{table}\]"):
        run_file.resolve({name: rest for name, rest in BASE.items() if name != table})


def part(*, mu: settings.NonNegative, sizes: list[int] | None = None) -> None:
    """A named part; its keyword-only parameters are the schema."""


def test_keys_of_a_named_part_are_its_parameters() -> None:
    assert settings.arguments(part, {"mu": 1}, "[strategy]") == {"mu": 1.0, "sizes": None}
    for table, message in {
        "nu = 1": "unknown key 'nu' of strategy 'part' in [strategy]; known: mu, sizes",
        "cohrt = 1\nmu = 1": "did you mean 'cohort'?",
        "mu = -1": "[strategy]: mu = -1: must be a number at least 0; change mu",
        "": "'mu' is missing in [strategy]; add mu = …",
        'mu = 1\nsizes = ["a"]': "sizes[0] = 'a': must be a whole number",
    }.items():
        with pytest.raises(InputError) as caught:
            settings.arguments(
                part, tomllib.loads(table), "[strategy]", "strategy 'part'", also=["cohort"]
            )
        assert message in str(caught.value)


def test_an_error_prints_its_place_once_and_its_fix_last() -> None:
    assert str(UmbelError("lr = -1", where="[client]", fix="raise it")) == (
        "[client]: lr = -1; raise it"
    )
    assert str(UmbelError("no key in [client]", where="[client]")) == "no key in [client]"


def write(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('[data]\nname = "digits"\n[task]\nkind = "classification"\nmodel = "mlp"\n')
    return path


def test_a_budget_alone_protects_each_example(tmp_path: Path) -> None:
    assert run_file.load(write(tmp_path)).privacy.unit == "none"
    assert run_file.load(write(tmp_path), ["privacy.epsilon=3.0"]).privacy.unit == "example"
    off = ["privacy.epsilon=3.0", "privacy.unit=none"]
    assert run_file.load(write(tmp_path), off).privacy.unit == "none"


def test_set_overrides_any_key(tmp_path: Path) -> None:
    overrides = [
        "client.lr=0.5",
        "strategy.name=fedadam",  # a bare word is text
        "attack.kind=nan",  # and so is TOML's number that is none
        "attack.count=1",
        'run.name="quoted"',
        "task.model.hidden=[8, 4]",  # below a model that the file gives by name alone
        "data.split.kind=iid",  # a table that the file has not
        "evaluate.metrics=['accuracy']",
    ]
    run = run_file.load(write(tmp_path), overrides)
    assert run.attack is not None
    assert run.attack.kind == "nan"
    assert run.client.lr == 0.5
    assert run.strategy.name == "fedadam"
    assert run.run.name == "quoted"
    assert isinstance(run.task.model, run_file.Part)
    assert run.task.model.name == "mlp"
    assert run.task.model.parameters() == {"hidden": [8, 4]}
    assert run.data.split is not None
    assert run.data.split.kind == "iid"
    assert run.evaluate.metrics == ("accuracy",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1", "'lr=1' is not section.key=value; e.g. --set client.lr=0.1"),
        ("client.lr", "'client.lr' is not section.key=value"),
        ("client.=1", "is not section.key=value"),
        ("client.lr.x=1", "lr = {'x': 1}: must be a number above 0"),
        ("client.lrr=1", "unknown key 'lrr' in [client]; did you mean 'lr'?"),
        ("clint.lr=1", "unknown table [clint]; did you mean 'client'?"),
        ("client.lr=-1", "lr = -1: must be a number above 0"),
        ("run.seed=1 2", "seed = '1 2': must be a whole number"),
    ],
)
def test_a_wrong_override_is_one_error(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        run_file.load(write(tmp_path), [override])
    assert message in str(caught.value)


def test_a_file_that_is_missing_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml: cannot read the run file: No such file"):
        run_file.load(tmp_path / "none.toml")
    path = tmp_path / "run.toml"
    path.write_text("[client\nlr = 1")
    with pytest.raises(InputError, match=r"run\.toml: not TOML: .*line 1"):
        run_file.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not TOML"):
        run_file.load(path)


def test_a_resolved_run_file_survives_json(tmp_path: Path) -> None:
    run = run_file.load(write(tmp_path), ["evaluate.metrics=['accuracy']", "strategy.cohort=0.5"])
    assert run_file.resolve(run.model_dump(mode="json")) == run
