"""How alike two pictures are: PSNR and SSIM."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

F64: TypeAlias = npt.NDArray[np.float64]


def psnr(left: F64, right: F64) -> float:
    """Peak signal-to-noise ratio in dB of pictures with values in [0, 1]; ``inf`` where equal."""
    error = float(np.mean((np.asarray(left, float) - np.asarray(right, float)) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(left: F64, right: F64) -> float:
    """Structural similarity of pictures (channels, height, width) in [0, 1]; 1 where equal.

    A Gaussian window of std 1.5 and 11 pixels, or the largest odd number that fits, over all places
    where it lies inside; the mean over them and the channels.

    Source: Wang, Bovik, Sheikh and Simoncelli 2004, equation 13, K1 0.01, K2 0.03
    (doi:10.1109/TIP.2003.819861).
    """
    x, y = np.asarray(left, float), np.asarray(right, float)
    side = min(11, *x.shape[-2:])
    side -= 1 - side % 2
    at = np.arange(side) - side // 2
    window = np.exp(-(at**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(picture: F64) -> F64:
        rows = np.lib.stride_tricks.sliding_window_view(picture, side, axis=-2) @ window
        both: F64 = np.lib.stride_tricks.sliding_window_view(rows, side, axis=-1) @ window
        return both

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    shared = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mean_x * mean_y + c1) * (2 * shared + c2)
    alike /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float(alike.mean())
