"""Who was in the training data of a run: the target and its shadows are trained as the run says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.func import functional_call

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.core.trees import Tree
from umbel.datasets.federated import Arrays, rows, take
from umbel.privacy.audits import membership
from umbel.privacy.audits.membership import Point, Roc
from umbel.simulations.audits.parts import members
from umbel.simulations.audits.trained import data, how, sections, trained
from umbel.simulations.prepare import Prepared, prepare
from umbel.tasks.evaluate import BATCH, tensor_of

F64: TypeAlias = npt.NDArray[np.float64]

FALSE_RATES = (0.001, 0.01)
"""At which true-positive rates are reported."""

WHERE = "umbel audit membership"


@dataclass(frozen=True)
class Curve:
    """How well one attack does.

    Args:
        roc: over all examples, half of which are members.
        points: true-positive rates at :data:`FALSE_RATES`, with intervals.
        bound: the epsilon that it refutes.
    """

    roc: Roc
    points: list[Point]
    bound: float


@dataclass(frozen=True)
class Membership:
    """What the attacks found.

    Args:
        curves: attack -> how well it does.
        theory: epsilon of one example by the target's ledger; infinite without a guarantee.
        delta: of it.
        unit: of privacy.
        confidence: of intervals and bounds.
        shadows: how many shadow models there were.
    """

    curves: dict[str, Curve]
    theory: float
    delta: float
    unit: str
    confidence: float
    shadows: int

    @property
    def violated(self) -> bool:
        """Whether an attack does better than the theory allows."""
        return any(curve.bound > self.theory for curve in self.curves.values())

    def as_json(self) -> dict[str, Any]:
        """The findings as plain values."""
        return {
            "unit": self.unit,
            "theory_epsilon": self.theory,
            "delta": self.delta,
            "confidence": self.confidence,
            "shadows": self.shadows,
            "violated": self.violated,
            "attacks": {
                name: {
                    "auc": curve.roc.auc,
                    "lower_bound": curve.bound,
                    "members": curve.roc.members,
                    "others": curve.roc.others,
                    "true_positive_rates": [point._asdict() for point in curve.points],
                }
                for name, curve in self.curves.items()
            },
        }


def attack(
    run: RunFile,
    *,
    shadows: int = 8,
    confidence: float = 0.95,
    engine: str = "vectorised",
    announce: Callable[[str], None] = lambda message: None,
) -> Membership:
    """Trains the target and its shadows, each on a random half of the run's training examples.

    The attacks see the final model alone. *loss*: members have small losses. *rmia*: members have
    larger likelihoods than the shadows expect, compared with examples of the test set.

    Args:
        run: trained once for each model, on half of its examples.
        shadows: how many besides the target; 0 leaves the attack that needs them out.
        confidence: of intervals and bounds.
        engine: where the clients live.
        announce: told how far it is.

    Raises:
        InputError: the run has no test examples, or as :func:`umbel.simulations.simulate.simulate`.
    """
    prepared = prepare(run)
    population = prepared.data.test or prepared.data.client_test
    if population is None:
        raise InputError(
            "no test examples to compare with", where=WHERE, fix="set [data] holdout = 0.2"
        )
    pool = take(prepared.data.train, prepared.data.train_holdings.index)
    clients = len(prepared.data.names)
    inside: list[F64] = []
    outside: list[F64] = []
    stated: float | None = None
    for model in range(1 + shadows):
        announce(f"model {model + 1} of {1 + shadows}")
        tables = {
            **sections(run, "task", "client", "strategy", "privacy", "secure_aggregation"),
            "run": how(run),
            "data": data(run, "half", model=model, clients=clients),
            "evaluate": {"every": 0, "per_client": False},
        }
        final, outcome = trained(tables, engine)
        inside.append(likelihoods(prepared, final, pool))
        outside.append(likelihoods(prepared, final, population))
        if model == 0 and outcome.privacy is not None:
            stated = outcome.privacy["epsilon"]
    truth = members(run.run.seed, 0, rows(pool))
    scores = {"loss": inside[0]}
    if shadows:
        scores["rmia"] = membership.rmia(
            inside[0], np.stack(inside[1:]), outside[0], np.stack(outside[1:])
        )
    delta = run.privacy.delta if run.privacy.unit != "none" else 0.0
    curves = {}
    for name, found in scores.items():
        roc = membership.roc(found, truth)
        points = [membership.true_rate(roc, rate, confidence) for rate in FALSE_RATES]
        curves[name] = Curve(roc, points, membership.bound(roc, delta, confidence))
    theory = float("inf") if stated is None else float(stated)
    return Membership(curves, theory, delta, run.privacy.unit, confidence, shadows)


def likelihoods(prepared: Prepared, model: Tree, examples: Arrays) -> F64:
    """exp(-loss) of every example, (n,): the probability that a classifier gives its label."""
    module = prepared.module.eval()
    names = dict(module.named_parameters()).keys() | dict(module.named_buffers()).keys()
    tensors = {name: t for name, t in model.items() if name in names}
    found = []
    with torch.no_grad():
        for at in range(0, rows(examples), BATCH):
            batch = {name: tensor_of(c)[at : at + BATCH] for name, c in examples.items()}

            def forward(*inputs: torch.Tensor) -> torch.Tensor:
                output: torch.Tensor = functional_call(module, tensors, inputs)
                return output

            found.append(torch.exp(-prepared.task.losses(forward, batch).double()))
    return np.asarray(torch.cat(found).numpy(), dtype=np.float64)
