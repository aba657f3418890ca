"""Bottleneck adapters, which PEFT has none of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.core.settings import Count
from umbel.tasks.adapters import frame

USUAL = ("out", "down", "c_proj", "o_proj", "down_proj", "output.dense")
"""The last layers of attention and of the feed-forward part, as several architectures call them."""


class Bottleneck(nn.Module):
    """A layer, and a small network on its output beside a shortcut; it starts as the layer."""

    def __init__(self, base: nn.Module, outputs: int, size: int) -> None:
        super().__init__()
        self.base = base
        self.adapter_down, self.adapter_up = nn.Linear(outputs, size), nn.Linear(size, outputs)
        nn.init.zeros_(self.adapter_up.weight)
        nn.init.zeros_(self.adapter_up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's shapes."""
        out: Tensor = self.base(x)
        added: Tensor = self.adapter_up(F.relu(self.adapter_down(out)))
        return out + added


def bottleneck(
    module: nn.Module, *, size: Count = 16, targets: Sequence[str] | None = None
) -> nn.Module:
    """Bottleneck adapters: down, ReLU, up, added to the output of the chosen layers.

    Args:
        module: the model.
        size: units between down and up.
        targets: names of layers, or their endings; ``None``: the last layers of attention and of
            the feed-forward part, else every linear layer but the head.

    Raises:
        InputError: no linear layer has such a name.

    Source: Houlsby et al. 2019, section 2.1 (arXiv:1902.00751).
    """
    names = frame.linear_names(module)
    endings = tuple(targets or USUAL)
    chosen = [n for n in names if n.endswith(tuple("." + e for e in endings)) or n in endings]
    if targets is None and not chosen:
        chosen = names
    if not chosen:
        raise InputError(
            f"no linear layer is called {', '.join(endings)}",
            where=frame.WHERE,
            fix=f"targets among: {', '.join(names) or 'no linear layer'}",
        )
    frame.freeze(module)
    model = frame.inner(module)
    for name in chosen:
        layer = model.get_submodule(name)
        model.set_submodule(name, Bottleneck(layer, frame.width(layer), size))
    for head in ("head", "score", "classifier"):
        if frame.kind_of(module) == "class" and hasattr(model, head):
            model.get_submodule(head).requires_grad_(True)
    return module
