"""What loads what, measured in fresh interpreters."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "grpc": "grpcio",
    "google": "protobuf",
}

HEAVY = {"torch", "flwr", "ray", "sklearn", "matplotlib", "pandas", "transformers"}


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that are loaded after ``statement`` in a fresh interpreter."""
    script = (
        f"import json, sys\n{statement}\nprint(json.dumps(sorted({{m.split('.')[0] "
        "for m in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_probe_sees_a_heavy_module() -> None:
    assert "sklearn" in loaded_by("import sklearn")


def test_importing_umbel_loads_nothing_but_the_standard_library() -> None:
    assert loaded_by("import umbel") - loaded_by("") == {"umbel"}


@pytest.mark.parametrize(
    "statement",
    [
        "import umbel.core.errors, umbel.core.registry, umbel.core.run_file",
        "from umbel.core import registry; [registry.known(kind) for kind in registry.KINDS]",
        "import umbel.cli.main",
    ],
)
def test_help_lists_and_run_files_load_nothing_heavy(statement: str) -> None:
    assert not loaded_by(statement) & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list", "strategies"]])
def test_verbs_that_only_tell_load_nothing_heavy(arguments: list[str]) -> None:
    run = (
        f"sys.argv = {['umbel', *arguments]!r}\n"
        "from umbel.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert not loaded_by(run) & HEAVY


def imported(path: Path) -> set[str]:
    """The top-level names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = sum(
        (lines for name, lines in extras.items() if name != "dev"), project["dependencies"]
    )
    declared = {re.split(r"[^\w-]", line)[0] for line in wanted}
    # Programs that run in environments of their own, such as the peers of a benchmark, lie in
    # folders that are no packages.
    modules = [
        path
        for init in ROOT.glob("*/__init__.py")
        for path in init.parent.rglob("*.py")
        if (path.parent / "__init__.py").exists()
    ]
    used = set().union(*map(imported, modules)) - sys.stdlib_module_names - {"umbel"}
    assert {"torch", "sklearn"} <= used
    assert {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in used} <= declared
