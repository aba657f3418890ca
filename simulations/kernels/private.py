"""DP-SGD of many clients at once: each example's gradient is clipped, each client's sum noised.

The same batches, bounds and noise as :mod:`umbel.client.private`, which trains one client, from the
same sources; the sums agree to float tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from umbel.client import devices, optimizers
from umbel.client.batches import Index
from umbel.client.private import Clip
from umbel.core.trees import Tree
from umbel.privacy.per_example.book_keeping import BookKeeping
from umbel.privacy.per_example.clipped import Bounds, Unsupported
from umbel.privacy.per_example.functional import MEMORY
from umbel.privacy.per_example.layers import Known, written
from umbel.privacy.sources import Source
from umbel.simulations.kernels import stepping
from umbel.simulations.kernels.around import Around
from umbel.simulations.kernels.draws import Draw, Draws
from umbel.simulations.kernels.kernel import Obstacle, Subject, Trained
from umbel.simulations.kernels.layers import channels_last
from umbel.simulations.kernels.taps import Taps
from umbel.simulations.kernels.trace import trace
from umbel.tasks.task import Batch


class Bound(NamedTuple):
    """Of one computation.

    Args:
        clients: the most of them; ``None``: all.
        examples: the most of them, padding included.
    """

    clients: int | None
    examples: int


class PrivateChunk(NamedTuple):
    """The work of C clients, those with most steps first.

    Args:
        columns: name -> (R, …): the examples, those of others too where that saves a copy.
        rows: (steps, C, B) int64: rows of ``columns``.
        counts: (steps, C): how many of the B are the client's batch, which may be empty.
        active: how many clients take each step: the first so many.
        drawn: (steps, C): the noise on the count that bounds follow.
        sources: of each client's noise.
        clips: of each client.
        bound: of one computation.
        seeds: of torch's generator, a client each, where the model draws random numbers.
        around: what the rule's parts may read, where that is more than the global parameters.
    """

    columns: Batch
    rows: Tensor
    counts: Index
    active: list[int]
    drawn: Any
    sources: Sequence[Source]
    clips: Sequence[Clip]
    bound: Bound
    seeds: list[int] | None = None
    around: Around | None = None

    def clients(self) -> int:
        """How many clients there are."""
        return int(self.counts.shape[1])


class Private:
    """Trains private chunks.

    Where each trained layer has a rule, gradients are known by what the layers saw
    (book-keeping); else each example is a client of its own, with a copy of the parameters.

    Args:
        subject: what is trained.
        images: whether it convolves; the other way is another kernel's.
        by_layer: whether to keep books; ``None``: where that can be.
    """

    even = False

    def __init__(self, subject: Subject, images: bool, by_layer: bool | None = None) -> None:
        self._subject = subject
        self._task, self._rule = subject.runtime.task, subject.runtime.rule
        self._program = trace(subject.module)
        if self._program.has(nn.Conv2d) != images:
            raise Obstacle("it has a convolution" if not images else "it has no convolution")
        if self._program.even():
            raise Obstacle("examples of a batch act on each other")
        named = subject.module.named_parameters()
        self._names = {id(p): name for name, p in named if p.requires_grad}
        self._layers = {
            f"{id(m)}/{name}": self._names[id(p)]
            for m in subject.module.modules()
            for name, p in m.named_parameters(recurse=False)
            if p.requires_grad
        }
        self.by_layer = self._has_rules() if by_layer is None else by_layer
        if subject.draws:
            if not self.by_layer:
                raise Obstacle("it draws random numbers in training")
            if subject.runtime.run.client.accumulation > 1:
                raise Obstacle("its draws depend on the micro-batches")

    def _has_rules(self) -> bool:
        try:
            BookKeeping(self._subject.module, self._task.losses)
        except Unsupported:
            return False
        return True

    def train(self, anchor: Tree, chunk: PrivateChunk, lr: float) -> Trained:
        """Trains the clients of ``chunk`` from the global parameters ``anchor``."""
        device, section = self._subject.runtime.device, self._subject.runtime.run.client
        around, after = chunk.around or Around(anchor), self._rule.after
        params = {
            name: around.start[name].clone()
            if name in around.start
            else p.expand(chunk.clients(), *p.shape).clone()
            for name, p in anchor.items()
        }
        optimizer = optimizers.Stacked(section, lr)
        draws = None if chunk.seeds is None else Draws(chunk.seeds, device)
        for step, active in enumerate(chunk.active):
            views = {name: p[:active] for name, p in params.items()}
            with devices.autocast(device, section):
                gradient, short = self._sums(views, chunk, step, draws)
            for client in range(active):
                clip, source = chunk.clips[client], chunk.sources[client]
                total = {name: t[client] for name, t in gradient.items()}
                for name, noisy in source.add_gaussian(total, clip.std).items():
                    torch.div(noisy, clip.expected, out=total[name])
                came, drawn = int(chunk.counts[step, client]), float(chunk.drawn[step, client])
                clip.follow(short[client], came, drawn)
            now = around.at(step, active)
            stepped = self._with_rule(views, gradient, now)
            before = None if after is None else {n: p.clone() for n, p in views.items()}
            optimizer.step(list(views.values()), [stepped[name] for name in views])
            if before is not None:
                stepping.settle(self._rule, now, views, stepped, before)
        return Trained(params, {})

    def _sums(
        self, params: Tree, chunk: PrivateChunk, step: int, draws: Draws | None
    ) -> tuple[dict[str, Tensor], list[int]]:
        """The clipped sums, name -> (n, *shape), and how many gradients were not clipped."""
        total = {n: torch.empty_like(p, dtype=torch.float32) for n, p in params.items()}
        active = len(next(iter(params.values())))
        short = np.zeros(active, np.int64)
        counts = chunk.counts[step, :active]
        device = chunk.rows.device
        idle = torch.from_numpy(np.flatnonzero(counts == 0)).to(device)
        for t in total.values():
            t.index_fill_(0, idle, 0)
        limits = torch.tensor(
            [float(clip.bounds.clip_norm) for clip in chunk.clips[:active]], device=device
        )
        layers, bound = chunk.clips[0].bounds.layers, chunk.bound
        if not self.by_layer:  # each example has a copy of the parameters, and its gradient
            held = MEMORY // (8 * sum(p[0].numel() for p in params.values()))
            bound = bound._replace(examples=max(1, min(bound.examples, held)))
        for some, columns in pieces(counts, bound, draws is None):
            here = torch.from_numpy(some).to(device)
            at = chunk.rows[step, here][:, columns]
            own = np.clip(counts[some] - columns.start, 0, at.shape[1])
            inside = torch.from_numpy(own).to(device)
            batch = {
                name: c.index_select(0, at.reshape(-1)).view(*at.shape, *c.shape[1:])
                for name, c in chunk.columns.items()
            }
            found, free = self.clipped(
                {name: channels_last(p.index_select(0, here)) for name, p in params.items()},
                batch,
                inside,
                Bounds(limits[here, None], layers),
                None if draws is None else draws.only(some.tolist()).of_batch(inside),
            )
            for name, t in found.items():
                if columns.start == 0:
                    total[name].index_copy_(0, here, t)
                else:
                    total[name].index_add_(0, here, t)
            short[some] += free.cpu().numpy()
        return total, short.tolist()

    def clipped(
        self, params: Tree, batch: Batch, counts: Tensor, bounds: Bounds, draw: Draw | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The sums of clipped gradients of n clients.

        Args:
            params: name -> (n, *shape).
            batch: name -> (n, B, …).
            counts: (n,), how many of the B are the client's.
            bounds: ``clip_norm`` (n, 1).
            draw: masks, where the model draws.

        Returns:
            name -> (n, *shape) float32; and (n,), how many were at most as long as their bound.
        """
        clients, size = next(iter(batch.values())).shape[:2]
        known = self._seen if self.by_layer else self._expanded
        of = known(params, batch, draw)
        with torch.no_grad():
            found = of(None)
            squares = {n: k.squares.view(clients, size) for n, k in found.items()}
            factors, finite = bounds.factors(squares)
            if not bool(finite.all()):  # 0 times NaN is NaN
                found = of(finite)
            inside = (torch.arange(size, device=counts.device) < counts[:, None]) & finite
            norms = torch.stack([s.double() for s in squares.values()]).sum(0).sqrt()
            short = (inside & (norms <= bounds.clip_norm)).sum(1)
            sums = {
                n: k.weighted((factors[n] * inside).to(k.squares.dtype)).float()
                for n, k in found.items()
            }
        return sums, short

    def _seen(
        self, params: Tree, batch: Batch, draw: Draw | None
    ) -> Callable[[Tensor | None], dict[str, Known]]:
        taps = Taps()
        clients, size = next(iter(batch.values())).shape[:2]
        losses = self._losses(params, batch, clients, size, draw, taps)
        known = taps.known(losses, len({key.split("/")[0] for key in self._layers}))
        return lambda finite: {self._layers[key]: one for key, one in known(finite).items()}

    def _expanded(
        self, params: Tree, batch: Batch, draw: Draw | None
    ) -> Callable[[Tensor | None], dict[str, Known]]:
        clients, size = next(iter(batch.values())).shape[:2]
        own = {
            name: channels_last(p.repeat_interleave(size, 0)).requires_grad_()
            for name, p in params.items()
        }
        losses = self._losses(own, batch, clients * size, 1, draw, None)
        each = torch.autograd.grad(losses.sum(), list(own.values()), materialize_grads=True)

        def known(finite: Tensor | None) -> dict[str, Known]:
            table = {}
            for name, g in zip(own, each, strict=True):
                if finite is not None:
                    g = torch.where(finite.view(-1, *[1] * (g.dim() - 1)), g, 0)
                table[name] = written(g if g.dtype is torch.float64 else g.float())
            return table

        return known

    def _losses(
        self,
        params: Tree,
        batch: Batch,
        clients: int,
        size: int,
        draw: Draw | None,
        taps: Taps | None,
    ) -> Tensor:
        """(clients * size,), of so many clients with so many examples each."""

        def forward(inputs: Tensor) -> Tensor:
            apart = inputs.view(clients, size, *inputs.shape[1:])
            return self._program(params, clients, apart, draw, taps).flatten(0, 1)

        flat = {name: column.flatten(0, 1) for name, column in batch.items()}
        return self._task.losses(forward, flat).float()

    def _with_rule(self, params: Tree, gradient: Tree, around: Around) -> Tree:
        rule = self._rule

        def one(now: Around, own: Tree, g: Tree) -> dict[str, Tensor]:
            if rule.loss_terms:
                zero = torch.zeros((), device=next(iter(own.values())).device)
                more = torch.func.grad(lambda p: rule.loss(zero, now.local(p)))(own)
                g = {name: t + more[name] for name, t in g.items()}
            return dict(rule.gradient(g, now.local(own)))

        if not rule.loss_terms and not rule.grad_transforms:
            return gradient
        stepped: Tree = around.over(one, dict(params), dict(gradient))
        return stepped


def pieces(counts: Index, bound: Bound, splits: bool) -> Iterator[tuple[Index, slice]]:
    """Cuts the batches of a step into computations of clients with batches of about one size.

    Args:
        counts: (n,) examples in each client's batch; the empty ones are in no piece.
        bound: of a piece; one client and one example at least are taken.
        splits: whether a batch may be cut.

    Yields:
        places of clients, and which columns of their batches.
    """
    order = np.argsort(-counts, kind="stable")
    order = order[: int((counts > 0).sum())]
    start = 0
    while start < len(order):
        width = int(counts[order[start]])
        room = max(1, bound.examples // width)
        some = order[start : start + (room if bound.clients is None else min(room, bound.clients))]
        columns = min(width, bound.examples) if splits else width
        for first in range(0, width, columns):
            yield some, slice(first, min(first + columns, width))
        start += len(some)
