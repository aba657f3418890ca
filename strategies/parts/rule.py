"""What a client does besides minimising the loss of its task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from umbel.core.trees import Tree, map_tree

Trees: TypeAlias = Mapping[str, Tree]
"""The paper's letter -> tree: what travels besides the model, or what a client keeps."""

NONE: Trees = MappingProxyType({})

NAMED = "named"
"""The letter under which a part reads what a client is told of itself."""


class Local(NamedTuple):
    """What a part may read during a client's local training.

    Args:
        params: what the client trains, before the step, name -> (*shape). The trees of
            ``ClientRule.joint`` are in it under ``letter/name``.
        anchor: the parameters that the round started from, name -> (*shape): the global ones, and
            of private tensors the client's own.
        shared: what the strategy broadcasts besides the model.
        own: what the client keeps from round to round, as the round found it.
        step: steps that were taken before this one.
        steps: that the client takes in the round; a scalar tensor where clients are trained
            together.
    """

    params: Tree
    anchor: Tree
    shared: Trees = NONE
    own: Trees = NONE
    step: int = 0
    steps: int | Tensor = 0


class Ended(NamedTuple):
    """What a client has after its local training.

    Args:
        params: trained, name -> (*shape); of the model alone.
        anchor: as in :class:`Local`.
        shared: what the strategy broadcasts besides the model.
        own: what the client keeps; the trees of ``ClientRule.joint`` as they were trained.
        steps: how many it took, a scalar.
        lr: the learning rate of the round.
        examples: how many it holds, a scalar.
        loss: the mean loss of the global model over them, a scalar; 0 unless the rule asks.
        momentum: of the client's SGD.
    """

    params: Tree
    anchor: Tree
    shared: Trees
    own: Trees
    steps: Tensor
    lr: float
    examples: Tensor
    loss: Tensor
    momentum: float = 0.0


class Delivered(NamedTuple):
    """What a client sends and keeps.

    Args:
        uploads: travels besides the delta, of the names, shapes and dtypes that the strategy's
            ``uploads`` gives.
        own: what it keeps in place of what it had; letters left out stay as they are.
        delta: in place of trained minus anchor; ``None``: just that.
    """

    uploads: Trees = NONE
    own: Trees = NONE
    delta: Tree | None = None


class Forward(Protocol):
    """The task's model as functions of parameters, for objectives that need more than one pass."""

    def losses(self, params: Tree, batch: Tree) -> Tensor:
        """One loss an example, (B,)."""

    def outputs(self, params: Tree, batch: Tree) -> Tensor:
        """What the model gives for the batch, (B, …)."""

    def features(self, params: Tree, batch: Tree) -> Tensor:
        """What the model's last layer with parameters is given, (B, …)."""

    def parts(self, params: Tree, batch: Tree) -> Tensor:
        """The losses of several tasks in one, (B, parts); not weighted."""


LossTerm: TypeAlias = Callable[[Local], Tensor]
"""Added to the mean loss of a batch: ``Local`` -> scalar, differentiable in ``params``."""

GradTransform: TypeAlias = Callable[[Tree, Local], Tree]
"""Applied to the gradient of a batch: (gradient, ``Local``) -> gradient."""

Objective: TypeAlias = Callable[[Forward, Local, Tree, Tensor | None], Tensor]
"""(forward, ``Local``, batch, mask) -> scalar, differentiable in ``params``. The mask (B,) says
which examples are the client's; ``None``: all."""


class ClientRule(NamedTuple):
    """A composition of small parts, each pure over the trees of ONE client; all are optional.

    Engines run the same parts in a plain loop and under ``torch.func.vmap``: no part may branch on
    the value of a tensor, change one in place or draw from a global generator.

    Args:
        loss_terms: added to the mean loss of a batch.
        grad_transforms: applied to its gradient, in this order.
        state: parameters -> what a client keeps before its first round.
        named: a client's name -> what it is told of itself, name -> scalar, in ``own`` under the
            letter ``named``; neither kept nor sent. ``None``: nothing.
        speaks_of: the clients that the strategy's parameters name; a run has them all.
        begin: (anchor, shared, own) -> parameters that training starts from; ``None``: the anchor.
        end: what is sent and kept after training.
        private: the names of the model's tensors, in its order -> those that never travel. Training
            starts from the client's own; they are kept from round to round.
        personal: (parameters, own) -> those of the client's own model, which is evaluated at the
            client beside the global one; the private tensors are in place already. ``None``: the
            model with its private tensors, where there are any.
        objective: in place of the mean loss and ``loss_terms``.
        joint: letters of ``state``, or of what ``begin`` gives under ``letter/name``, that are
            trained along with the model, by the same optimizer; for objectives that involve them.
            Only those of ``state`` are kept.
        after: (parameters after a step, the gradient that the optimizer was given, ``Local``) ->
            parameters, of the same names.
        initial_loss: whether ``end`` is told the loss of the global model.
        sgd: whether the mathematics assumes SGD, perhaps with momentum.
        plain_sgd: whether it assumes SGD without.
    """

    loss_terms: tuple[LossTerm, ...] = ()
    grad_transforms: tuple[GradTransform, ...] = ()
    state: Callable[[Tree], Trees] | None = None
    named: Callable[[str], Tree] | None = None
    speaks_of: tuple[str, ...] = ()
    begin: Callable[[Tree, Trees, Trees], Tree] | None = None
    end: Callable[[Ended], Delivered] | None = None
    private: Callable[[Sequence[str]], Collection[str]] | None = None
    personal: Callable[[Tree, Trees], Tree] | None = None
    objective: Objective | None = None
    joint: tuple[str, ...] = ()
    after: Callable[[Tree, Tree, Local], Tree] | None = None
    initial_loss: bool = False
    sgd: bool = False
    plain_sgd: bool = False

    @property
    def plain(self) -> bool:
        """Whether all clients start from the global model and nothing but the delta is left."""
        return not any((self.state, self.begin, self.end, self.private))

    @property
    def keeps(self) -> bool:
        """Whether a client keeps anything from round to round."""
        return self.state is not None or self.private is not None

    @property
    def personalises(self) -> bool:
        """Whether a client has a model of its own."""
        return self.personal is not None or self.private is not None

    def loss(self, mean_loss: Tensor, local: Local) -> Tensor:
        """The objective of one batch, a scalar."""
        for term in self.loss_terms:
            mean_loss = mean_loss + term(local)
        return mean_loss

    def gradient(self, gradient: Tree, local: Local) -> Tree:
        """The gradient that the optimizer is given."""
        for transform in self.grad_transforms:
            gradient = transform(gradient, local)
        return gradient


def mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of a batch's figures (B,) over the examples that are the client's."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0).sum() / mask.sum()


def joined(params: Tree, letter: str) -> dict[str, Tensor]:
    """The tree of ``ClientRule.joint`` with this letter, out of ``Local.params``."""
    start = f"{letter}/"
    return {n.removeprefix(start): p for n, p in params.items() if n.startswith(start)}


def model_part(params: Tree) -> dict[str, Tensor]:
    """The model's own parameters, out of ``Local.params``."""
    return {n: p for n, p in params.items() if "/" not in n}


@dataclass(frozen=True)
class Proximal:
    """``mu / 2 * ||w - w_global||^2``, in units of the loss; data, so that others can read ``mu``.

    Source: Li et al. 2020, FedProx, equation 2 (arXiv:1812.06127).
    """

    mu: float

    def __call__(self, local: Local) -> Tensor:
        """The term for one client, a scalar."""
        squares = [(p - local.anchor[name]).square().sum() for name, p in local.params.items()]
        return 0.5 * self.mu * torch.stack(squares).sum()


def proximal(mu: float) -> LossTerm:
    """The proximal term of FedProx."""
    return Proximal(mu)


def clip_gradient(max_norm: float) -> GradTransform:
    """Scales the gradient of a batch so that its global L2 norm is at most ``max_norm``.

    Guarantees: direction kept; a zero gradient stays zero. The same rule as
    ``torch.nn.utils.clip_grad_norm_``, which adds 1e-6 to the norm. What is trained along with the
    model is clipped by itself.

    Source: Pascanu, Mikolov and Bengio 2013, Algorithm 1 (arXiv:1211.5063).
    """

    def clip(gradient: Tree) -> dict[str, Tensor]:
        total = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        return map_tree(lambda g: g * scale, gradient)

    def transform(gradient: Tree, local: Local) -> Tree:
        letters = dict.fromkeys(name.rpartition("/")[0] for name in gradient)
        parts = [
            {n: g for n, g in gradient.items() if n.rpartition("/")[0] == letter}
            for letter in letters
        ]
        return {name: g for part in parts for name, g in clip(part).items()}

    return transform
