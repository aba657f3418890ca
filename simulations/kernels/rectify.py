"""Rectifying later and in place: the same numbers, with less of them in memory."""

from __future__ import annotations

from torch import nn

_KEEP_NO_OUTPUT = (nn.Conv2d, nn.Linear, nn.MaxPool2d)
"""Layers whose backward pass does not look at what came out."""


def rectify_late(module: nn.Module) -> None:
    """Changes ``module``: pools before it rectifies, and rectifies where the numbers are.

    The results are the same bits. A pooling of largest values and a ReLU may be exchanged, and the
    gradient is the same too: where the largest of a window is positive, it is the same one; where
    it is not, nothing passes. Only layers that follow each other in an ``nn.Sequential`` are
    touched, of exactly these types and without hooks.
    """
    for part in module.modules():
        if type(part) is not nn.Sequential or _hooked(part):
            continue
        for i in range(len(part) - 1):
            if _is(part[i], nn.ReLU) and _is(part[i + 1], nn.MaxPool2d):
                part[i], part[i + 1] = part[i + 1], part[i]
        for i in range(1, len(part)):
            if _is(part[i], nn.ReLU) and _is(part[i - 1], *_KEEP_NO_OUTPUT):
                part[i] = nn.ReLU(inplace=True)


def _is(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    return type(module) in kinds and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
