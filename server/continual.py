"""What a run over experiences comes to: the accuracy matrix, and the figures made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    rows = [accuracies(found, count) for found in scores]
    return np.array(rows, dtype=np.float64).reshape(-1, count)


class Met(NamedTuple):
    """When experiences are met.

    Args:
        first: (experiences,), the first stage that anybody is in each.
        done: (experiences,), the first by whose end everybody has been.
    """

    first: Sequence[int]
    done: Sequence[int]


def measures(
    r: Matrix,
    before: Sequence[float] | None = None,
    joint: Sequence[float] | None = None,
    met: Met | None = None,
) -> dict[str, float]:
    """The usual figures of an accuracy matrix; those that it does not determine are left out.

    With k the last stage, f_j and d_j when experience j is first met, and done, all means over j:
    ``acc`` = R[k,j], d_j <= k; ``bwt`` = R[k,j] - R[d_j,j], d_j < k; ``forgetting`` =
    max_{l<k} R[l,j] - R[k,j], d_j < k; ``fwt`` = R[f_j-1,j] - b_j, 0 < f_j <= k;
    ``intransigence`` = a_j - R[d_j,j], d_j <= k. In step, f_j = d_j = j.

    Args:
        r: (k + 1, experiences), at least one row.
        before: b, (experiences,): of the model before training.
        joint: a, (experiences,): of a model trained on all that was met, for the last figure.
        met: f and d; ``None``: all clients are in step.

    Source: Lopez-Paz and Ranzato 2017, equations 2 to 4 (arXiv:1706.08840); Chaudhry et al. 2018,
    definitions 1 and 2 (arXiv:1801.10112).
    """
    k, count = len(r) - 1, r.shape[1]
    first, done = met or Met(range(count), range(count))
    learned = [j for j in range(count) if done[j] <= k]
    passed = [j for j in learned if done[j] < k]
    last, own = r[k], {j: r[done[j], j] for j in learned}
    found = {
        "acc": [last[j] for j in learned],
        "bwt": [last[j] - own[j] for j in passed],
        "forgetting": [r[:k, j].max() - last[j] for j in passed],
    }
    if before is not None:
        found["fwt"] = [r[first[j] - 1, j] - before[j] for j in range(count) if 0 < first[j] <= k]
    if joint is not None:
        found["intransigence"] = [joint[j] - own[j] for j in learned]
    known = {letter: np.array(v)[~np.isnan(v)] for letter, v in found.items()}
    return {letter: float(values.mean()) for letter, values in known.items() if len(values)}


def accuracies(metrics: Mapping[str, float], count: int) -> list[float]:
    """The accuracy on each experience, out of a round's metrics; NaN where there is none."""
    return [metrics.get(name(j), math.nan) for j in range(count)]


def report(
    history: Sequence[RoundRecord],
    count: int,
    per_stage: int,
    met: Mapping[str, Met],
    before: Scores | None = None,
    joint: Scores | None = None,
) -> dict[str, Any]:
    """The matrix and the figures of a run so far, global and of each client, as plain values.

    Args:
        history: its records.
        count: of experiences.
        per_stage: rounds of each stage.
        met: when each client meets them; under ``""`` when all do.
        before: of the model before training.
        joint: of a model trained on all at once.
    """
    ends = [r for r in history if r.round % per_stage == 0]
    if not ends:
        return {"matrix": [], "per_client": {}}

    def table(of: Callable[[RoundRecord | Scores], Mapping[str, float]], met: Met) -> Any:
        r = matrix([of(record) for record in ends], count)
        base, best = (None if s is None else accuracies(of(s), count) for s in (before, joint))
        extra = {"before": base, "joint": best}
        return {
            "matrix": [_numbers(row) for row in r.tolist()],
            **measures(r, base, best, met),
            **{letter: _numbers(v) for letter, v in extra.items() if v is not None},
        }

    clients = sorted({c for r in ends for c in r.per_client})
    each = {c: table(lambda scores, c=c: scores.per_client.get(c, {}), met[c]) for c in clients}  # type: ignore[misc]
    return {**table(lambda scores: scores.metrics, met[""]), "per_client": each}


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
