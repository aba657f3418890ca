"""Rules for low-rank adapters: what is averaged is ``B A``, and a mean of products is not the
product of means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.trees import Model, Tree, add_cast
from umbel.strategies.parts.combine import Combined, Combiner, Sums, weighted_mean

A, B = "lora_A.default.weight", "lora_B.default.weight"
"""How PEFT's names of the two factors end."""

RESIDUAL = "lora_residual.full"
"""How the name of a layer's matrix of full size ends; it is scaled as ``B A`` is."""

PRODUCTS = "products"


class Pair(NamedTuple):
    """The names of one layer's tensors: A (rank, inputs), B (outputs, rank), (outputs, inputs)."""

    layer: str
    a: str
    b: str
    residual: str


def pairs(names: Iterable[str]) -> list[Pair]:
    """The layers of which both factors are among ``names``."""
    known = dict.fromkeys(n for n in names if "/" not in n)
    layers = [n.removesuffix(A) for n in known if n.endswith(A)]
    return [
        Pair(layer, layer + A, layer + B, layer + RESIDUAL)
        for layer in layers
        if layer + B in known
    ]


def with_products() -> Combiner:
    """The weighted mean, and of each layer also that of ``dB_k dA_k``, as ``extra["products"]``.

    Those say all that averaging the factors loses: the mean of ``B_k A_k`` is ``mean B mean A``
    plus ``mean(dB_k dA_k) - mean(dB_k) mean(dA_k)``, whatever the factors were before. They are
    sums over clients, too, of a layer's full size.
    """
    plain = weighted_mean()

    def zero(model: Tree) -> Sums:
        sums: Sums = plain.zero(model)
        for pair in pairs(model):
            b, a = sums.delta[pair.b], sums.delta[pair.a]
            sums.delta[f"{PRODUCTS}/{pair.layer}"] = b.new_zeros(len(b), a.shape[1])
        return sums

    def add(sums: Sums, updates: Updates) -> Sums:
        found = pairs(sums.delta)
        products = {f"{PRODUCTS}/{p.layer}" for p in found}
        factors = {n: t for n, t in sums.delta.items() if n not in products}
        _, weight, clients = plain.add(Sums(factors, sums.weight, sums.clients), updates)
        for pair in found:
            total = sums.delta[f"{PRODUCTS}/{pair.layer}"]
            b, a = (updates.delta[n].to(total.device).double() for n in (pair.b, pair.a))
            for row, share in enumerate(updates.weights.tolist()):
                total.addmm_(b[row], a[row], alpha=share)
        return Sums(sums.delta, weight, clients)

    return Combiner(zero, add, plain.merge, plain.finish)


def lost(combined: Combined, pair: Pair) -> Tensor:
    """``mean(B_k A_k) - mean B mean A`` of one layer, (outputs, inputs)."""
    products: Mapping[str, Tensor] = combined.extra[PRODUCTS]
    return products[pair.layer] - combined.delta[pair.b] @ combined.delta[pair.a]


def mean_product(params: Tree, combined: Combined, pair: Pair) -> Tensor:
    """``mean(B_k A_k)`` of one layer, (outputs, inputs), float64."""
    b = params[pair.b].double() + combined.delta[pair.b]
    a = params[pair.a].double() + combined.delta[pair.a]
    return b @ a + lost(combined, pair)


def error(params: Tree, combined: Combined) -> dict[str, float]:
    """``aggregation_error``: what averaging the factors loses, relative to the mean product.

    The Frobenius norm over all layers of ``mean(B_k A_k) - mean B mean A``, over that of
    ``mean(B_k A_k)``; nothing where no layer has both factors.
    """
    found = pairs(params)
    if not found:
        return {}
    missed = sum(float(lost(combined, p).square().sum()) for p in found)
    whole = sum(float(mean_product(params, combined, p).square().sum()) for p in found)
    return {"aggregation_error": (missed / whole) ** 0.5 if whole else 0.0}


def moved(model: Model, steps: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The buffers of ``model`` after a step of its residuals; others move by nothing.

    Args:
        model: before the step.
        steps: name of a residual -> (outputs, inputs).
        name: of the strategy.
    Raises:
        InputError: the adapter has no residuals.
    """
    if missing := sorted(steps.keys() - model.buffers.keys()):
        raise InputError(
            f"'{name}' needs a residual in every layer; there is no '{missing[0]}'",
            where="[task.adapter]",
            fix='adapter = { kind = "lora", residual = true }',
        )
    return {n: add_cast(model.buffers[n], step) for n, step in steps.items()}


def as_params(tensors: Mapping[str, Any], params: Tree) -> dict[str, Tensor]:
    """``tensors`` in the dtypes and on the devices of ``params``."""
    return {n: t.to(params[n].dtype).to(params[n].device) for n, t in tensors.items()}


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Initial values of an A, (rank, inputs): as PEFT draws them (Kaiming, ``a = sqrt(5)``)."""
    draw = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    values: Tensor = (2 * draw - 1) / like.shape[1] ** 0.5
    return values.to(like.dtype).to(like.device)
