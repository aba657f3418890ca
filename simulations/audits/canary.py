"""Canaries in a real run: which epsilon its model refutes, beside the one its ledger states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.privacy.audits import one_run, one_shot
from umbel.simulations.audits import canary_parts
from umbel.simulations.audits.canary_parts import LAYER
from umbel.simulations.audits.trained import how, trained

PARTS = "umbel.simulations.audits.canary_parts"

TOO_LONG = 10.0
"""A canary's contribution before clipping, in clip norms."""

MOST = 300
"""Examples of a client that train beside the canaries."""


@dataclass(frozen=True)
class Audit:
    """What the canaries found.

    Args:
        unit: of privacy.
        theory: epsilon by the run's ledger, or infinity without a guarantee.
        bound: the epsilon that the run refutes, with its confidence.
        estimate: the epsilon that it looks like, which proves nothing.
        scores: (m,), how far the model went along each canary.
        included: (m,), the coins.
    """

    unit: str
    theory: float
    bound: one_run.Bound
    estimate: one_shot.Estimate
    scores: npt.NDArray[np.float64]
    included: npt.NDArray[np.bool_]

    @property
    def violated(self) -> bool:
        """Whether more was proven than the theory allows."""
        return self.bound.epsilon > self.theory

    def as_json(self) -> dict[str, Any]:
        """The findings as plain values."""
        return {
            "unit": self.unit,
            "theory_epsilon": self.theory,
            "lower_bound": self.bound.epsilon,
            "confidence": self.bound.confidence,
            "delta": self.bound.delta,
            "canaries": self.bound.canaries,
            "guesses": self.bound.guesses,
            "correct": self.bound.correct,
            "estimate": self.estimate.epsilon,
            "violated": self.violated,
        }


def audit(
    run: RunFile,
    *,
    canaries: int = 1000,
    confidence: float = 0.95,
    engine: str = "sequential",
    announce: Callable[[str], None] = lambda message: None,
) -> Audit:
    """Runs ``run`` once with canaries and bounds its epsilon from below by its final model.

    Who looks is the adversary of the guarantee, with all of his advantages: for examples the server
    that sees all that a site sends (so there is one site), for clients whoever sees the models.

    Args:
        run: with ``[privacy]``; its data, model, rounds and mechanism are kept. Server optimizer
            and client momentum are left out: they come after the mechanism.
        canaries: m; half of them, by fair coins, take part.
        confidence: of the bound.
        engine: where the clients live.
        announce: told what the run has to tell.

    Raises:
        InputError: the run has no unit of privacy, or as
            :func:`umbel.simulations.simulate.simulate`.
    """
    section = run.privacy
    if section.unit == "none":
        raise InputError(
            "nothing is promised, so that nothing can be broken",
            where="[privacy] unit",
            fix='set unit = "example" or "client" and epsilon or noise_multiplier',
        )
    tensors, outcome = trained(_planted(run, canaries), engine, announce)
    scores = tensors[LAYER][:canaries, 0].double().numpy()
    included = canary_parts.coins(run.run.seed, canaries)
    stated = None if outcome.privacy is None else outcome.privacy["epsilon"]
    length = float(np.linalg.norm(scores)) or 1.0
    cosines = scores / length  # with the canaries' directions, which are orthogonal
    return Audit(
        section.unit,
        float("inf") if stated is None else float(stated),
        one_run.audit(scores, included, section.delta, confidence),
        one_shot.estimate(
            cosines[included], cosines[~included], canaries, section.delta, pooled=True
        ),
        scores,
        included,
    )


def _planted(run: RunFile, canaries: int) -> dict[str, Any]:
    """The tables of the run with canaries among its units."""
    section, client = run.privacy, run.client
    task = run.task.model_dump(exclude={"model"})
    reach = TOO_LONG * section.clip_norm
    if section.unit == "client":  # what is clipped is the change of a whole round
        reach /= client.lr
    strategy: dict[str, Any] = {"name": "fedavg"}
    if section.unit == "client":
        strategy |= {"weights": "uniform"}
        if isinstance(run.strategy.cohort, float):
            strategy |= {"cohort": run.strategy.cohort}
    length = {
        key: value
        for key, value in client.model_dump().items()
        if key in ("lr", "batch_size", "local_epochs", "local_steps", "accumulation", "device")
        and value is not None
    }
    tables = {
        "run": how(run),
        "data": {
            "name": f"{PARTS}:data",
            "of": run.data.model_dump(exclude_none=True),
            "count": canaries,
            "unit": section.unit,
            "seed": run.run.seed,
            "most": MOST,
            "split": {"kind": "natural"},
            "holdout": 0.0,
            "client_holdout": 0.0,
        },
        "task": {
            "kind": f"{PARTS}:task",
            "of": task,
            "count": canaries,
            "scale": reach,
        },
        "client": length,
        "strategy": strategy,
        "privacy": section.model_dump(exclude_none=True),
        "evaluate": {"every": 0, "per_client": False},
    }
    if run.task.model is not None:
        tables["task"]["model"] = (
            run.task.model if isinstance(run.task.model, str) else run.task.model.model_dump()
        )
    return tables
