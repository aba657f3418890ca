"""What stands out in a history: the figure to look at, its curve and its best round.

Histories here are records as plain values (``RoundRecord.as_json``), so that looking at runs does
not load torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

History: TypeAlias = Sequence[Mapping[str, Any]]


class Point(NamedTuple):
    """A metric's value after a round."""

    round: int
    value: float


def lower_is_better(metric: str) -> bool:
    """Whether less is better: losses, errors and perplexity; all else is a score."""
    words = metric.lower().replace("-", "_").split("_")
    return any(w in ("loss", "error", "mse", "mae", "rmse", "nll", "perplexity") for w in words)


def metrics(history: History) -> list[str]:
    """The metrics of a history, scores before losses, each in the order of the records."""
    names = dict.fromkeys(name for record in history for name in record["metrics"])
    return sorted(names, key=lower_is_better)


def curve(history: History, metric: str, part: str = "metrics") -> list[Point]:
    """The rounds that have ``metric``, with its values; NaN where a run diverged."""
    points = [(r["round"], r[part].get(metric, ...)) for r in history]
    return [Point(n, math.nan if v is None else float(v)) for n, v in points if v is not ...]


def best(history: History, metric: str) -> Point | None:
    """The first round with the best finite value; ``None`` where there is none."""
    points = [p for p in curve(history, metric) if math.isfinite(p.value)]
    sign = 1 if lower_is_better(metric) else -1
    return min(points, key=lambda p: sign * p.value, default=None)


def last(history: History) -> Mapping[str, Any]:
    """The last record that was evaluated; an empty one where none was."""
    return next((r for r in reversed(history) if r["metrics"]), {"metrics": {}})


def failures(history: History) -> Counter[str]:
    """How often each reason made a client fail, over all rounds."""
    return Counter(f["reason"] for record in history for f in record["failures"])


def difference(
    configurations: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The keys whose values are not all the same: key -> run id -> value."""
    tables = {run_id: flat(configuration) for run_id, configuration in configurations.items()}
    keys = dict.fromkeys(key for table in tables.values() for key in table)
    found = {}
    for key in keys:
        values = {run_id: table.get(key) for run_id, table in tables.items()}
        if key != "run.store" and len({repr(v) for v in values.values()}) > 1:
            found[key] = values
    return found


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table as ``section.key`` -> value."""
    rows: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            rows.update(flat(value, f"{prefix}{key}."))
        else:
            rows[f"{prefix}{key}"] = value
    return rows
