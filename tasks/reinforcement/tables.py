"""Tables of values as modules, for worlds whose observation is a one among zeros."""

from __future__ import annotations

from torch import nn

from umbel.core.errors import InputError
from umbel.tasks.reinforcement.acting import Played


def table(inputs: int, outputs: int) -> nn.Linear:
    """A row of ``outputs`` zeros for each state."""
    module = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(module.weight)
    return module


def require_states(where: Played, task: str) -> None:
    """Refuses a world without numbered states.

    Raises:
        InputError: there are none to make a table of.
    """
    if not where.kind.states:
        raise InputError(
            f"{task} keeps a table of states, and environment '{where.info.name}' is seen as "
            f"{where.kind.inputs} numbers",
            where="[task] environment",
            fix="environment = 'grid', or kind = 'dqn'",
        )
