"""What is reported of the clients' own models: their mean, the tenth percentile and the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from umbel.core.payloads import Evaluation

PREFIXES = ("personal_", "fine_tuned_")
"""Of metrics that are each client's own model's, and not the global one's."""

LOWER_IS_BETTER = ("loss", "mse", "mae", "rmse", "perplexity", "error")


def is_personal(name: str) -> bool:
    """Whether a metric is of the clients' own models."""
    return name.startswith(PREFIXES)


def base(name: str) -> str:
    """The task's metric that a reported one is of: ``accuracy`` of ``personal_accuracy_p10``."""
    if not is_personal(name):
        return name
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name.removesuffix("_p10").removesuffix("_worst")


def spread(found: Sequence[Evaluation]) -> dict[str, float]:
    """Over clients, each counted once: the mean, the client that nine in ten do better than, worst.

    The tenth percentile is from the bad end: for a loss it is the ninetieth. Linear between
    clients, as ``numpy.percentile``.
    """
    names = [name for name in (found[0].metrics if found else ()) if is_personal(name)]
    told: dict[str, float] = {}
    for name in names:
        values = np.array([e.metrics[name] for e in found])
        lower = base(name) in LOWER_IS_BETTER
        told[name] = float(values.mean())
        told[f"{name}_p10"] = float(np.percentile(values, 90 if lower else 10))
        told[f"{name}_worst"] = float(values.max() if lower else values.min())
    return told


def of_global(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of the global model alone."""
    return {name: value for name, value in metrics.items() if not is_personal(name)}
