"""DP-SGD at a client: the gradient of a step is a noised sum of clipped per-example gradients.

What is released of a client's examples is that gradient alone. Loss terms, gradient transforms and
the optimizer see it, the parameters and the global model, and nothing else of the data: they are
post-processing. A loss term's gradient is added after the noise, unclipped: it is a function of
parameters, the same on neighbouring data. So is what a client keeps from round to round, starts
from or sends besides its delta, as long as it is made of these: control variates, dual variables,
tensors of its own that never travel.

Source: Abadi et al. 2016, Algorithm 1 (arXiv:1607.00133), with Poisson batches and a fixed
denominator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from umbel.client import devices, optimizers
from umbel.core.errors import InputError
from umbel.core.run_file import Privacy, RunFile
from umbel.core.trees import Tree, map_tree
from umbel.privacy.adaptive_clipping import AdaptiveClip, count_std, split
from umbel.privacy.noise import normals
from umbel.privacy.participation import Plan, plan
from umbel.privacy.per_example import clipped
from umbel.privacy.per_example.choose import choose
from umbel.privacy.per_example.clipped import Bounds, ClippedSum, Forward, Method
from umbel.privacy.sources import Source, Sources, poisson
from umbel.strategies.parts import ClientRule, Local, Trees
from umbel.strategies.parts.rule import NONE
from umbel.tasks.task import Batch, Task


class PrivateSteps:
    """Privatised gradients for one task: whose module, and how they are computed.

    Args:
        run: with ``[privacy] unit = "example"`` and a ``noise_multiplier``.
        task: decomposable.
        rule: what clients do besides.
        module: trained; in training mode.
        sources: of batches and noise.

    Raises:
        InputError: the noise is not known, or the rule may look at the data past the mechanism.
    """

    def __init__(
        self, run: RunFile, task: Task, rule: ClientRule, module: nn.Module, sources: Sources
    ) -> None:
        if run.privacy.noise_multiplier is None:
            raise InputError(
                "the noise multiplier of this run was not calibrated",
                where="[privacy]",
                fix="whoever conducts a run sets noise_multiplier before it starts",
            )
        check_rule(rule)
        self.run, self.task, self.rule, self.sources = run, task, rule, sources
        self.module = module
        self._params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._method: Method | None = None

    def train(
        self,
        round_number: int,
        client: str,
        columns: Batch,
        anchor: Tree,
        lr: float,
        shared: Trees = NONE,
        kept: Trees = NONE,
    ) -> Local:
        """Trains the module, which holds what the round starts from, for one round.

        Args:
            round_number: 1 … rounds.
            client: its name.
            columns: its examples, name -> (n, …), on the module's device.
            anchor: a copy of the global parameters.
            lr: the learning rate of the round.
            shared: what the strategy broadcasts besides.
            kept: what the client kept.

        Returns:
            what the round ended with.
        """
        n = len(next(iter(columns.values())))
        own, source = plan(self.run, n), self.sources(round_number, client)
        clip = Clip(self.run.privacy, list(self._params), n / own.parts)
        optimizer = optimizers.Stacked(self.run.client, lr)
        stacked = [p.detach()[None] for p in self._params.values()]
        for step, (rows, drawn) in enumerate(schedule(own, n, clip, source)):
            if self.task.follow is not None:
                self.task.follow(self.module, step)
            found = self._sum(columns, rows, clip.bounds)
            noisy = source.add_gaussian(found.total, clip.std)
            gradient: Tree = map_tree(lambda t: t / clip.expected, noisy)
            clip.follow(found.short, len(rows), drawn)
            params = map_tree(lambda p: p.detach(), self._params)
            local = Local(params, anchor, shared, kept, step, own.steps)
            gradient = self._with_rule(gradient, local)
            before = params if self.rule.after is None else map_tree(torch.clone, params)
            optimizer.step(stacked, [gradient[name][None] for name in self._params])
            if self.rule.after is not None:
                now = map_tree(torch.clone, params)
                settled = self.rule.after(now, gradient, local._replace(params=before))
                for name, p in params.items():
                    p.copy_(settled[name])
        ended = map_tree(lambda p: p.detach(), self._params)
        return Local(ended, anchor, shared, kept, own.steps, own.steps)

    def _sum(self, columns: Batch, rows: npt.NDArray[np.int64], bounds: Bounds) -> ClippedSum:
        if not len(rows):
            return clipped.nothing(self._params)
        index = torch.from_numpy(rows)
        device = next(iter(self._params.values())).device
        if self._method is None:
            few = {name: column[:3] for name, column in columns.items()}
            self._method = choose(self.module, self._losses, few, bounds)[1]
        total = clipped.nothing(self._params)
        for part in index.tensor_split(min(self.run.client.accumulation, len(rows))):
            batch = {name: c.index_select(0, part.to(c.device)) for name, c in columns.items()}
            with devices.autocast(device, self.run.client):
                found = self._method(batch, bounds)
            total = ClippedSum(
                map_tree(torch.add, total.total, found.total), total.short + found.short
            )
        return total

    def _losses(self, forward: Forward, batch: Batch) -> Tensor:
        return self.task.losses(forward, batch).float()

    def _with_rule(self, gradient: Tree, local: Local) -> Tree:
        if self.rule.loss_terms:

            def terms(own: Tree) -> Tensor:
                zero = torch.zeros((), device=_device(own))
                return self.rule.loss(zero, local._replace(params=own))

            with torch.enable_grad():
                more: Tree = torch.func.grad(terms)(dict(local.params))
            gradient = map_tree(lambda g, m: g + m, gradient, more)
        return self.rule.gradient(gradient, local)


class Clip:
    """The bounds of the next step, which may follow a quantile of the norms within a round.

    Each round starts from ``clip_norm``: a client keeps nothing between rounds.
    """

    def __init__(self, section: Privacy, names: list[str], expected: float) -> None:
        assert section.noise_multiplier is not None
        self.expected = expected
        self._section, self._names = section, names
        self._norm, self._noise, self._count_std = section.clip_norm, section.noise_multiplier, 0.0
        self._rule: AdaptiveClip | None = None
        if section.clipping == "adaptive":
            self._rule = AdaptiveClip(section.clip_quantile, section.clip_rate)
            self._noise, self._count_std = split(
                section.noise_multiplier, count_std(section.noise_multiplier, expected)
            )

    @property
    def bounds(self) -> Bounds:
        """Of one example's gradient."""
        if self._section.clipping == "per-layer":
            return clipped.even(self._norm, self._names)
        return Bounds(self._norm)

    @property
    def std(self) -> float:
        """Of the noise on the sum."""
        return self._noise * self._norm

    def noise(self, source: Source) -> float:
        """Draws the noise of one count, where bounds follow one; else 0, and nothing is drawn."""
        return 0.0 if self._rule is None else self._count_std * float(normals(source.stream, 1)[0])

    def follow(self, short: int, came: int, drawn: float) -> None:
        """Moves the bound by the count of gradients that were not clipped, and its noise."""
        if self._rule is not None:
            self._norm = self._rule.update(self._norm, short - came / 2 + drawn, self.expected)


def schedule(
    own: Plan, n: int, clip: Clip, source: Source
) -> Iterator[tuple[npt.NDArray[np.int64], float]]:
    """What a client draws from its stream in a round: of each step, the rows and ``clip.noise``."""
    for _ in range(own.steps):
        rows = poisson(source.stream, n, own.parts)
        yield rows, clip.noise(source)


PARAMETERS_ALONE = frozenset(
    {
        "loss_terms",
        "grad_transforms",
        "state",
        "named",
        "speaks_of",
        "begin",
        "end",
        "private",
        "personal",
        "after",
        "sgd",
        "plain_sgd",
    }
)
"""What of a rule is given parameters, privatised gradients and what is made of them, and never an
example. ``end`` knows how many a client holds, which is outside the guarantee everywhere."""


def check_rule(rule: ClientRule) -> None:
    """Refuses rules that may look at examples past the mechanism.

    Raises:
        InputError: naming the part.
    """
    defaults = ClientRule()
    for part in rule._fields:
        if part not in PARAMETERS_ALONE and getattr(rule, part) != getattr(defaults, part):
            raise InputError(
                f"this strategy's clients have '{part}', which DP-SGD does not cover",
                where="[privacy] unit",
                fix="use fedavg, fedprox or another strategy without it, or unit = 'client'",
            )


def _device(tree: Mapping[str, Tensor]) -> torch.device:
    return next(iter(tree.values())).device
