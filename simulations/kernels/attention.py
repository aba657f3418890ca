"""Attention for many clients at once, and torch's layers that are made of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.simulations.kernels.draws import Draw
from umbel.simulations.kernels.kernel import Obstacle
from umbel.simulations.kernels.layers import (
    PLAIN,
    Finder,
    Layer,
    Maker,
    Scope,
    Value,
    dropped,
    elementwise,
    must,
    product,
    rows,
)
from umbel.simulations.kernels.norms import NORMS


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    probability: float,
    draw: Draw | None,
) -> Tensor:
    """``softmax(scale Q K^T + mask) V``.

    Args:
        query: (n, B, heads, T, d).
        key: (n, B, heads, S, d).
        value: (n, B, heads, S, e).
        mask: for all clients, of no more than four axes, or (n, …) with as many as the query.
            Added, or where it is of bools says who may be seen.
        causal: whether nobody sees who comes later.
        scale: ``None``: 1 / sqrt(d).
        probability: with which a weight is dropped.
        draw: of the clients' masks.

    Source: Vaswani et al. 2017, equation 1 (arXiv:1706.03762).
    """
    if not probability and query.dim() == 5:
        # Torch's fused kernels know one axis of examples; whose they are is the same to them.
        own = mask.flatten(0, 1) if mask is not None and mask.dim() == 5 else mask
        if own is None or own.dim() < 4 or len(own) == query.shape[0] * query.shape[1]:
            q, k, v = (t.flatten(0, 1) for t in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, own, 0.0, causal, scale=scale)
            return out.view(*query.shape[:-1], -1)
    scores = query @ key.transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if mask is not None:
        hidden = mask.dtype is torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if hidden else scores + mask
    return dropped(scores.softmax(-1), probability, draw) @ value


def _multihead(module: nn.MultiheadAttention, find: Finder) -> Layer:
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        raise Obstacle("an option of a MultiheadAttention")
    if module.dropout and not module.batch_first:
        raise Obstacle("a MultiheadAttention with dropout whose examples are not first")
    weight, bias = must(find(module.in_proj_weight)), find(module.in_proj_bias)
    turned, shift = must(find(module.out_proj.weight)), find(module.out_proj.bias)

    def layer(
        scope: Scope,
        query: Value,
        key: Value,
        value: Value,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Value, None]:
        # The weights are for looking at; who computes with them finds nothing to compute with.
        if key_padding_mask is not None or isinstance(attn_mask, Value):
            raise Obstacle("a mask that depends on the examples")
        if is_causal and attn_mask is None:
            raise Obstacle("is_causal without attn_mask")
        parts = [x.as_rows() for x in (query, key, value)]
        if not module.batch_first:
            parts = [x.transpose(1, 2) for x in parts]
        if parts[0].dim() != 4:
            raise Obstacle("a MultiheadAttention without an axis of examples")
        inner = weight(scope).chunk(3, 1)
        added = (None,) * 3 if bias is None else bias(scope).chunk(3, 1)
        q, k, v = (
            product(x, w, b).view(*x.shape[:3], module.num_heads, -1).transpose(2, 3)
            for x, w, b in zip(parts, inner, added, strict=True)
        )
        mask = attn_mask
        if mask is not None:
            if mask.dtype is torch.bool:  # here, true hides
                mask = ~mask
            if mask.dim() != 2:
                raise Obstacle("a mask for each example")
        seen = attend(q, k, v, mask, False, None, module.dropout, scope.draw)
        out = product(
            seen.transpose(2, 3).flatten(3), turned(scope), None if shift is None else shift(scope)
        )
        return rows(out if module.batch_first else out.transpose(1, 2)), None

    return layer


def _encoder_layer(module: nn.TransformerEncoderLayer, find: Finder) -> Layer:
    attention = _multihead(module.self_attn, find)
    parts = (module.linear1, module.linear2, module.norm1, module.norm2)
    wide, narrow, first, second = (_plain(part, find) for part in parts)
    drops = (module.dropout1, module.dropout, module.dropout2)
    between, two = (_plain(part, find) for part in drops[1:])
    activation = elementwise(module.activation)
    if not module.self_attn.batch_first and any(d.p for d in drops):
        raise Obstacle("an encoder with dropout whose examples are not first")

    def layer(
        scope: Scope,
        src: Value,
        src_mask: Any = None,
        src_key_padding_mask: Any = None,
        is_causal: bool = False,
    ) -> Value:
        def attended(x: Value) -> Value:
            options = {"key_padding_mask": src_key_padding_mask, "attn_mask": src_mask}
            seen = attention(scope, x, x, x, **options)[0].as_rows()
            if not module.dropout1.p:
                return rows(seen)
            # Torch's own has the places before the examples in memory, and so in the draws.
            turned = dropped(seen.transpose(1, 2), module.dropout1.p, scope.draw, 2)
            return rows(turned.transpose(1, 2))

        def fed(x: Value) -> Value:
            inner = between(scope, activation(scope, wide(scope, x)))
            found: Value = two(scope, narrow(scope, inner))
            return found

        def plus(x: Value, y: Value) -> Value:
            return rows(x.as_rows() + y.as_rows())

        if module.norm_first:
            x = plus(src, attended(first(scope, src)))
            return plus(x, fed(second(scope, x)))
        x = first(scope, plus(src, attended(src)))
        found: Value = second(scope, plus(x, fed(x)))
        return found

    return layer


def _encoder(module: nn.TransformerEncoder, find: Finder) -> Layer:
    layers = [_encoder_layer(part, find) for part in module.layers]
    norm = None if module.norm is None else _plain(module.norm, find)

    def layer(
        scope: Scope,
        src: Value,
        mask: Any = None,
        src_key_padding_mask: Any = None,
        is_causal: bool | None = None,
    ) -> Value:
        for each in layers:
            src = each(scope, src, mask, src_key_padding_mask)
        return src if norm is None else norm(scope, src)

    return layer


def _plain(module: nn.Module, find: Finder) -> Layer:
    maker = (PLAIN | NORMS).get(type(module))
    if maker is None:
        raise Obstacle(f"no kernel knows {type(module).__name__}")
    return maker(module, find)


ATTENTION: dict[type[nn.Module], Maker] = {
    nn.MultiheadAttention: _multihead,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
}
