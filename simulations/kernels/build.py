"""The kernels by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from umbel.simulations.kernels.kernel import Kernel, Subject
from umbel.simulations.kernels.lean import Lean
from umbel.simulations.kernels.traced import Grouped, Stacked
from umbel.simulations.kernels.vmap import Vmap

KERNELS: dict[str, Callable[[Subject], Kernel]] = {
    "grouped": Grouped,
    "unfolded": partial(Grouped, unfold=True),
    "stacked": Stacked,
    "vmap": Vmap,
    "lean": Lean,
}
"""In the order in which they are tried; ``lean`` trains what no other can."""
