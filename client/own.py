"""A client's own part of a round: what it has, where it starts from, what it sends and keeps.

All functions are pure and over the trees of one client, so that engines may map them over many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from umbel.core.errors import RunError
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, Tree, flatten, unflatten
from umbel.strategies.parts import ClientRule, Delivered, Ended, Local, Trees
from umbel.strategies.parts.rule import NAMED, joined, model_part
from umbel.strategies.parts.strategy import private_names
from umbel.tasks.collect import Columns
from umbel.tasks.task import Task

PRIVATE = "private"
"""The letter under which a client keeps the model's tensors that never travel."""

EXAMPLES = "examples"
"""The letter under which it keeps what its task makes: columns, of any length."""


def keeps(rule: ClientRule, task: Task) -> bool:
    """Whether a client keeps anything from round to round."""
    return rule.keeps or task.keeps is not None


def algorithm(run: RunFile, task: Task) -> str:
    """What a client's tensors are of: those of another strategy, or task, are of no use."""
    return run.strategy.name + (f" on {run.task.kind}" if task.keeps is not None else "")


def remembered(kept: Tree | None) -> Columns:
    """The columns among what a client kept."""
    return {} if kept is None else {n: t.numpy() for n, t in joined(kept, EXAMPLES).items()}


def left_over(task: Task, made: Columns) -> dict[str, Tensor]:
    """What a client keeps of the examples it was trained on, ``letter/name`` -> tensor."""
    if task.keeps is None:
        return {}
    found = task.keeps(made)
    return {f"{EXAMPLES}/{name}": torch.tensor(column) for name, column in found.items()}


def first(rule: ClientRule, model: Model) -> dict[str, Tree]:
    """What a client has before its first round.

    Args:
        rule: whose state it is.
        model: the model that the round starts from, with the initial private tensors.
    """
    state = {} if rule.state is None else dict(rule.state(model.params))
    if private := private_names(rule, model):
        state[PRIVATE] = {n: t for n, t in model.tensors().items() if n in private}
    return state


def told(rule: ClientRule, client: str) -> dict[str, Tree]:
    """What a client knows of itself, besides what it kept."""
    return {} if rule.named is None else {NAMED: rule.named(client)}


def restored(kept: Tree | None, fresh: Trees, client: str) -> Trees:
    """What a client has, from what it kept; in the order of ``fresh``, which it is if it kept none.

    Raises:
        RunError: it kept something else.
    """
    if kept is None:
        return fresh
    nested: Mapping[str, Tree] = unflatten(kept)
    nested = {letter: tree for letter, tree in nested.items() if letter != EXAMPLES}
    given, wanted = _shapes(flatten(nested)), _shapes(flatten(fresh))
    if given != wanted:
        odd = sorted(n for n in given.keys() | wanted.keys() if given.get(n) != wanted.get(n))
        raise RunError(
            f"what client '{client}' kept differs from the model in '{odd[0]}'",
            where=f"client '{client}'",
            fix="start the run anew: its model or strategy has changed",
        )
    return {letter: {n: nested[letter][n] for n in tree} for letter, tree in fresh.items()}


def start(rule: ClientRule, anchor: Tree, shared: Trees, own: Trees) -> dict[str, Tensor]:
    """What training starts from: the model's parameters, and the trees that are trained along."""
    params = anchor if rule.begin is None else rule.begin(anchor, shared, own)
    trained = {name: params[name] for name in anchor}
    for letter in rule.joint:
        tree = joined(params, letter) or own[letter]
        trained |= {f"{letter}/{name}": tensor for name, tensor in tree.items()}
    return trained


class Taken(NamedTuple):
    """What a client did in a round, besides its tensors; scalars.

    Args:
        steps: how many it took.
        examples: how many it holds.
        loss: the mean loss of the global model over them, where the rule asks.
    """

    steps: Tensor
    examples: Tensor
    loss: Tensor

    @classmethod
    def of(cls, steps: float, examples: float, loss: float) -> Taken:
        """From plain numbers."""
        return cls(*(torch.tensor(float(v)) for v in (steps, examples, loss)))


class Left(NamedTuple):
    """What a round leaves.

    Args:
        delta: in place of trained minus anchor; empty: just that.
        uploads: ``letter/name`` -> tensor.
        own: what the client keeps, but for the private tensors, which were trained in place.
    """

    delta: Tree
    uploads: Tree
    own: Trees


def end(
    rule: ClientRule, trained: Tree, local: Local, taken: Taken, lr: float, momentum: float = 0.0
) -> Left:
    """What a client sends and keeps, from what it trained and what the round began with."""
    own = {**local.own, **{letter: joined(trained, letter) for letter in rule.joint}}
    params = model_part(trained)
    ended = Ended(params, local.anchor, local.shared, own, taken.steps, lr, *taken[1:], momentum)
    delivered = Delivered() if rule.end is None else rule.end(ended)
    if unknown := sorted(delivered.own.keys() - own.keys()):
        raise ValueError(f"the rule keeps '{unknown[0]}', of which its state knows nothing")
    kept = {
        letter: delivered.own.get(letter, own[letter]) for letter in local.own if letter != NAMED
    }
    return Left(delivered.delta or {}, flatten(delivered.uploads), kept)


def personal(rule: ClientRule, model: Model, own: Trees) -> Model:
    """A client's own model, from the global one and what it has."""
    mine = own.get(PRIVATE, {})
    params = {name: mine.get(name, p) for name, p in model.params.items()}
    if rule.personal is not None:
        found = rule.personal(params, own)
        params = {name: found[name] for name in params}
    return Model(params, {name: mine.get(name, b) for name, b in model.buffers.items()})


def is_finite(own: Tree) -> bool:
    """Whether what a client would keep is worth keeping."""
    return all(bool(t.isfinite().all()) for t in own.values() if t.dtype.is_floating_point)


def _shapes(tree: Tree) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in tree.items()}
