"""What all tasks have in common that learn in worlds: models, worlds of a client, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.datasets.federated import Info
from umbel.datasets.worlds.world import Floats, Kind, World, find
from umbel.tasks.collect import Columns, Moment
from umbel.tasks.models.build import builder
from umbel.tasks.reinforcement.play import (
    Experience,
    earned,
    log_softmax,
    outputs,
    play,
    sampled,
)
from umbel.tasks.reinforcement.returns import advantages, standard
from umbel.tasks.task import Batch, Forward, Task

UNIT = "environment"
"""What a client holds; one is in all of its experience, so that only the client can be hidden."""

MOST = 1000
"""Steps of an episode in evaluation; CartPole's own limit is 500."""


class Played(NamedTuple):
    """Where a task acts.

    Args:
        kind: of the worlds.
        copies: of each that a client holds.
        info: what a model sees of one.
    """

    kind: Kind
    copies: int
    info: Info

    def worlds(self, held: Floats, seed: int) -> tuple[World, int, np.random.Generator]:
        """The client's worlds, how many there are, and the generator of what is done in them."""
        rows = np.repeat(held, self.copies, 0)
        draw = np.random.default_rng([seed, 0])
        return self.kind.make(rows, draw), len(rows), np.random.default_rng([seed, 1])


def played(info: Info, environment: str, size: int, copies: int) -> Played:
    """Where a task acts, on data such as ``info`` describes.

    Raises:
        InputError: no such environment, or the data are not its parameters.
    """
    kind = find(environment, size)
    if kind.parameters is not None and info.input_shape != (kind.parameters,):
        raise InputError(
            f"environment '{environment}' has {kind.parameters} parameters, and a row of data set "
            f"'{info.name}' has shape {info.input_shape}",
            where="[task] environment",
            fix=f"[data] name = '{environment}s'",
        )
    return Played(kind, copies, Info(environment, (kind.inputs,), classes=kind.actions))


class ActorCritic(nn.Module):
    """Two networks: the logits of actions (B, actions), then the value of what is seen (B, 1)."""

    def __init__(self, actor: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic

    def forward(self, x: Tensor) -> Tensor:
        """(B, actions + 1)."""
        return torch.cat([self.actor(x), self.critic(x)], 1)


def actor_critic(model: Part | str | None, where: Played) -> Callable[[], nn.Module]:
    """Builds two networks of the kind that ``model`` names."""
    actor, critic = (builder(model, where.info, n) for n in (where.kind.actions, 1))
    return lambda: ActorCritic(actor(), critic())


def columns(experience: Experience, **more: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Experience as examples, (T · E, …): ``x``, ``action``, and what else is named, float32."""
    flat = {name: column.reshape(-1).astype(np.float32) for name, column in more.items()}
    return {
        "x": experience.x.reshape(-1, experience.x.shape[-1]),
        "action": experience.action.reshape(-1),
        **flat,
    }


def judged(
    where: Played,
    module: nn.Module,
    held: Floats,
    moment: Moment,
    steps: int,
    gamma: float,
    lam: float,
) -> dict[str, npt.NDArray[Any]]:
    """What an actor did, and what its critic makes of it.

    Args:
        where: it acts.
        module: an :class:`ActorCritic`; values are in units of 1 / (1 - gamma).
        held: parameters of the client's worlds, (n, P).
        moment: of the round.
        steps: in each copy of each.
        gamma: discount of a step.
        lam: of the advantage estimates.

    Returns:
        of each step ``x``, ``action``, ``advantage`` (less the mean, over the spread of all),
        ``target`` (of its value, in the units of values), ``before`` (the logarithm of the action's
        probability).
    """
    world, count, dice = where.worlds(held, moment.seed)
    actions, unit = where.kind.actions, scale(gamma)
    came = play(world, count, lambda x: sampled(outputs(module, x)[:, :actions], dice), steps)
    now, then = (outputs(module, x.reshape(-1, x.shape[-1])) for x in (came.x, came.following))
    value, following = (out[:, actions].reshape(steps, count) * unit for out in (now, then))
    worth = advantages(came.reward, value, following, came.ended, came.over, gamma, lam)
    before = log_softmax(now[:, :actions])[np.arange(len(now)), came.action.reshape(-1)]
    target = (worth + value) / unit
    return columns(came, advantage=standard(worth), target=target, before=before)


def scale(gamma: float) -> float:
    """The unit of values: what a reward of 1 in each step comes to, and 1000 steps at most."""
    return 1 / (1 - min(gamma, 0.999))


def explored(moment: Moment, least: float, share: float) -> float:
    """The chance of a random action: from 1 in the first round down to ``least``, evenly.

    Args:
        moment: of which the round counts.
        least: after ``share`` of the rounds.
        share: 0: from the first on.
    """
    gone = (moment.round - 1) / max(share * moment.rounds, 1e-9)
    return max(least, 1 - (1 - least) * min(gone, 1)) if share else least


def transitions(experience: Experience) -> dict[str, npt.NDArray[Any]]:
    """Experience as examples of single steps: and what was seen next."""
    after = experience.following.reshape(-1, experience.x.shape[-1])
    found = columns(experience, reward=experience.reward, ended=experience.ended)
    return {**found, "following": after}


def evaluation(
    build: Callable[[], nn.Module], where: Played, logits: Callable[[Floats], Floats]
) -> Task:
    """Measures what the best action of a model earns: an episode in each copy of each world.

    The loss is minus the mean sum of rewards. Each evaluation begins in the same states.

    Args:
        build: the model.
        where: it acts.
        logits: of what the model gives (E, …), what actions are chosen by (E, actions).
    """
    seed = randomness.torch_seed(0, "evaluation")

    def losses(forward: Forward, batch: Batch) -> Tensor:
        x = batch["x"]
        world, count, _ = where.worlds(x.cpu().numpy(), seed)
        device = x.device

        def on_device(given: Tensor) -> Tensor:
            return forward(given.to(device))

        found = earned(world, count, lambda s: logits(outputs(on_device, s)).argmax(1), MOST)
        return -torch.from_numpy(found.reshape(len(x), where.copies).mean(1)).to(device).float()

    return Task(build, losses, nothing, decomposable=False)


def nothing(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
    """No figures beside the loss."""
    return {}


def as_return(means: Mapping[str, float]) -> Mapping[str, float]:
    """``return`` in place of what the loss of an evaluation is: minus that."""
    return {n.removesuffix("loss") + "return": -v for n, v in means.items() if n.endswith("loss")}


def task(
    build: Callable[[], nn.Module],
    losses: Callable[[Forward, Batch], Tensor],
    where: Played,
    logits: Callable[[Floats], Floats],
    collect: Callable[[nn.Module, Floats, Moment], Columns],
) -> Task:
    """The task that makes its experience by ``collect``: (model, parameters (n, P), moment)."""
    return Task(
        build,
        losses,
        nothing,
        unit=UNIT,
        derived=as_return,
        test=evaluation(build, where, logits),
        collect=lambda module, held, moment: collect(module, held["x"], moment),
    )
