from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A machine under load is no reason to fail.
settings.register_profile("umbel", deadline=None)
settings.load_profile("umbel")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is missing."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("UMBEL_DATA", beside))
    if not root.is_dir():
        pytest.skip(f"no real data: {root} is missing; set UMBEL_DATA to the folder that holds it")
    return root
