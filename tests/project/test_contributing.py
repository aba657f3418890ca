"""CONTRIBUTING's "add a strategy in one file", walked through; and that nobody skipped a step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from umbel.core import registry
from umbel.core.run_file import resolve
from umbel.simulations.simulate import Outcome, simulate

ROOT = Path(__file__).parents[2]
STRATEGIES = sorted(registry.known("strategies"))


@pytest.fixture(scope="module")
def walkthrough() -> str:
    """The strategy's file, as CONTRIBUTING has it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- strategy -->\n```python\n(.*?)```", text, re.DOTALL)
    return str(block)


def run(store: Path, strategy: str, **parameters: float) -> Outcome:
    table = {
        "run": {"rounds": 3, "seed": 5, "store": str(store)},
        "data": {"name": "digits", "split": {"kind": "iid", "clients": 6}},
        "task": {"kind": "classification"},
        "strategy": {"name": strategy, "cohort": 3, **parameters},
        "evaluate": {"every": 0},
    }
    return simulate(resolve(table), engine="sequential")


def model(outcome: Outcome) -> dict[str, torch.Tensor]:
    assert outcome.model is not None
    return load_file(outcome.model)


def test_walkthrough_is_the_built_in_file_and_at_most_sixty_lines(walkthrough: str) -> None:
    assert walkthrough == (ROOT / "strategies" / "fedavgm.py").read_text(encoding="utf-8")
    assert len(walkthrough.splitlines()) <= 60


def test_walkthrough_equals_the_built_in_strategy(
    walkthrough: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "fedavgm.py").write_text(walkthrough, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    own = model(run(tmp_path / "own", "my_package.fedavgm:fedavgm", momentum=0.7))
    built_in = model(run(tmp_path / "built-in", "fedavgm", momentum=0.7))
    plain = model(run(tmp_path / "plain", "fedavg"))
    assert own.keys() == built_in.keys()
    assert all(torch.equal(own[name], built_in[name]) for name in own)
    assert not all(torch.equal(own[name], plain[name]) for name in own)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_its_conformance_row(name: str) -> None:
    table = (ROOT / "tests" / "helpers" / "conformance.py").read_text(encoding="utf-8")
    assert re.search(rf'^    Row\("{re.escape(name)}", ', table, re.MULTILINE)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_its_line_in_the_docs(name: str) -> None:
    page = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    assert re.search(rf"^- `{re.escape(name)}`: \w", page, re.MULTILINE)


def test_the_walkthrough_with_state_is_that_of_the_built_in_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- state -->\n```python\n(.*?)```", text, re.DOTALL)
    source = (ROOT / "strategies" / "scaffold.py").read_text(encoding="utf-8")
    header, _, body = str(block).partition("\n")
    for part in (header, *body.split("\n\n")):
        assert part.rstrip() in source


WALKTHROUGHS = {
    "meta": "strategies/fomaml.py",
    "personal": "strategies/fedper.py",
    "asynchronous": "strategies/fedbuff.py",
    "robust": "strategies/trimmed_mean.py",
    "defence": "strategies/defences/ewc.py",
}


@pytest.mark.parametrize(("family", "file"), WALKTHROUGHS.items())
def test_the_walkthrough_of_each_family_is_that_of_the_built_in_file(
    family: str, file: str
) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"<!-- {family} -->\n```python\n(.*?)```", text, re.DOTALL)
    source = (ROOT / file).read_text(encoding="utf-8")
    for part in str(block).split("\n\n"):
        assert part.rstrip() in source


@pytest.mark.parametrize("name", sorted(registry.known("defences")))
def test_every_defence_has_its_line_in_the_docs(name: str) -> None:
    page = (ROOT / "docs" / "continual.md").read_text(encoding="utf-8")
    assert re.search(rf"^- `{re.escape(name)}`: \w", page, re.MULTILINE)


def test_a_defence_may_be_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_defences"
    package.mkdir()
    source = (ROOT / "strategies" / "defences" / "ewc.py").read_text(encoding="utf-8")
    (package / "ewc.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for name in ("my_defences.ewc:ewc", "ewc"):
        table = {
            "run": {"rounds": 4, "seed": 5, "store": str(tmp_path / "runs")},
            "data": {"name": "digits", "split": {"kind": "iid", "clients": 3}},
            "task": {"kind": "classification"},
            "continual": {"experiences": 2, "defence": {"name": name, "examples": 3}},
            "evaluate": {"every": 0},
        }
        found.append(model(simulate(resolve(table), engine="sequential")))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[1])
