"""What docs/secure-aggregation.md says of the tests is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "secure-aggregation.md").read_text(encoding="utf-8")
HERE = Path(__file__).parent
HOSTILE = (HERE / "test_secure_hostile_server.py").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_is_there():
    named = set(re.findall(r"`(test_\w+)", PAGE))
    assert len(named) >= 8
    files = [*HERE.glob("*.py"), ROOT / "tests" / "server" / "test_secure_grid.py"]
    there = "".join(path.read_text(encoding="utf-8") for path in files)
    assert [name for name in named if f"def {name}(" not in there] == []


def test_as_many_scripts_as_the_page_says():
    (said,) = re.findall(r"holds (\d+) scripts", PAGE)
    scripts = re.findall(r'^    \("[^"]+", .*Reason\.\w+\),$', HOSTILE, re.MULTILINE)
    assert len(scripts) == int(said)
