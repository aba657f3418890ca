"""Folders, symlinks, wheel, linters and floors name the same packages."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_has_its_symlink_and_every_symlink_its_folder() -> None:
    links = {path.name: path for path in (ROOT / "src" / "umbel").iterdir() if path.is_symlink()}
    assert links.keys() == FOLDERS
    for name, link in links.items():
        assert link.readlink() == Path("../..") / name


def test_the_namespace_holds_nothing_but_symlinks_and_two_files() -> None:
    entries = (ROOT / "src" / "umbel").iterdir()
    files = {p.name for p in entries if not p.is_symlink() and p.name != "__pycache__"}
    assert files == {"__init__.py", "py.typed"}


def test_no_real_folder_shadows_the_namespace() -> None:
    assert not (ROOT / "umbel").exists()


def test_wheel_maps_every_folder(pyproject: dict[str, Any]) -> None:
    wheel = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["sources"] == {"src/umbel": "umbel"} | {n: f"umbel/{n}" for n in FOLDERS}
    assert set(wheel["only-include"]) == {*FOLDERS, "src/umbel/__init__.py", "src/umbel/py.typed"}


def test_sdist_holds_every_folder_that_the_wheel_is_built_from(pyproject: dict[str, Any]) -> None:
    targets = pyproject["tool"]["hatch"]["build"]["targets"]
    assert set(targets["wheel"]["only-include"]) <= set(targets["sdist"]["only-include"])


def test_bare_imports_of_every_folder_are_banned(pyproject: dict[str, Any]) -> None:
    banned = pyproject["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert banned.keys() == FOLDERS


def test_every_folder_has_its_floor(pyproject: dict[str, Any]) -> None:
    contract = pyproject["tool"]["importlinter"]["contracts"][0]
    floors = [name.strip() for layer in contract["layers"] for name in layer.split("|")]
    assert sorted(floors) == sorted(FOLDERS)
