"""What goes under the masks of secure aggregation: one client's part of a combiner's sum.

A combiner that workers can fold is a sum: what ``add`` makes of one client's update, added up
number by number over the clients, is the accumulator of them all. So each client adds its own
update to an empty accumulator, and its numbers travel as ring elements: deltas times weights,
weights, counts, whatever else the strategy sums, and the training metrics. The server decodes the
sum of the accumulators, and no strategy is written twice.

Numbers that grow with a client's weight are divided by the cap on weights before they are rounded,
so that ``[secure_aggregation] clip`` bounds weight / cap · delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.run_file import SecureAggregation
from umbel.core.trees import Tree
from umbel.privacy.secure_aggregation.encoding import Field, Layout, Real, Whole
from umbel.privacy.secure_aggregation.keystream import Words
from umbel.privacy.secure_aggregation.terms import widest_values
from umbel.strategies.parts.combine import Combiner

METRICS = 16
"""Training metrics that have a place in the vector, in alphabetical order; more are left out."""


class Leaf(NamedTuple):
    """One place of an accumulator: where it is, how it is bounded, and what scales it."""

    path: tuple[str | int, ...]
    size: int
    bound: float
    scale: float
    counts: bool


class Sum(NamedTuple):
    """What the sum of some clients comes to.

    Args:
        accumulator: of the combiner.
        totals: metric -> (sum of weight · value, sum of the weights).
    """

    accumulator: Any
    totals: dict[str, list[float]]


class SecureSum:
    """Turns a client's update into a vector, and the sum of vectors into an accumulator.

    Client and server make the same one from the run file and the model.

    Args:
        combiner: with a ``merge``.
        zero: makes an empty accumulator.
        template: name -> (*shape): what one client's delta holds, with dtypes.
        buffers: those of its names that are bounded by ``buffer_clip``.
        section: bounds and ring.
        cap: the most that a client weighs; 1 where all weigh the same.
        value_bits: of each number, from :func:`value_bits`.
    Raises:
        InputError: the combiner is no sum.
    """

    def __init__(
        self,
        combiner: Combiner,
        zero: Callable[[], Any],
        template: Tree,
        buffers: frozenset[str],
        section: SecureAggregation,
        cap: float,
        value_bits: int,
    ) -> None:
        if combiner.merge is None:
            raise InputError(
                "this strategy needs single updates, and under secure aggregation there are none",
                where="[secure_aggregation]",
                fix="set groups = 5 or so: it then sees the sums of random groups",
            )
        self._combiner, self._zero, self._cap = combiner, zero, cap
        self._template = template
        self._leaves = self._measure(buffers, section)
        fields: list[Field] = []
        for place, leaf in enumerate(self._leaves):
            name = f"{place}"
            if leaf.counts:
                fields.append(Whole(name, leaf.size, 0, 1))
            else:
                fields.append(Real(name, leaf.size, leaf.bound))
        self._means = SecureMeans(section, cap, value_bits)
        self.layout = Layout([*fields, *self._means.layout.fields], value_bits)

    modular = False

    @property
    def size(self) -> int:
        """Numbers in the vector."""
        return self.layout.size

    @property
    def value_bits(self) -> int:
        """Of each number."""
        return self.layout.value_bits

    def encode(self, updates: Updates, rounding: bytes | None = None) -> Words:
        """The vector of one client, shape (size,).

        Args:
            updates: of one client, valid; its weight is at most the cap.
            rounding: as :meth:`Layout.encode`.
        Raises:
            InputError: a number is not finite.
        """
        accumulator = self._combiner.add(self._zero(), updates)
        values: dict[str, Any] = {}
        for place, (leaf, found) in enumerate(zip(self._leaves, _walk(accumulator), strict=True)):
            numbers = _numbers(found[1])
            values[f"{place}"] = numbers if leaf.counts else numbers / leaf.scale
        metrics = {name: float(metric[0]) for name, metric in updates.metrics.items()}
        values |= self._means.numbers(metrics, float(updates.weights[0]))
        return self.layout.encode(values, rounding)

    def decode(self, words: Words, clients: int, metrics: Sequence[str]) -> Sum:
        """What the summed vector of ``clients`` says; ``metrics`` as :func:`named`."""
        found = self.layout.decode(words, clients)
        parts = [found[f"{place}"] * leaf.scale for place, leaf in enumerate(self._leaves)]
        totals = self._means.totals(found, clients, metrics)
        return Sum(_rebuild(self._zero(), iter(parts)), totals)

    def error_bound(self, clients: int) -> dict[str, float]:
        """Path -> the most by which a decoded number may be off, in the accumulator's units."""
        return {
            "/".join(map(str, leaf.path)): (
                0.0
                if leaf.counts
                else clients * leaf.scale * self.layout.step(Real("", leaf.size, leaf.bound))
            )
            for leaf in self._leaves
        }

    def _measure(self, buffers: frozenset[str], section: SecureAggregation) -> list[Leaf]:
        """Every place of the accumulator, found by adding a delta of ones with the most weight."""
        ones = {
            name: torch.ones((1, *t.shape), dtype=t.dtype) for name, t in self._template.items()
        }
        weights = torch.tensor([self._cap], dtype=torch.float64)
        probe = self._combiner.add(self._zero(), Updates(1, ["probe"], ones, weights))
        leaves = []
        for path, value in _walk(probe):
            numbers = _numbers(value)
            clip = section.buffer_clip if buffers & {str(p) for p in path} else section.clip
            if not isinstance(value, Tensor):
                clip = 1.0  # a sum of weights or of shares of the cap: as large as the scale
            scale = max(1.0, float(np.abs(numbers).max(initial=0.0)))
            counts = isinstance(value, int)  # of clients
            leaves.append(Leaf(path, numbers.size, clip, scale, counts))
        return leaves


class SecureMeans:
    """Means of metrics over clients, each weighted; nobody's own are seen.

    Args:
        section: the bound on a metric.
        cap: the most that a client weighs.
        value_bits: of each number.
    """

    def __init__(self, section: SecureAggregation, cap: float, value_bits: int) -> None:
        self._cap = cap
        self._seen = Real("seen", METRICS, 1.0)
        self.layout = Layout([Real("values", METRICS, section.metric_clip), self._seen], value_bits)

    def numbers(self, metrics: Mapping[str, float], weight: float) -> dict[str, Any]:
        """One client's fields; a metric that is not finite does not count."""
        share = min(weight / self._cap, 1.0)
        kept = np.zeros((2, METRICS))
        for place, name in enumerate(named(metrics)):
            if math.isfinite(metrics[name]):
                kept[:, place] = metrics[name] * share, share
        return {"values": kept[0], "seen": kept[1]}

    def totals(
        self, found: Mapping[str, Any], clients: int, metrics: Sequence[str]
    ) -> dict[str, list[float]]:
        """Metric -> (sum of weight · value, sum of the weights), from the decoded fields."""
        values, seen = found["values"] * self._cap, found["seen"] * self._cap
        # Nobody's share of a metric is rounded to almost, not exactly, nothing.
        least = clients * self.layout.step(self._seen) * self._cap
        return {
            name: [float(values[place]), float(seen[place])]
            for place, name in enumerate(metrics)
            if seen[place] > least
        }


def named(metrics: Iterable[str]) -> list[str]:
    """The metrics that travel, in the order of their places."""
    return sorted(metrics)[:METRICS]


def value_bits(clients: int, section: SecureAggregation) -> int:
    """The bits of a number where so many clients take part.

    Raises:
        InputError: they do not fit the ring.
    """
    bits = min(31, widest_values(clients, section.bits))
    if bits < 2:
        raise InputError(
            f"{clients} clients leave {bits} bits for each number",
            where="[secure_aggregation] bits",
            fix=f"set bits = {min(32, section.bits + 8)}, or a smaller cohort",
        )
    return bits


def _numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().double().numpy().reshape(-1)
    return np.array([value], dtype=np.float64)


def _walk(
    value: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The numbers and tensors of an accumulator, with where they are."""
    if isinstance(value, Mapping):
        for name in sorted(value):  # client and server need not list tensors alike
            yield from _walk(value[name], (*path, name))
    elif isinstance(value, (tuple, list)):
        for place, item in enumerate(value):
            yield from _walk(item, (*path, place))
    elif value is not None:
        yield path, value


def _rebuild(like: Any, parts: Iterator[Any]) -> Any:
    """An accumulator of the form of ``like`` with other numbers."""
    if isinstance(like, Mapping):
        found = {name: _rebuild(like[name], parts) for name in sorted(like)}
        return {name: found[name] for name in like}
    if isinstance(like, tuple):
        items = [_rebuild(item, parts) for item in like]
        return type(like)(*items) if hasattr(like, "_fields") else tuple(items)
    if isinstance(like, list):
        return [_rebuild(item, parts) for item in like]
    if like is None:
        return None
    numbers = next(parts)
    if isinstance(like, Tensor):
        tensor = torch.from_numpy(numbers.reshape(tuple(like.shape)))
        return tensor.to(like.device, like.dtype)
    return round(float(numbers[0])) if isinstance(like, int) else float(numbers[0])
