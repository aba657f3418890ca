"""The accuracy matrix as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from umbel.core.errors import InputError
from umbel.core.extras import extra
from umbel.server.database import translated
from umbel.server.plots import check_format

# Above this many experiences, a square is too small for its number.
WRITTEN = 12


def draw_matrix(report: Mapping[str, Any], path: Path, title: str) -> None:
    """Draws R as a heat map to ``path`` (png, pdf or svg): stages down, experiences across.

    Raises:
        InputError: no experience was ended, or ``path`` cannot be written.
    """
    with extra("plots", str(path)):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    check_format(path)
    if not report["matrix"]:
        raise InputError("no experience was ended", where=title, fix="let the run go on")
    r = np.array(report["matrix"], dtype=np.float64)
    stages, experiences = r.shape
    side = 0.62 * experiences
    figure = Figure(figsize=(3.2 + side, 2.4 + 0.62 * stages), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(r, vmin=0.0, vmax=1.0, cmap="viridis")
    for (i, j), value in np.ndenumerate(r):
        if experiences <= WRITTEN and not math.isnan(value):
            color = "black" if value > 0.6 else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(experiences), [str(j + 1) for j in range(experiences)])
    axes.set_yticks(range(stages), [str(i + 1) for i in range(stages)])
    axes.set_xlabel("tested on experience")
    axes.set_ylabel("after training on")
    figure.colorbar(image, ax=axes, label="accuracy", shrink=0.8)
    known = [letter for letter in ("acc", "bwt", "fwt") if letter in report]
    figures = ", ".join(f"{letter.upper()} {report[letter]:.3f}" for letter in known)
    figure.suptitle(f"{title}\n{figures}", fontsize=10)
    with translated(path, "picture"):
        figure.savefig(path)
