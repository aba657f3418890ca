"""An encoder learned from examples without their labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.core.settings import Count, Fraction, NonNegative, Positive, Share
from umbel.datasets.federated import Info
from umbel.tasks.models.build import builder
from umbel.tasks.self_supervised import losses as of
from umbel.tasks.self_supervised.networks import Around
from umbel.tasks.self_supervised.views import Views
from umbel.tasks.self_supervised.worth import linear_probe, nearest, spread
from umbel.tasks.task import Batch, Forward, Task


def self_supervised(
    info: Info,
    model: Part | str | None,
    *,
    method: Literal["simclr", "byol", "simsiam", "barlow-twins"] = "simclr",
    embedding: Count = 64,
    projection: Count = 32,
    hidden: Count = 64,
    temperature: Positive = 0.5,
    momentum: Fraction = 0.99,
    redundancy: NonNegative = 0.005,
    crop: Share = 0.7,
    rotate: NonNegative = 0.2,
    flip: bool = False,
    jitter: NonNegative = 0.3,
    noise: NonNegative = 0.1,
    drop: Fraction = 0.2,
) -> Task:
    """Two random views of an example shall have one embedding: SimCLR, BYOL, SimSiam, Barlow Twins.

    Labels are not trained on. Evaluation measures with them what the encoder is worth, each example
    by the others of its batch of 512: ``probe``, a linear classifier's accuracy, and ``knn``, that
    of the 5 nearest; and without them ``spread``, near 0 where all embeddings have become one.

    Args:
        info: of the data; ``x`` is numbers, best images.
        model: the encoder, which gives ``embedding`` numbers.
        method: what is learned from views.
        embedding: numbers that the encoder gives.
        projection: numbers that are compared.
        hidden: units of projector and predictor.
        temperature: ``simclr``.
        momentum: ``byol``: of the target network.
        redundancy: ``barlow-twins``: weight of correlations of different coordinates.
        crop: least side of a crop, as a share of the image's.
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
    view = Views(crop, rotate, flip, jitter, noise, drop)

    def build() -> nn.Module:
        predicts, slow = method in ("byol", "simsiam"), momentum if method == "byol" else None
        return Around(encoder(), embedding, projection, hidden, predicts, slow)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        x = batch["x"]
        out = forward(torch.cat([view(x), view(x)]))
        a, b = out[: len(x), embedding:], out[len(x) :, embedding:]
        if method == "simclr":
            return of.simclr(a, b, temperature)
        if method == "barlow-twins":
            return of.barlow_twins(a, b, redundancy)
        # A row holds projection and prediction, and BYOL's target behind them.
        aim = slice(2 * projection, None) if method == "byol" else slice(projection)
        guess = slice(projection, 2 * projection)
        return (of.cosine(a[:, guess], b[:, aim]) + of.cosine(b[:, guess], a[:, aim])) / 2

    def test_losses(forward: Forward, batch: Batch) -> Tensor:
        x = batch["x"]
        cards = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cards):  # the same views each time
            torch.manual_seed(0)
            return losses(forward, batch)

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        h = forward(batch["x"])[:, :embedding]
        found = {"spread": spread(h)}
        if info.classes is not None:
            y = batch["y"]
            found["probe"] = linear_probe(h, y, info.classes)
            found["knn"] = nearest(h, y, info.classes)
        return found

    test = Task(build, test_losses, metrics, decomposable=False)
    return Task(build, losses, lambda forward, batch: {}, decomposable=False, test=test)
