"""What each layer of a traced program saw in one pass, for the gradient of each example.

Of many clients at once: :mod:`umbel.privacy.per_example.book_keeping` in the layout of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from umbel.privacy.per_example.clipped import Unsupported
from umbel.privacy.per_example.layers import RULES, Known, written
from umbel.simulations.kernels.layers import Value


class _Tap(NamedTuple):
    """A layer as it was used: its input, the input's version, its output and where it was made."""

    layer: nn.Module
    x: Value
    version: int
    out: Value
    edge: GradientEdge


class Taps:
    """Of one forward pass whose parameters are in no graph: the outputs of layers are."""

    def __init__(self) -> None:
        self._seen: list[_Tap] = []

    def __call__(self, layer: nn.Module, x: Value, out: Value) -> Value:
        """Remembers a layer's input and output; what comes back is to go on with."""
        if not isinstance(x, Value) or not isinstance(out, Value):
            raise Unsupported(f"{type(layer).__name__} takes no examples")
        if not out.tensor.requires_grad:
            # The graph begins here. Not at the output itself: what follows may change it in place.
            begin = torch.zeros((), dtype=out.tensor.dtype, device=out.tensor.device)
            out = out.like(out.tensor.add_(begin.requires_grad_()))
        given = x.like(x.tensor.detach())
        # Where a view is changed in place, gradients reach its base and no more the view.
        whole = out.tensor if out.tensor._base is None else out.tensor._base
        if whole.numel() != out.tensor.numel():
            raise Unsupported(f"{type(layer).__name__} gives a part of what it computed")
        edge = get_gradient_edge(whole)
        kept = out.like(out.tensor.detach())
        self._seen.append(_Tap(layer, given, given.tensor._version, kept, edge))
        return out

    def known(self, losses: Tensor, layers: int) -> Callable[[Tensor | None], dict[str, Known]]:
        """Each parameter's gradients of each example, by its layer's id and its name.

        Args:
            losses: (clients * B,).
            layers: how many were to be seen, each once.

        Returns:
            finite (clients, B) -> ``id(layer)/name`` -> gradients, client after client; those of
            the examples that are not ``finite`` are 0. ``None``: all are.
        """
        if len({id(tap.layer) for tap in self._seen}) != layers or len(self._seen) != layers:
            raise Unsupported("a layer is used twice, or not at all")
        found = torch.autograd.grad(losses.sum(), [tap.edge for tap in self._seen])
        for tap in self._seen:
            if tap.x.tensor._version != tap.version:
                raise Unsupported(f"the input of a {type(tap.layer).__name__} is changed in place")

        def known(finite: Tensor | None) -> dict[str, Known]:
            table: dict[str, Known] = {}
            for tap, gradient in zip(self._seen, found, strict=True):
                shaped = gradient.view(tap.out.tensor.shape)
                x, g = _finite(tap.x, finite), _finite(tap.out.like(shaped), finite)
                if isinstance(tap.layer, nn.Conv2d):
                    own = _convolution(tap.layer, x, g)
                else:
                    flat = (v.as_rows().flatten(0, 1) for v in (x, g))
                    own = RULES[type(tap.layer)](tap.layer, *flat)
                table |= {f"{id(tap.layer)}/{name}": one for name, one in own.items()}
            return table

        return known


def _finite(value: Value, finite: Tensor | None) -> Value:
    """In single precision at least, with zeros for the examples that are not ``finite``."""
    tensor = value.tensor
    if not tensor.is_floating_point():
        return value
    tensor = tensor if tensor.dtype is torch.float64 else tensor.float()
    if finite is not None:
        tensor = value.like(tensor).as_rows()
        tensor = torch.where(finite.view(*finite.shape, *[1] * (tensor.dim() - 2)), tensor, 0)
        return Value(tensor, value.clients, False)
    return value.like(tensor)


def _convolution(layer: nn.Conv2d, x: Value, g: Value) -> dict[str, Known]:
    """By torch's own gradient of a grouped weight, where each example of each client is a group."""
    images, pixels = x.as_images(), g.as_images()
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    padding = (top, left)
    if (left, top) != (right, bottom):
        images, padding = F.pad(images, (left, right, top, bottom)), (0, 0)
    examples = len(pixels) * x.clients
    inside, shape = layer.in_channels // layer.groups, layer.kernel_size
    found = conv2d_weight(  # type: ignore[no-untyped-call]
        _apart(images, x.clients),
        (examples * layer.out_channels, inside, *shape),
        _apart(pixels, x.clients),
        layer.stride,
        padding,
        layer.dilation,
        layer.groups * examples,
    )
    # Channels are last in memory: so the gradients are written down without another copy.
    flat = written(found.view(examples, layer.out_channels, inside, *shape).movedim(2, -1))
    weight = Known(flat.squares, lambda factors: flat.weighted(factors).movedim(-1, 2))
    if layer.bias is None:
        return {"weight": weight}
    sums = pixels.sum((2, 3)).view(len(pixels), x.clients, -1)
    return {"weight": weight, "bias": written(sums.transpose(0, 1).flatten(0, 1))}


def _apart(images: Tensor, clients: int) -> Tensor:
    """(B, clients * channels, H, W) -> (1, clients * B * channels, H, W), channels-last."""
    batch, _, height, width = images.shape
    apart = images.view(batch, clients, -1, height, width).permute(3, 4, 1, 0, 2)
    return apart.reshape(1, height, width, -1).permute(0, 3, 1, 2)
