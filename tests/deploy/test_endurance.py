"""Short forms of the trials of `python -m umbel.deploy.endurance`."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbel.core.errors import InputError
from umbel.deploy.endurance import trouble
from umbel.deploy.endurance.kill import kill_matrix
from umbel.deploy.endurance.load import load

pytestmark = [
    pytest.mark.flower,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc"),
]


def test_a_kill_in_any_phase_changes_neither_model_nor_ledger(tmp_path: Path) -> None:
    cells = kill_matrix(tmp_path / "network", ["run", "site", "worker"], [3])
    assert [cell.faults for cell in cells] == [()] * 3


def test_a_network_that_was_cut(tmp_path: Path) -> None:
    assert trouble.partition(tmp_path / "network", 8.0).faults == ()


def test_databases_that_were_locked(tmp_path: Path) -> None:
    assert trouble.locked(tmp_path / "network", 5.0).faults == ()


def test_a_disk_that_was_full(tmp_path: Path) -> None:
    try:
        found = trouble.full(tmp_path / "network", 5.0)
    except InputError as refused:
        pytest.skip(refused.message)
    assert found.faults == ()


def test_idle_sites_beside_some_that_train(tmp_path: Path) -> None:
    found = load(tmp_path / "network", idle=20, training=3, seconds=10.0)
    assert found.faults == ()
    assert found.lost == 0
    assert found.rounds > 0
    assert found.beats >= 20
