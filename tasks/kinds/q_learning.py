"""Tabular Q-learning."""

from __future__ import annotations

from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.core.settings import Count, Fraction, Share
from umbel.datasets.federated import Info
from umbel.datasets.worlds.world import Floats
from umbel.tasks.collect import Columns, Moment
from umbel.tasks.reinforcement import losses as of
from umbel.tasks.reinforcement.acting import explored, played, task, transitions
from umbel.tasks.reinforcement.play import greedy_but, outputs, play
from umbel.tasks.reinforcement.tables import require_states, table
from umbel.tasks.task import Batch, Forward, Task


def q_learning(
    info: Info,
    model: Part | str | None,
    *,
    environment: str = "grid",
    size: Count = 4,
    steps: Count = 64,
    copies: Count = 4,
    gamma: Share = 0.95,
    epsilon: Fraction = 0.2,
    explore: Fraction = 0.0,
) -> Task:
    """Acting in environments with few states: a table of what each action is worth, learned.

    SGD with ``batch_size = 1`` is Watkins' rule with the rate ``lr``, over the round's experience
    in any order; the table travels and is averaged.

    Args:
        info: of the data: rows are parameters of environments.
        model: none: it is the table.
        environment: ``grid``, or your own with a one among zeros to see.
        size: of the grid's side.
        steps: in each environment, a round.
        copies: of each environment.
        gamma: discount of a step.
        epsilon: chance of a random action.
        explore: share of the rounds in which that falls from 1; 0: it never was.
    """
    if model is not None:
        raise InputError(
            "q-learning has a table, and no other model", where="[task.model]", fix="kind = 'dqn'"
        )
    where = played(info, environment, size, copies)
    require_states(where, "q-learning")

    def collect(module: nn.Module, held: Floats, moment: Moment) -> Columns:
        world, count, dice = where.worlds(held, moment.seed)
        stray = explored(moment, epsilon, explore)
        came = play(world, count, lambda x: greedy_but(outputs(module, x), stray, dice), steps)
        return transitions(came)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        best = forward(batch["following"]).detach().max(1).values
        target = of.bootstrapped(batch["reward"], batch["ended"], best, gamma)
        return (target - of.of_action(forward(batch["x"]), batch["action"])).square() / 2

    def build() -> nn.Module:
        return table(where.kind.inputs, where.kind.actions)

    return task(build, losses, where, lambda out: out, collect)
