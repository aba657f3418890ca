from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# A machine under load is no reason to fail, and everybody tries the same examples. To look for new
# ones: pytest --hypothesis-profile=explore
settings.register_profile("explore", deadline=None, derandomize=False)
settings.register_profile("umbel", deadline=None, derandomize=True)
settings.load_profile("umbel")

# Torch's second thread gains nothing on models of a test's size; where the machine is busy it takes
# ten times as long as none, since threads spin while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts us in the background has us, and all children, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Plans of the engine that tests find, also those in processes of their own, stay among tests.
_cache = tempfile.TemporaryDirectory(prefix="umbel-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is missing."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("UMBEL_DATA", beside))
    if not root.is_dir():
        pytest.skip(f"no real data: {root} is missing; set UMBEL_DATA to the folder that holds it")
    return root
