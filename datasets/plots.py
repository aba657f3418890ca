"""A picture of who holds what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from umbel.core.extras import extra
from umbel.datasets.build import label_counts
from umbel.datasets.federated import FederatedData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARS = 60
"""Up to so many clients, a bar each."""
COLUMNS = 200
"""Beyond, a column each; of more than these, so many are picked evenly."""
COLOURS = 20
"""Classes that colours can still tell apart."""


def draw_split(data: FederatedData, path: Path, title: str) -> None:
    """Writes a PNG of how many examples of which class each client holds.

    Up to 60 clients and 20 classes: a stacked bar a client. Beyond: the share of each class in each
    client as a heat map, and how large the clients are.

    Args:
        data: a data set dealt to clients; real-valued targets are shown by decile.
        path: of the picture.
        title: its heading.
    """
    with extra("plots", str(path)):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    counts = label_counts(data)
    clients, classes = counts.shape
    figure = Figure(dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if clients <= BARS and classes <= COLOURS:
        _bars(figure, counts, data)
    else:
        _map(figure, counts, data)
    total = int(counts.sum())
    figure.suptitle(
        f"{title}\n{data.info.name}: {clients:,} clients, {total:,} training examples", fontsize=11
    )
    figure.savefig(path, format="png")


def _bars(figure: Figure, counts: npt.NDArray[np.int64], data: FederatedData) -> None:
    from matplotlib import colormaps

    clients, classes = counts.shape
    figure.set_size_inches(8, 1.6 + 0.18 * max(clients, 6))
    axes = figure.add_subplot()
    colours = colormaps["tab10" if classes <= 10 else "tab20"]
    left = np.zeros(clients)
    for c in range(classes):
        axes.barh(
            np.arange(clients),
            counts[:, c],
            left=left,
            height=0.8,
            color=colours(c),
            edgecolor="white",
            linewidth=0.3,
            label=str(c),
        )
        left += counts[:, c]
    axes.set_yticks(np.arange(clients), list(data.names), fontsize=8)
    axes.set_ylim(clients - 0.4, -0.6)
    axes.set_xlim(0, 1.02 * left.max())
    axes.set_xlabel("training examples")
    axes.set_ylabel("client")
    axes.legend(
        title=_classes_label(data), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False,
        fontsize=8, title_fontsize=8, ncols=1 + (classes > 10),
    )  # fmt: skip
    _open(axes)


def _map(figure: Figure, counts: npt.NDArray[np.int64], data: FederatedData) -> None:
    clients, classes = counts.shape
    sizes = counts.sum(axis=1)
    figure.set_size_inches(10, 6.5)
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1.3])
    shown = np.unique(np.linspace(0, clients - 1, min(clients, COLUMNS)).round().astype(int))
    share = counts[shown] / sizes[shown, None]
    picture = upper.imshow(
        share.T, aspect="auto", interpolation="nearest", cmap="YlGnBu", origin="lower", vmin=0
    )
    bar = figure.colorbar(picture, ax=upper, pad=0.01)
    bar.set_label("share of the client's examples")
    picked = "" if len(shown) == clients else f" ({len(shown)} of {clients:,}, picked evenly)"
    upper.set_xlabel(f"client{picked}")
    upper.set_ylabel(_classes_label(data))
    ticks = np.unique(np.linspace(0, len(shown) - 1, min(len(shown), 9)).round().astype(int))
    upper.set_xticks(ticks, [data.names[int(shown[t])] for t in ticks], fontsize=8)
    if classes <= COLOURS:
        upper.set_yticks(range(classes))
    _sizes(lower, sizes)


def _sizes(axes: Axes, sizes: npt.NDArray[np.int64]) -> None:
    low, high = int(sizes.min()), int(sizes.max())
    # Whole numbers fall in the middle of bars of a whole width.
    width = max(1, -(-(high - low + 1) // 40))
    edges = np.arange(low, high + width + 1, width) - 0.5
    axes.hist(sizes, bins=edges.tolist(), color="#3b6ea5", edgecolor="white", linewidth=0.3)
    if low == high:
        axes.set_xlim(low - 5, high + 5)
    axes.set_xlabel("training examples a client holds")
    axes.set_ylabel("clients")
    _open(axes)


def _classes_label(data: FederatedData) -> str:
    return "class" if data.info.classes is not None else "decile of y"


def _open(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
