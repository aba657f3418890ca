"""What `pip install umbel` does not bring is asked for by name."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from umbel.core.errors import InputError
from umbel.core.extras import extra
from umbel.core.run_file import resolve
from umbel.simulations.simulate import simulate

ROOT = Path(__file__).parents[2]
RUN = {
    "run": {"rounds": 1},
    "data": {"name": "digits", "split": {"kind": "iid", "clients": 2}},
    "task": {"kind": "classification"},
}


def test_every_extra_that_an_error_names_is_there() -> None:
    named = set()
    for init in ROOT.glob("*/__init__.py"):
        for path in init.parent.rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            named |= set(re.findall(r"umbel\[([a-z]+)\]", text))
            named |= set(re.findall(r"with extra\(\"(\w+)\"", text))
    named.discard("name")  # what the documentation of `extra` calls it
    assert {"llm", "plots", "ray"} <= named
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert named <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_an_engine_names_the_extra_that_it_needs(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("umbel.simulations.ray_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    run = resolve({**RUN, "run": {"rounds": 1, "store": str(tmp_path)}})
    with pytest.raises(InputError, match="package ray") as raised:
        simulate(run, engine=engine)
    assert (raised.value.where, raised.value.fix) == (
        f"--engine {engine}",
        "pip install 'umbel[ray]'",
    )


def test_other_errors_of_an_import_pass() -> None:
    with pytest.raises(ImportError, match="nothing_of_that_name"), extra("plots", "here"):
        from umbel.core.errors import nothing_of_that_name  # type: ignore[attr-defined]  # noqa: F401
