"""What a site's machine is, and how much of it a run may use.

For the worker alone: it is the process that trains.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

MB = 1_000_000


class Allowance(NamedTuple):
    """How much of the machine a run may use; ``None``: no bound.

    Args:
        threads: that compute.
        memory_mb: of main memory, in millions of bytes: all that the worker has allocated, PyTorch
            itself included.
        gpu_share: of each GPU's memory, above 0 and at most 1.
    """

    threads: int | None = None
    memory_mb: int | None = None
    gpu_share: float | None = None


class Bounds:
    """Keeps this process within a share, which may be another for each request.

    Args:
        threads: of this machine's operator, whatever a policy allows; ``None``: torch's choice.
    """

    def __init__(self, threads: int | None) -> None:
        import torch

        self._threads = threads or torch.get_num_threads()
        torch.set_num_threads(self._threads)
        self._kept = Allowance()

    def keep(self, share: Allowance) -> None:
        """From now on no more than this.

        Memory is bounded by the kernel (``RLIMIT_DATA``, Linux): what goes beyond is a failed
        allocation in the training, which the site answers as such, and no site that swaps.
        """
        if share == self._kept:
            return
        import torch

        threads = self._threads
        torch.set_num_threads(threads if share.threads is None else min(threads, share.threads))
        if sys.platform == "linux":
            import resource

            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            soft = hard if share.memory_mb is None else share.memory_mb * MB
            if hard != resource.RLIM_INFINITY:
                soft = min(soft, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        if torch.cuda.is_available():
            for device in range(torch.cuda.device_count()):
                torch.cuda.set_per_process_memory_fraction(share.gpu_share or 1.0, device)
        self._kept = share


def describe() -> dict[str, str]:
    """Processor, memory, GPU and system, for people; nothing that identifies the machine."""
    found = {"cpu": f"{os.cpu_count()} × {_processor()}"}
    with contextlib.suppress(ValueError, OSError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory"] = f"{total / 2**30:.0f} GiB"
    found["gpu"] = _gpus()
    found["system"] = f"{platform.system()} {platform.machine()}"
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in properties)
