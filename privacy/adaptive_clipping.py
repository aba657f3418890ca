"""A clip norm that follows a quantile of the contributions' norms, privately.

Each unit also sends one bit, whether its contribution was at most the clip norm; the noised mean of
the bits steers the norm. The bits are a release, paid for out of the same noise multiplier.

Source: Andrew, Thakkar, McMahan and Ramaswamy 2021, Algorithm 1 (arXiv:1905.03871).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from umbel.core.errors import InputError
from umbel.privacy.clipping import check_clip_norm
from umbel.privacy.noise import normals
from umbel.privacy.streams import Stream


class Split(NamedTuple):
    """One noise multiplier shared between the contributions and the bits.

    Args:
        deltas: std of the noise on the sum of contributions, over their clip norm.
        count_std: absolute std of the noise on the sum of the bits.
    """

    deltas: float
    count_std: float


@dataclass(frozen=True)
class AdaptiveClip:
    """The rule: C <- C exp(-rate (noised share of units at most C - quantile)).

    Args:
        quantile: gamma, of the norms, in [0, 1]; 0.5 is the median.
        rate: eta_C, the geometric learning rate, > 0.
        least: C never goes below; > 0.
        most: C never goes above.

    Raises:
        InputError: a value is out of bounds.
    """

    quantile: float = 0.5
    rate: float = 0.2
    least: float = 1e-6
    most: float = 1e6

    def __post_init__(self) -> None:
        check_clip_norm(self.least)
        check_clip_norm(self.most)
        if not (0 <= self.quantile <= 1 and self.rate > 0 and self.least <= self.most):
            raise InputError(
                f"quantile {self.quantile}, rate {self.rate}, bounds {self.least} to {self.most}",
                where="adaptive clipping",
                fix="give a quantile in [0, 1], a positive rate and ordered bounds",
            )

    def update(self, clip_norm: float, noised: float, expected: float) -> float:
        """The next clip norm; pure.

        Args:
            clip_norm: C of this round.
            noised: from :func:`noised_count`.
            expected: m, the fixed denominator: the expected number of units, > 0. The number
                that really came would itself be a release.
        """
        check_clip_norm(clip_norm)
        share = noised / expected + 0.5
        power = -self.rate * (share - self.quantile)
        moved = clip_norm * math.exp(min(max(power, -700.0), 700.0))
        return min(max(moved, self.least), self.most)


def noised_count(norms: Tensor, clip_norm: float, std: float, stream: Stream) -> float:
    """The sum of the bits, each less one half, plus N(0, std^2).

    The half makes the sensitivity 1/2: a unit adds +1/2 or -1/2, or is not there.

    Args:
        norms: (C,) before clipping; ``inf`` counts as above.
        clip_norm: of this round.
        std: absolute, from :func:`split`.
        stream: of random words.
    """
    bits = float((norms <= clip_norm).sum()) - norms.numel() / 2
    return bits + std * float(normals(stream, 1)[0])


def split(noise_multiplier: float, count_std: float) -> Split:
    """Shares ``noise_multiplier`` so that contributions and bits together cost what it says.

    z_delta = (z^-2 - (2 count_std)^-2)^(-1/2), Theorem 1. One Gaussian with multiplier z is
    accounted for both. The paper takes count_std = m / 20, which hardly raises z_delta. Replace-one
    doubles the sensitivities of both, so that the split is the same.

    Args:
        noise_multiplier: z, as accounted; 0 leaves both without noise.
        count_std: absolute std on the sum of the bits, > z / 2.

    Raises:
        InputError: the bits alone would cost more than z allows.
    """
    if noise_multiplier == 0:
        return Split(0.0, 0.0)
    rest = noise_multiplier**-2 - (2 * count_std) ** -2 if count_std > 0 else -1.0
    if rest <= 0:
        raise InputError(
            f"count_std = {count_std} leaves nothing of the noise multiplier {noise_multiplier}",
            where="adaptive clipping",
            fix=f"use more than {noise_multiplier / 2:g}; a twentieth of the cohort is usual",
        )
    return Split(rest**-0.5, count_std)


def count_std(noise_multiplier: float, expected: float) -> float:
    """Absolute std on the count of units that were not clipped: a twentieth of those expected.

    Or what leaves the contributions no more than 1 % more noise, where that is larger.

    Source: Andrew et al. 2021, section 3.1 (arXiv:1905.03871).
    """
    # z_delta <= 1.01 z where (2 b)^-2 <= (1 - 1.01^-2) z^-2
    return max(expected / 20, noise_multiplier / (2 * math.sqrt(1 - 1.01**-2)))
