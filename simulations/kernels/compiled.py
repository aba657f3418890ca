"""``torch.compile`` for the step of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from umbel.client.compiling import settle

Step = TypeVar("Step", bound=Callable[..., object])

VARIANTS = 64
"""Codes of one step at most: for batches with and without padding, for one client and for many, for
one example and for many, and the same once more for each shape that torch will not keep open."""


def compiled(step: Step, device: torch.device) -> Step:
    """``step`` as one generated program; whatever torch cannot put into one raises when called.

    Its shapes stay open. Code for the shapes seen so far would be another code in each process, and
    so would the last bits of a result be: they may not depend on who trains what.

    On CUDA the program is recorded as a CUDA graph for each shape, and its results are overwritten
    by its next call.

    Args:
        step: a function of tensors, and of trees of them.
        device: where the tensors are.
    """
    settle()
    compile_: Any = torch.compile  # its stubs lack some of these
    program: Step = compile_(
        step,
        dynamic=True,
        fullgraph=True,
        isolate_recompiles=True,
        recompile_limit=VARIANTS,
        options={"triton.cudagraphs": True} if device.type == "cuda" else None,
    )
    return program
