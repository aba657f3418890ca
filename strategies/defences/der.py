"""DER++: replay that also holds the model to what it once gave for the examples replayed."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from umbel.core.settings import Count, Natural, NonNegative
from umbel.core.trees import Tree
from umbel.datasets.buffer import Buffer
from umbel.strategies.parts import ClientRule
from umbel.strategies.parts.defence import Defence, mean_of, sides
from umbel.strategies.parts.rule import Forward, Local


def der(
    *,
    alpha: NonNegative = 0.5,
    beta: NonNegative = 1.0,
    per_class: Natural | None = None,
    examples: Natural | None = None,
    bytes: Count | None = None,
    choice: Literal["balanced", "reservoir", "herding"] = "balanced",
    repeat: bool = True,
) -> Defence:
    """DER++. Buzzega et al. 2020, equation 6 (arXiv:2004.07211); beta = 0 is DER.

    ``mean L(new) + alpha mean ||f(x) - z||^2 / classes + beta mean L(old)``, where z are the logits
    that the global model gave when the example's experience ended.

    Args:
        alpha: weight of the logits.
        beta: weight of the old examples' own loss.
        per_class: as for replay.
        examples: as for replay.
        bytes: as for replay.
        choice: as for replay.
        repeat: as for replay.
    """

    def rule(rule: ClientRule) -> ClientRule:
        def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
            losses = forward.losses(local.params, batch)
            apart = (forward.outputs(local.params, batch) - batch["z"]).square().mean(1)
            new, old = sides(batch, mask)
            again = alpha * mean_of(apart, old) + beta * mean_of(losses, old)
            return rule.loss(mean_of(losses, new) + again, local)

        return rule._replace(objective=objective)

    kept = Buffer.bounded(per_class, examples, bytes, choice, repeat)
    return Defence(
        rule=rule, buffer=kept, tells_old=True, stores_outputs=True, replaces=True, outputs=True
    )
