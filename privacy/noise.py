"""Gaussian noise from a cryptographic stream, with tails that are right to 2^-64.

What floating point may give away (Mironov 2012, doi:10.1145/2382196.2382264; Holohan and Braghin
2021, arXiv:2107.10138): the doubles that a sampler can reach depend on the value it is added to, so
the low bits of an output exclude inputs. Here the noisy value is rounded to a grid of 2^-20 std, a
power of two that does not depend on the data, and each cell of the grid is reached by the more than
2^20 different draws of the 64 bits, out to 5 std; beyond it the draws thin out, and cells that a
value cannot reach at all have a total probability below 2^-40 a coordinate. That is a
strong hardening, not a proof: where a proof is wanted, use the discrete Gaussian
(:mod:`umbel.privacy.discrete`), whose sampler is exact. Timing is not covered.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.trees import Tree
from umbel.privacy.streams import Stream

# Pairs of words per block: what stays in the processor's second-level cache.
_BLOCK = 1 << 14
_GRID = 20


def normals(stream: Stream, n: int) -> Tensor:
    """``n`` independent draws of N(0, 1), shape (n,), float64; the largest possible is 9.49.

    The radius takes all of a 64-bit word, so that small words, the far tail, keep full precision.

    Source: Box and Muller 1958.
    """
    out = torch.empty(n + n % 2, dtype=torch.float64)
    for start in range(0, n, 2 * _BLOCK):
        pairs = min(_BLOCK, (n - start + 1) // 2)
        words = stream.words(2 * pairs).astype(np.float64)
        uniform = torch.from_numpy(words)
        radius = uniform[:pairs].add_(0.5).mul_(2.0**-64).log_().mul_(-2.0).sqrt_()
        angle = uniform[pairs:].mul_(2.0**-64 * 2 * math.pi)
        here = out[start : start + 2 * pairs]
        torch.mul(radius, angle.cos(), out=here[:pairs])
        torch.mul(radius, angle.sin_(), out=here[pairs:])
    return out[:n]


def add_gaussian(total: Tree, std: float, stream: Stream) -> dict[str, Tensor]:
    """``total`` plus N(0, std^2 I): what may leave.

    The sum is taken in float64 and rounded to a grid of about 2^-20 std before it takes the dtypes
    of ``total``; both are post-processing. Names are drawn for in lexicographic order.

    Args:
        total: name -> (*shape), finite floating point: a sum of clipped contributions.
        std: absolute, in the units of ``total``: noise_multiplier times clip_norm; 0 adds nothing.
        stream: :func:`umbel.privacy.streams.system_stream` wherever people are to be protected.

    Raises:
        InputError: ``std`` is negative or not finite, or ``total`` is not finite floating point.
    """
    if not (std >= 0 and math.isfinite(std)):
        raise InputError(
            f"std {std} is not a finite number of at least 0",
            where="noise",
            fix="give noise_multiplier times clip_norm",
        )
    noisy: dict[str, Tensor] = {}
    for name in sorted(total):
        tensor = total[name]
        if not tensor.dtype.is_floating_point or not bool(tensor.isfinite().all()):
            raise InputError(
                f"'{name}' is not finite floating point",
                where="noise",
                fix="clip before noise is added; integers are sent without",
            )
        noisy[name] = tensor.clone() if std == 0 else _noisy(tensor, std, stream)
    return {name: noisy[name] for name in total}


def _noisy(tensor: Tensor, std: float, stream: Stream) -> Tensor:
    noise = normals(stream, tensor.numel()).view(tensor.shape).to(tensor.device)
    grid = 2.0 ** (math.floor(math.log2(std)) - _GRID)
    return noise.mul_(std).add_(tensor).div_(grid).round_().mul_(grid).to(tensor.dtype)
