"""Per-example gradients from one forward and one backward pass, for layers that are known.

The backward pass goes to the outputs of the layers and not to their parameters; each layer's rule
turns its input and the gradient of its output into norms, and, once the factors are known, into the
clipped sum. So the work is that of plain training, but for the norms.

Source: Bu, Wang, Zha and Karypis 2023, book-keeping (arXiv:2210.00038).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from umbel.privacy.per_example import clipped
from umbel.privacy.per_example.clipped import Batch, Bounds, ClippedSum, Losses, Unsupported
from umbel.privacy.per_example.layers import RULES, Known


class _Tap(NamedTuple):
    """A layer as it was used: its input, the input's version, the gradient of its output."""

    name: str
    x: Tensor
    version: int
    gradient: list[Tensor]


class BookKeeping:
    """The clipped sum for models whose trained layers all have a rule and are each used once.

    Its caller compares it with the plain gradients before it is trusted: a model may use a
    parameter beside its layer, or change an output in place.

    Args:
        module: in training mode; its parameters that require gradients are those that count.
        losses: of a batch.

    Raises:
        Unsupported: a trained parameter belongs to no layer that has a rule, or to several.
    """

    def __init__(self, module: nn.Module, losses: Losses) -> None:
        self._module, self._losses = module, losses
        self._params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        owners = Counter(
            id(p) for m in module.modules() for p in m.parameters(recurse=False) if p.requires_grad
        )
        self._layers: dict[str, nn.Module] = {}
        for name, layer in module.named_modules():
            own = dict(layer.named_parameters(recurse=False))
            trained = [p for p in own.values() if p.requires_grad]
            if not trained:
                continue
            if type(layer) not in RULES:
                raise Unsupported(f"{type(layer).__name__} has no rule")
            if len(trained) < len(own) or any(owners[id(p)] > 1 for p in trained):
                raise Unsupported(f"the parameters of '{name}' are shared, or trained in part")
            if isinstance(layer, nn.Embedding) and (layer.max_norm or layer.scale_grad_by_freq):
                raise Unsupported(f"an option of '{name}'")
            if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
                raise Unsupported(f"the padding of '{name}'")
            self._layers[name] = layer

    def __call__(self, batch: Batch, bounds: Bounds) -> ClippedSum:
        """The sum over ``batch``."""
        known = self._known(batch)
        factors, finite = bounds.factors({n: k.squares for n, k in known.items()})
        if not bool(finite.all()):
            # 0 times NaN is NaN: what is not finite must not come near the sum.
            if not bool(finite.any()):
                return clipped.nothing(self._params)
            return self(clipped.without(batch, finite), bounds)
        squares = {n: k.squares for n, k in known.items()}
        total = {n: known[n].weighted(factors[n][None])[0] for n in self._params}
        return ClippedSum(total, clipped.short(squares, bounds, finite))

    def _known(self, batch: Batch) -> dict[str, Known]:
        taps: list[_Tap] = []
        begins: list[Tensor] = []
        handles = [
            layer.register_forward_hook(_tap(name, taps, begins))
            for name, layer in self._layers.items()
        ]
        for p in self._params.values():
            p.requires_grad_(False)
        try:
            losses = self._losses(self._module, batch)
        finally:
            for p in self._params.values():
                p.requires_grad_(True)
            for handle in handles:
                handle.remove()
        if sorted(tap.name for tap in taps) != sorted(self._layers):
            raise Unsupported("a layer is used twice, or not at all")
        torch.autograd.grad(losses.sum(), begins)
        found: dict[str, Known] = {}
        with torch.no_grad():
            for tap in taps:
                layer = self._layers[tap.name]
                if tap.x._version != tap.version:
                    raise Unsupported(f"the input of '{tap.name}' is changed in place")
                if not tap.gradient or len(tap.gradient[0]) != len(losses):
                    raise Unsupported(f"the output of '{tap.name}' has no axis of examples")
                x = tap.x.float() if tap.x.is_floating_point() else tap.x
                own = RULES[type(layer)](layer, x, tap.gradient[0].float())
                prefix = f"{tap.name}." if tap.name else ""
                found |= {prefix + name: known for name, known in own.items()}
        return found


def _tap(name: str, taps: list[_Tap], begins: list[Tensor]) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            # The parameters were taken out of the graph: it begins here. Not at the output itself,
            # since what follows may change that in place.
            begin = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            begins.append(begin)
            output = output.add_(begin)
        gradient: list[Tensor] = []
        output.register_hook(gradient.append)  # type: ignore[no-untyped-call]
        x = inputs[0].detach()
        taps.append(_Tap(name, x, x._version, gradient))
        return output

    return hook
