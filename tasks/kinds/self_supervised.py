"""An encoder learned from examples without their labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.core.settings import Count, Fraction, NonNegative, Share
from umbel.datasets.federated import Info
from umbel.tasks.draws import repeated
from umbel.tasks.models.build import builder
from umbel.tasks.self_supervised.build import method_of
from umbel.tasks.self_supervised.networks import follow
from umbel.tasks.self_supervised.views import Views
from umbel.tasks.self_supervised.worth import linear_probe, nearest, spread
from umbel.tasks.task import Batch, Forward, Task

COLLAPSED = 0.1
"""A spread below this is hardly one direction."""

LOOK = 32
"""Examples of a training batch whose embeddings are looked at."""


def self_supervised(
    info: Info,
    model: Part | str | None,
    *,
    method: str | dict[str, Any] = "simclr",
    embedding: Count = 64,
    crop: Share = 0.7,
    rotate: NonNegative = 0.2,
    flip: bool = False,
    jitter: NonNegative = 0.3,
    noise: NonNegative = 0.1,
    drop: Fraction = 0.2,
) -> Task:
    """An encoder that learns from its examples alone: contrast, prediction, or hidden patches.

    Labels are not trained on. Evaluation measures with them what the encoder is worth, each example
    by the others of its batch of 512: ``probe``, a linear classifier's accuracy, and ``knn``, that
    of the 5 nearest; and without them ``spread``, near 0 where all embeddings have become one.
    Training records the spread of each round, too.

    Args:
        info: of the data; ``x`` is numbers, best images.
        model: the encoder.
        method: what is learned: a name, or a table of a name and the method's own keys.
        embedding: numbers that the encoder gives, where it does not settle that itself.
        crop: views: least side of a crop, as a share of the image's.
        rotate: greatest angle, in radians.
        flip: mirror half of the images.
        jitter: of contrast and brightness.
        noise: standard deviation of what is added to each number.
        drop: share of numbers set to 0, where ``x`` is no image.
    """
    if info.vocabulary is not None:
        raise InputError(
            f"self-supervised views are of numbers; data set '{info.name}' holds symbols",
            where="[task]",
            fix='kind = "masked-language-model"',
        )
    encoder = builder(model, info, embedding, head="features")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        like = encoder().eval()
        width = like(torch.zeros(1, *info.input_shape)).shape[1]
    way = method_of(method, like, width)
    view = Views(crop, rotate, flip, jitter, noise, drop).__call__

    def build() -> nn.Module:
        return way.around(encoder())

    def losses(forward: Forward, batch: Batch) -> Tensor:
        return way.losses(forward, batch["x"], view)

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        h = forward(batch["x"])[:, :width]
        found = {"spread": spread(h)}
        if info.classes is not None:
            y = batch["y"]
            found["probe"] = linear_probe(h, y, info.classes)
            found["knn"] = nearest(h, y, info.classes)
        return found

    def look(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        few = forward(batch["x"][:LOOK])[:, :width]
        return {"spread": spread(few)[:1].expand(len(batch["x"]))}

    test = Task(build, repeated(losses), metrics, decomposable=False)
    return Task(
        build,
        losses,
        look,
        decomposable=way.decomposable,
        test=test,
        follow=follow if way.follows else None,
        pictures=way.pictures,
        remark=remark,
    )


def remark(figures: Mapping[str, float]) -> str:
    """A warning where embeddings are all but one."""
    found = figures.get("spread", 1.0)
    if found >= COLLAPSED:
        return ""
    return f"collapse: the spread of the embeddings is {found:.2g}, of 1"
