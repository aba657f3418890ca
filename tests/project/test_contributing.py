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
    table = (ROOT / "tests" / "strategies" / "test_conformance.py").read_text(encoding="utf-8")
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
