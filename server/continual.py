"""What a run over experiences comes to: the accuracy matrix, and the figures made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.core.trees import Model
from umbel.server.checkpoints import replace_file
from umbel.server.records import RoundRecord, Scores
from umbel.server.rounds import Evaluate
from umbel.tasks.experiences import METRIC, hits, share

REPORT = "continual.json"

Matrix = npt.NDArray[np.float64]
"""R, (stages, experiences): R[i, j] is the accuracy on experience j after stage i; NaN where there
is no test example."""


def name(experience: int) -> str:
    """The name of the accuracy on an experience, counted from 0, in a round's record."""
    return f"experience-{experience + 1}/{METRIC}"


def by_experience(evaluate: Evaluate, count: int, chosen: Collection[str] | None) -> Evaluate:
    """The evaluation, with an accuracy for each experience.

    Args:
        evaluate: of a task that :func:`umbel.tasks.experiences.scored` made.
        count: of experiences.
        chosen: which other metrics are shown; ``None``: all.
    """
    raw = {f(j) for f in (share, hits) for j in range(count)}

    def apart(means: Mapping[str, float]) -> dict[str, float]:
        shown = {n: v for n, v in means.items() if not raw & {n, n.partition(" ")[0]}}
        if chosen is not None:
            shown = {n: v for n, v in shown.items() if n in chosen}
        found = {
            name(j): means[hits(j)] / means[share(j)]
            for j in range(count)
            if means.get(share(j), 0) > 0
        }
        return {**shown, **found}

    def scores(round_number: int, model: Model) -> Scores:
        found = evaluate(round_number, model)
        each = {client: apart(m) for client, m in found.per_client.items()}
        return found._replace(metrics=apart(found.metrics), per_client=each)

    return scores


def matrix(scores: Sequence[Mapping[str, float]], count: int) -> Matrix:
    """R from the metrics at the end of each stage so far."""
    rows = [[found.get(name(j), math.nan) for j in range(count)] for found in scores]
    return np.array(rows, dtype=np.float64).reshape(-1, count)


def measures(
    r: Matrix, before: Sequence[float] | None = None, joint: Sequence[float] | None = None
) -> dict[str, float]:
    """The usual figures of an accuracy matrix; those that it does not determine are left out.

    With k the last stage: ``acc`` = mean_{j<=k} R[k,j]; ``bwt`` = mean_{j<k} (R[k,j] - R[j,j]);
    ``forgetting`` = mean_{j<k} (max_{l<k} R[l,j] - R[k,j]); ``fwt`` = mean_{j>0} (R[j-1,j] - b_j);
    ``intransigence`` = mean_{j<=k} (a_j - R[j,j]).

    Args:
        r: (k + 1, experiences), at least one row.
        before: b, (experiences,): of the model before training.
        joint: a, (experiences,): of a model trained on all that was met, for the last figure.

    Source: Lopez-Paz and Ranzato 2017, equations 2 to 4 (arXiv:1706.08840); Chaudhry et al. 2018,
    definitions 1 and 2 (arXiv:1801.10112).
    """
    k = len(r) - 1
    own = np.array([r[j, j] for j in range(k + 1)])
    best = r[:k, :k].max(0) if k else np.zeros(0)
    found = {
        "acc": r[k, : k + 1],
        "bwt": r[k, :k] - own[:k],
        "forgetting": best - r[k, :k],
    }
    if before is not None:
        found["fwt"] = np.array([r[j - 1, j] - before[j] for j in range(1, k + 1)])
    if joint is not None:
        found["intransigence"] = np.asarray(joint)[: k + 1] - own
    known = {letter: values[~np.isnan(values)] for letter, values in found.items()}
    return {letter: float(values.mean()) for letter, values in known.items() if len(values)}


def report(
    history: Sequence[RoundRecord], count: int, per_stage: int, before: Sequence[float] | None
) -> dict[str, Any]:
    """The matrix and the figures of a run so far, global and of each client, as plain values.

    Args:
        history: its records.
        count: of experiences.
        per_stage: rounds of each.
        before: accuracies before training, of the global test examples.
    """
    ends = [r for r in history if r.round % per_stage == 0]
    if not ends:
        return {"matrix": [], "per_client": {}}
    clients = sorted({c for r in ends for c in r.per_client})
    table = _plain(matrix([r.metrics for r in ends], count), before)
    each = {
        c: _plain(matrix([r.per_client.get(c, {}) for r in ends], count), None) for c in clients
    }
    return {**table, "before": _numbers(before or []), "per_client": each}


def _plain(r: Matrix, before: Sequence[float] | None) -> dict[str, Any]:
    return {"matrix": [_numbers(row) for row in r.tolist()], **measures(r, before)}


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values]


def keep_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Keeps the report with the run, for pictures."""
    text = json.dumps(report)
    replace_file(folder / REPORT, lambda path: path.write_text(text, encoding="utf-8"))


def kept_report(folder: Path) -> dict[str, Any]:
    """The report of a run.

    Raises:
        InputError: the run has none.
    """
    try:
        found: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            "the run has no accuracy matrix", where=folder.name, fix="name a run with [continual]"
        ) from None
    return found
