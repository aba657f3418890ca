"""Imitation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.core.settings import Count
from umbel.datasets.federated import Info
from umbel.datasets.worlds.world import find
from umbel.tasks.models.build import builder
from umbel.tasks.reinforcement.acting import Played, as_return, evaluation, nothing
from umbel.tasks.task import Batch, Forward, Task


def behaviour_cloning(
    info: Info,
    model: Part | str | None,
    *,
    environment: str = "cartpole",
    size: Count = 4,
    copies: Count = 8,
) -> Task:
    """What an expert did is learned as a classification, and measured by acting.

    The demonstrations are the clients' data, so that each step can be hidden by privacy. The test
    part holds parameters of environments; ``return`` is what the best actions earn there (Pomerleau
    1991).

    Args:
        info: of the demonstrations: ``x`` is what was seen, ``y`` what was done.
        model: what is seen -> a logit for each action.
        environment: as of ``ppo-control``: where it is measured.
        size: ``grid``: of its side.
        copies: of each environment, in evaluation.

    Raises:
        InputError: the data are no demonstrations of this environment.
    """
    kind = find(environment, size)
    if info.input_shape != (kind.inputs,) or info.classes != kind.actions:
        raise InputError(
            f"environment '{environment}' is seen as {kind.inputs} numbers and has {kind.actions} "
            f"actions; data set '{info.name}' has rows of shape {info.input_shape} and "
            f"{info.classes} classes",
            where="[data]",
            fix="name = 'cartpole-demonstrations', or an npz of your own",
        )
    where = Played(kind, copies, info)
    build = builder(model, info, kind.actions)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        return F.cross_entropy(forward(batch["x"]), batch["y"], reduction="none")

    test = evaluation(build, where, lambda out: out)
    return Task(build, losses, nothing, unit="demonstrated step", derived=as_return, test=test)
