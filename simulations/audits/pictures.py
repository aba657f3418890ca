"""The pictures of the audits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from umbel.core.extras import extra
from umbel.simulations.audits.canary import Audit
from umbel.simulations.audits.inversion import Inversion
from umbel.simulations.audits.membership import Membership

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> Figure:
    with extra("plots", "pictures"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_inversion(found: Inversion, path: Path) -> None:
    """A row for each picture: original, then what each update gives away, then the floors."""
    rows = len(found.originals)
    figure = _figure(1.35 * (1 + len(found.columns)), 0.75 + 1.15 * rows)
    panels = figure.subplots(rows, 1 + len(found.columns), squeeze=False)
    shown = [("original", found.originals, None)]
    shown += [(c.name, c.pictures, c) for c in found.columns]  # type: ignore[misc]
    for place, (name, pictures, column) in enumerate(shown):
        for row in range(rows):
            axes = panels[row, place]
            picture = np.moveaxis(pictures[row], 0, -1)
            axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if column is not None:
                text = f"{column.psnr[row]:.1f} dB · {column.ssim[row]:.2f}"
                axes.set_xlabel(text, fontsize=7)
        panels[0, place].set_title(name.replace(" of ", "\nof ").replace(": ", ":\n"), fontsize=8)
    figure.suptitle(f"Read off an update ({found.attack}); below: PSNR · SSIM", fontsize=9)
    figure.savefig(path)


def draw_membership(found: Membership, path: Path) -> None:
    """ROC curves on logarithmic axes, and the bound that epsilon sets."""
    figure = _figure(5.5, 5)
    axes: Axes = figure.add_subplot()
    for name, curve in found.curves.items():
        roc = curve.roc
        x, y = roc.false / roc.others, roc.true / roc.members
        axes.step(x, y, where="post", label=f"{name}: AUC {roc.auc:.3f}")
        for point in curve.points:
            axes.plot([point.false_rate] * 2, [max(point.low, 1e-5), point.high], color="0.6")
    grid = np.logspace(-4, 0, 200)
    axes.plot(grid, grid, ":", color="0.5", label="a coin")
    if math.isfinite(found.theory) and found.unit == "example":
        most = np.minimum(1, math.exp(min(found.theory, 50)) * grid + found.delta)
        axes.plot(grid, most, "k--", linewidth=1, label=f"most for ε = {found.theory:.3g}")
    axes.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1))
    axes.set_xlabel("false-positive rate")
    axes.set_ylabel("true-positive rate")
    axes.grid(visible=True, alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.set_title(f"Who was in the training data; {found.shadows} shadow models", fontsize=10)
    figure.savefig(path)


def draw_canary(found: Audit, path: Path) -> None:
    """Where the model went along canaries that took part and along those that did not."""
    figure = _figure(7, 3.4)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    bins: Any = np.histogram_bin_edges(found.scores, 40)
    left.hist(found.scores[~found.included], bins, alpha=0.6, label="left out")
    left.hist(found.scores[found.included], bins, alpha=0.6, label="took part")
    left.set_xlabel("the model along a canary")
    left.set_ylabel("canaries")
    left.legend(fontsize=8, frameon=False)
    names = ["stated\n(ledger)", "estimate", f"proven\n({found.bound.confidence:.0%})"]
    most = 1.3 * max(found.bound.epsilon, 1.0, *(e for e in (found.theory,) if math.isfinite(e)))
    values = [min(e, most) for e in (found.theory, found.estimate.epsilon, found.bound.epsilon)]
    right.bar(names, values, color=["0.6", "C0", "C3" if found.violated else "C2"])
    right.set_ylim(0, most)
    right.set_ylabel("ε")
    right.tick_params(axis="x", labelsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    verdict = "BROKEN: more is proven than is stated" if found.violated else "not refuted"
    figure.suptitle(
        f"Canaries, unit {found.unit}, δ = {found.bound.delta:g}: {verdict}", fontsize=10
    )
    figure.savefig(path)
