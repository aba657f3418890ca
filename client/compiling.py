"""``torch.compile`` for what a client computes, where ``[client] compile`` asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile

MODELS = 64
"""So many programs, of models and of shapes that torch will not keep open, are kept in a process;
what comes after them is not compiled."""


def settle() -> None:
    """How torch compiles in this process, once and for all."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    # The numbers of a rule are what they are; left open, a number through a tensor is no program.
    dynamo.specialize_float = True
    # Its own processes would be forked along with those that train.
    inductor.compile_threads = 1


def check(run: RunFile, device: torch.device) -> None:
    """Compiles next to nothing, to see whether that can be done here.

    Raises:
        InputError: it cannot, or the run's gradients are of single examples.
    """
    if run.privacy.unit == "example":
        raise InputError(
            "gradients of single examples are not compiled: the sizes of their batches are drawn, "
            "and how they are computed is found by a trial",
            where="[client] compile",
            fix="leave compile out, or [privacy] unit = 'client'",
        )
    settle()
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.zeros(2, device=device))
    except Exception as error:  # of torch's many, with the compiler's own words far down
        inner = getattr(error, "inner_exception", error)
        said = str(inner).strip().splitlines() or [""]
        raise InputError(
            f"nothing can be compiled here: {type(inner).__name__}: {said[0]}",
            where="[client] compile",
            fix="install a C++ compiler (g++ or clang), or leave compile out",
        ) from None


def compile_calls(module: nn.Module) -> None:
    """Has ``module``'s forward and backward pass compiled when it is next called.

    Batches of all sizes share a program, and what draws, draws what it would without.
    """

    def call(*inputs: Any, **named: Any) -> Any:
        return module.forward(*inputs, **named)

    # As Module.compile does, which leaves what is called in torch's own files as it is: a
    # Sequential would not be compiled.
    compile_: Any = torch.compile
    module._compiled_call_impl = compile_(
        call, dynamic=True, recompile_limit=MODELS, options={"fallback_random": True}
    )
