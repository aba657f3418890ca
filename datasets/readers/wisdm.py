"""WISDM activity recognition: accelerometer windows of phone users."""

from __future__ import annotations

import numpy as np

from umbel.datasets.columns import standardised
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged, folder, text

FILE = "WISDM_ar_v1.1_transformed.arff"
FORMAT = f"{FILE}: ARFF whose @data lines are id, user, 43 numbers or '?', activity"
WINDOWS = 5418
ACTIVITIES = ("Downstairs", "Jogging", "Sitting", "Standing", "Upstairs", "Walking")


def wisdm(*, path: str | None = None) -> Dataset:
    """5,418 accelerometer windows of 36 users, 43 features, 6 activities; users are clients.

    Missing values become the column's mean; columns are standardised over all users.

    Args:
        path: the ARFF file, its folder, or the one above; ``None``: in ``UMBEL_DATA``.

    Raises:
        InputError: the file is missing, damaged or cut short.

    Source: Kwapisz, Weiss and Moore 2010, "Activity recognition using cell phone accelerometers".
    """
    file = folder("wisdm|wisdm_ar", path, [FILE], FORMAT) / FILE
    header, data, body = text(file, FORMAT).partition("@data\n")
    if not data or not header.lstrip().lower().startswith("@relation"):
        raise damaged(file, "no '@data' line after an ARFF header", FORMAT)
    features, users, activities = [], [], []
    first = header.count("\n") + 2
    for number, line in enumerate(body.splitlines(), first):
        if not line.strip():
            continue
        _, *fields = line.split(",")
        if len(fields) != 45:
            raise damaged(file, f"line {number} has {len(fields) + 1} fields, not 46", FORMAT)
        if fields[-1] not in ACTIVITIES:
            raise damaged(file, f"line {number}: unknown activity '{fields[-1]}'", FORMAT)
        try:
            users.append(f"user{int(fields[0]):02d}")
            features.append([np.nan if f == "?" else float(f) for f in fields[1:-1]])
        except ValueError as error:
            raise damaged(file, f"line {number}: {error}", FORMAT) from None
        activities.append(ACTIVITIES.index(fields[-1]))
    if len(features) != WINDOWS:
        raise damaged(file, f"{len(features)} windows; version 1.1 has {WINDOWS}", FORMAT)
    x = np.array(features)
    x = np.where(np.isnan(x), np.nanmean(x, axis=0), x)
    return Dataset(
        Info("wisdm", (43,), classes=len(ACTIVITIES)),
        {"x": standardised(x), "y": np.array(activities, dtype=np.int64)},
        owner=np.array(users),
    )
