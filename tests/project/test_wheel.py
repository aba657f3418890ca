"""The sdist and the wheel: what they hold, and that the wheel runs where the checkout is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUN_FILE = """
[run]
rounds = 2
[data]
name = "digits"
split = { kind = "iid", clients = 4 }
[task]
kind = "classification"
[strategy]
cohort = 2
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel that was built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def elsewhere(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of another environment: the wheel, and this environment's other packages."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    (wheel,) = built.glob("*.whl")
    done = subprocess.run(
        [*pip, "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    # A .pth line adds a folder and does not read the .pth files in it: the editable install of the
    # checkout stays out of sight.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def outside(command: Sequence[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command away from the checkout, with nothing of this process's Python set-up."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def expected() -> set[str]:
    """The files of the namespace, by git where it can be asked: no cache, nothing half-written."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list to compare with")
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    files = [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    inside = {f"umbel/{path}" for path in files if path.parts[0] in folders}
    return inside | {"umbel/__init__.py", "umbel/py.typed"}


def test_wheel_holds_the_namespace_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    code = {name for name in names if ".dist-info/" not in name}
    assert code == expected()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "umbel/simulations/recipes/digits-dirichlet.toml" in code


def test_sdist_holds_every_folder_once_and_no_symlink(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [m.name for m in members if m.issym() or m.islnk()]
    inside = {m.name.partition("/")[2] for m in members}
    assert {p for p in inside if p.startswith("src/")} == {
        "src/umbel/__init__.py",
        "src/umbel/py.typed",
    }
    assert {"README.md", "LICENSE", "Makefile", "tests/conftest.py"} <= inside


def test_installed_wheel_is_the_copy_that_runs(elsewhere: Path, tmp_path: Path) -> None:
    shown = outside([elsewhere / "python", "-c", "import umbel; print(umbel.__file__)"], tmp_path)
    assert Path(shown.stdout.strip()).is_relative_to(elsewhere.parent)
    assert outside([elsewhere / "umbel", "--version"], tmp_path).stdout.strip().endswith("0.1.0")
    assert "simulate" in outside([elsewhere / "umbel", "--help"], tmp_path).stdout


def test_installed_wheel_simulates(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN_FILE)
    command: list[str | Path] = [elsewhere / "umbel", "simulate", "run.toml", "--format", "json"]
    result = json.loads(outside(command, tmp_path).stdout)
    assert result["status"] == "finished"
    assert result["rounds"] == 2
    assert result["metrics"]["accuracy"] > 0.3
    assert (tmp_path / result["model"]).is_file()
