"""Which symbols of a record a masked language model has to guess: a function of the record."""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64's constants (core/randomness.py), as torch's signed numbers.
_GOLDEN = -7046029254386353131
_M1 = -4658895280553007687
_M2 = -7723592293110705685


def uniform(tokens: Tensor, purpose: int) -> Tensor:
    """(B, T) symbols -> (B, T) float64 in [0, 1): a hash of the record, the place and ``purpose``.

    No generator is used, so that it is the same under ``torch.func`` and in every engine.
    """
    place = torch.arange(tokens.shape[-1], device=tokens.device)
    record = _mix((_mix(tokens + 1) * (2 * place + 1)).sum(-1, keepdim=True) + purpose)
    bits = _mix(record + place * _GOLDEN)
    return _right(bits, 11).double() / 2**53


def hide(tokens: Tensor, chosen: Tensor, mask: int, symbols: int) -> Tensor:
    """The records as the model sees them: of the chosen symbols, 80 % are ``mask``, 10 % another
    symbol, 10 % as they are.

    Source: Devlin et al. 2019, section 3.1 (arXiv:1810.04805).
    """
    draw = uniform(tokens, 2)
    other = (uniform(tokens, 3) * symbols).long()
    seen = torch.where(draw < 0.8, torch.full_like(tokens, mask), other)
    return torch.where(chosen & (draw < 0.9), seen, tokens)


def _right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _right(z, 30)) * _M1
    z = (z ^ _right(z, 27)) * _M2
    return z ^ _right(z, 31)
