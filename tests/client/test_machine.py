"""How much of a machine a run may use: in a process of its own, as a worker is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from umbel.client.machine import describe

SCRIPT = """
import json, torch
from umbel.client.machine import Allowance, Bounds
bounds = Bounds(2)
told = {"at_first": torch.get_num_threads()}
bounds.keep(Allowance(threads=1, memory_mb=900))
told["bound"] = torch.get_num_threads()
try:
    torch.zeros(2_000_000_000, dtype=torch.uint8)
    told["allocated"] = True
except RuntimeError:
    told["allocated"] = False
told["small"] = int(torch.ones(1000).sum())
bounds.keep(Allowance(threads=64))
told["never_more"] = torch.get_num_threads()
torch.empty(2_000_000_000, dtype=torch.uint8)
print(json.dumps(told))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's bound")
def test_a_worker_keeps_within_its_allowance_and_only_as_long() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {
        "at_first": 2,
        "bound": 1,
        "allocated": False,
        "small": 1000,
        "never_more": 2,
    }


def test_a_machine_is_described_in_few_words() -> None:
    found = describe()
    assert found.keys() <= {"cpu", "memory", "gpu", "system"}
    assert {"cpu", "gpu", "system"} <= found.keys()
    assert all(0 < len(words) <= 100 for words in found.values())
