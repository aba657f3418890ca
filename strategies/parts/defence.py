"""A defence against forgetting, which goes with any strategy: data and pure functions, as that."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from umbel.core.trees import Tree, map_tree, zeros_like
from umbel.datasets.buffer import Buffer
from umbel.datasets.experiences import Timetable
from umbel.strategies.parts.combine import Combined, weighted_mean
from umbel.strategies.parts.rule import (
    ClientRule,
    Delivered,
    Ended,
    Local,
    Objective,
    Trees,
    mean,
)
from umbel.strategies.parts.strategy import ServerState, Strategy

IMPORTANCE = "importance"


class Classes(NamedTuple):
    """What a defence may know of the experiences.

    Args:
        groups: (groups, classes) bool: the softmax is taken over each group by itself.
        seen: (classes,) bool: those met in earlier stages.
    """

    groups: Tensor
    seen: Tensor


class Measure(NamedTuple):
    """What clients find out about a model when an experience ends: how much each parameter counts.

    Args:
        of: a function of the gradient of one example; its mean over examples is the importance.
        examples: how many a client looks at.
        objective: what is differentiated; ``None``: the loss.
    """

    of: Callable[[Tensor], Tensor]
    examples: int
    objective: Objective | None = None


class Turn(NamedTuple):
    """The moment between two experiences.

    Args:
        params: the global parameters.
        classes: the groups, and what was met before.
        importance: what :class:`Measure` found, in the mean over all clients' examples; empty
            where nothing is measured.
    """

    params: Tree
    classes: Classes
    importance: Tree


class Defence(NamedTuple):
    """What is done against forgetting.

    Args:
        letters: (parameters, classes) -> what the server keeps and broadcasts in the first
            experience.
        turn: (those, :class:`Turn`) -> those of the next.
        rule: the strategy's client rule -> the same with the defence.
        measure: what clients find out in between.
        buffer: what they keep of their examples.
        tells_old: whether the column ``old`` of a batch, bool, says which examples are of earlier
            experiences.
        stores_outputs: whether with those examples goes what the model gave for them when their
            experience ended, the column ``z``.
        replaces: whether the objective is its own, so that a strategy's cannot be.
        outputs: whether it reads the model's outputs, one a class.
        at_server: letters that are not broadcast.
        uploads: as of a :class:`Strategy`: what clients send besides.
        step: (letters, combined) -> letters, after each round; of names, shapes and dtypes as they
            were.
        holds: (parameters before the server's step, after it, letters) -> parameters.
        model: (the task's module, experiences) -> one that is told, as ``experience`` (B,), which
            each example is of.
        prototypes: whether classes are told by the nearest mean of their features.
    """

    letters: Callable[[Tree, Classes], Trees] = lambda params, classes: {}
    turn: Callable[[Trees, Turn], Trees] = lambda letters, turn: letters
    rule: Callable[[ClientRule], ClientRule] = lambda rule: rule
    measure: Measure | None = None
    buffer: Buffer | None = None
    tells_old: bool = False
    stores_outputs: bool = False
    replaces: bool = False
    outputs: bool = False
    at_server: frozenset[str] = frozenset()
    uploads: Callable[[Tree], Trees] | None = None
    step: Callable[[Trees, Combined], Trees] | None = None
    holds: Callable[[Tree, Tree, Trees], Tree] | None = None
    model: Callable[[nn.Module, int], nn.Module] | None = None
    prototypes: bool = False

    @property
    def keeps_models(self) -> bool:
        """Whether the models that stages ended with are needed later."""
        herds = self.buffer is not None and self.buffer.choice == "herding"
        return herds or self.stores_outputs or self.prototypes


def classes_of(times: Timetable, head: str, stage: int) -> Classes:
    """What a defence is told when a stage begins.

    Args:
        times: when experiences are met.
        head: of the model, as ``[continual]`` has it.
        stage: from 0.
    """
    groups = torch.ones(1, times.classes, dtype=torch.bool)
    if head == "multi" and times.of_class is not None:
        of_class = torch.from_numpy(times.of_class)
        groups = of_class[None, :] == torch.arange(times.count)[:, None]
    return Classes(groups, torch.from_numpy(times.seen(stage - 1)))


def defended(strategy: Strategy, defence: Defence, classes: Classes) -> Strategy:
    """The strategy with a defence around it; its letters are broadcast and kept beside its own."""
    letters = frozenset(defence.letters({}, classes))
    sent = sorted(letters - defence.at_server)

    def init(params: Tree) -> ServerState:
        return {**strategy.init(params), **defence.letters(params, classes)}

    def broadcast(params: Tree, state: ServerState) -> Trees:
        theirs = {} if strategy.broadcast is None else strategy.broadcast(params, state)
        return {**theirs, **{letter: state[letter] for letter in sent}}

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        mine: Trees = {letter: state[letter] for letter in state if letter in letters}
        theirs = {letter: part for letter, part in state.items() if letter not in letters}
        stepped, theirs = strategy.server(params, theirs, mean)  # type: ignore[assignment]
        if defence.holds is not None:
            stepped = defence.holds(params, stepped, mine)
        if defence.step is not None:
            mine = defence.step(mine, mean)
        return stepped, {**theirs, **mine}

    def uploads(params: Tree) -> Trees:
        theirs = {} if strategy.uploads is None else strategy.uploads(params)
        return {**theirs, **({} if defence.uploads is None else defence.uploads(params))}

    return strategy._replace(
        init=init,
        broadcast=broadcast if sent else strategy.broadcast,
        uploads=uploads if defence.uploads is not None else strategy.uploads,
        server=server,
        client=defence.rule(strategy.client),
    )


def turned(
    strategy: Strategy, defence: Defence, state: ServerState, turn: Turn
) -> dict[str, object]:
    """The server's state at the start of an experience: the strategy's own stays as it is."""
    letters = frozenset(defence.letters({}, turn.classes))
    mine = {letter: state[letter] for letter in letters}
    return {**state, **defence.turn(mine, turn)}


def sides(batch: Tree, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which examples of a batch are new, and which of earlier experiences, (B,) bool each."""
    old = batch["old"]
    return (~old, old) if mask is None else (~old & mask, old & mask)


def mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of those chosen; 0 where none is."""
    return torch.where(chosen, values, 0).sum() / chosen.sum().clamp(min=1)


def adding(rule: ClientRule, term: Objective) -> ClientRule:
    """The rule with a further term of the objective, which reads the batch."""
    own = rule.objective

    def objective(forward: object, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        if own is None:
            value = rule.loss(mean(forward.losses(local.params, batch), mask), local)  # type: ignore[attr-defined]
        else:
            value = own(forward, local, batch, mask)  # type: ignore[arg-type]
        return value + term(forward, local, batch, mask)  # type: ignore[arg-type]

    return rule._replace(objective=objective)


def measuring(measure: Measure) -> Strategy:
    """A strategy that moves nothing, and whose state after a round is the importance.

    For rounds of single examples: each step adds ``measure.of`` of its gradient, and takes the step
    back. What is sent is a mean over the client's examples, weighted like an update, so that it is
    gated, masked and summed as any update is.
    """

    def zero(params: Tree) -> Trees:
        return {IMPORTANCE: zeros_like(params)}

    def begin(anchor: Tree, shared: Trees, own: Trees) -> Tree:
        zeros = {f"{IMPORTANCE}/{n}": torch.zeros_like(p) for n, p in anchor.items()}
        return {**anchor, **zeros}

    def after(params: Tree, gradient: Tree, local: Local) -> Tree:
        return {
            n: p + measure.of(gradient[n.removeprefix(f"{IMPORTANCE}/")]) if "/" in n else p
            for n, p in local.params.items()
        }

    def end(ended: Ended) -> Delivered:
        found = map_tree(lambda total: total / ended.steps, ended.own[IMPORTANCE])
        return Delivered(uploads={IMPORTANCE: found})

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        # Rounding under secure aggregation may leave a nought below itself, and a penalty of that
        # would push away from what is to be kept.
        found = map_tree(lambda p, f: f.clamp(min=0).to(p.dtype), params, mean.extra[IMPORTANCE])
        return params, {IMPORTANCE: found}

    rule = ClientRule(
        begin=begin, end=end, after=after, objective=measure.objective, joint=(IMPORTANCE,)
    )
    return Strategy(lambda params: {}, rule, weighted_mean(), server, uploads=zero)
