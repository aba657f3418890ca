"""Where a client computes, in which precision, and from which seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from umbel.core.errors import InputError
from umbel.core.run_file import Client

_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def choose(section: Client) -> torch.device:
    """The device of ``[client]``; ``auto`` is cuda where there is one, else mps, else cpu.

    Raises:
        InputError: no such device here, or a precision that it does not have.
    """
    name = section.device
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    here = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here.get(device.type, False):
        known = ", ".join(kind for kind, there in here.items() if there or kind == device.type)
        problem = "is not on this machine" if device.type in here else "is not a known device"
        raise InputError(
            f"device = '{name}' {problem}",
            where="[client]",
            fix=f"use one of auto, {known}" if device.type not in here else "use auto or cpu",
        )
    if section.precision == "float16" and device.type != "cuda":
        raise InputError(
            f"precision = 'float16' needs a CUDA device, but the device is '{device}'",
            where="[client]",
            fix="use bfloat16 or float32",
        )
    return device


def autocast(device: torch.device, section: Client) -> torch.autocast:
    """The context in which forward passes run; float32 leaves torch as it is."""
    half = _HALF.get(section.precision)
    return torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's generators start from ``seed`` inside, and are as they were afterwards."""
    cuda = device.type == "cuda"
    index = (
        device.index if device.index is not None else (torch.cuda.current_device() if cuda else 0)
    )
    with torch.random.fork_rng(devices=[index] if cuda else []):
        torch.manual_seed(seed)
        yield
