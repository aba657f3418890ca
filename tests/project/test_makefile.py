"""The Makefile: its help is whole, and it says what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    # A make above this one must not hand its own flags and variables down.
    clean = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=timeout
    )


def test_help_is_the_default_and_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = re.findall(r"^  make (\S+) +\S", make().stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].split())


@pytest.mark.parametrize("python", ["false", "no-such-python", ""])
def test_an_old_or_missing_python_is_named_with_the_next_step(python: str, tmp_path: Path) -> None:
    done = make("demo", f"PYTHON={python}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert f"Umbel needs Python 3.11 or newer; '{python}' is not." in done.stderr
    assert "Next: " in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_missing_venv_module_is_named_with_the_next_step(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    python.chmod(0o755)
    done = make("install", f"PYTHON={python}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert "its venv module is missing" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_an_installed_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".installed").touch()
    done = make("install", f"VENV={tmp_path}", "PYTHON=false")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_demo_learns_and_draws(tmp_path: Path) -> None:
    # This environment stands for the one that `make` would install.
    demo, environment = tmp_path / "demo", Path(sys.prefix)
    stamp = environment / ".installed"
    done = make("demo", "-o", str(stamp), f"VENV={environment}", f"DEMO={demo}", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = re.findall(r"accuracy (0\.\d+)", done.stdout + done.stderr)
    assert float(rounds[-1]) > 0.85 > float(rounds[0])
    for name in ("split.png", "accuracy.png"):
        assert (demo / name).read_bytes().startswith(b"\x89PNG")
        assert str(demo / name) in done.stdout
