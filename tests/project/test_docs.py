"""What the documents say is tried: blocks run or parse, links lead somewhere, pages are fresh."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

from umbel.core.run_file import RunFile, resolve

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = "# run.toml\n"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """What follows each ``$`` of the console blocks, without its comment."""
    lines = "".join(blocks(text, "console")).splitlines()
    return [line[2:].partition("#")[0].strip() for line in lines if line.startswith("$ ")]


def marked(command: str) -> Any:
    flower = "flower" in command
    return pytest.param(command, marks=[pytest.mark.flower, pytest.mark.slow] if flower else [])


UMBEL = [marked(c) for c in commands(README) if c.startswith("umbel ")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's run file in it."""
    folder = tmp_path_factory.mktemp("readme")
    (block,) = [b for b in blocks(README, "toml") if b.startswith(RUN)]
    (folder / "run.toml").write_text(block, encoding="utf-8")
    return folder


def execute(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", UMBEL)
def test_readme_command_runs(command: str, desk: Path) -> None:
    execute(shlex.split(command), desk)


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_readme_python_runs(block: str, desk: Path) -> None:
    execute([sys.executable, "-c", block], desk)


def test_readme_run_file_is_whole_and_short() -> None:
    (block,) = [b for b in blocks(README, "toml") if b.startswith(RUN)]
    resolve(tomllib.loads(block))
    assert len([line for line in block.splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_toml_parses_and_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in blocks(text, "toml"):
        for name, table in tomllib.loads(block).items():
            base = {"data": {"name": "digits"}, "task": {"kind": "classification"}}
            resolve(base | {name: table})
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands(text):
        verb, *arguments = command.split()
        assert verb in {"make", "umbel", "git", "cd", "docker"}, command
        if verb == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_import_what_there_is(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in slugs, target


def test_generated_pages_are_up_to_date() -> None:
    execute([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], ROOT)


def test_every_key_of_the_run_file_says_what_it_means() -> None:
    page = (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8")
    tables, _, parts = page.partition("\n## Strategies")
    for name in RunFile.model_fields:
        assert f"`[{name}]`" in tables
    rows = re.findall(r"^\| `([^`]+)` \|.*\|([^|]*)\|$", page, re.MULTILINE)
    assert len(rows) > 40
    assert not [key for key, meaning in rows if not meaning.strip()]
    assert parts


def test_every_verb_and_option_says_what_it_does() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|([^|]*)\|$", page, re.MULTILINE)
    assert len(rows) > 10
    assert not [name for name, meaning in rows if not meaning.strip()]
