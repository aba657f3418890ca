"""A task is what is learned: a model, per-example losses and per-example metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from umbel.datasets.episodes import Episodes
from umbel.tasks.collect import Collect, Columns

Batch: TypeAlias = Mapping[str, Tensor]
"""Columns of a data set, name -> (B, …)."""

Forward: TypeAlias = Callable[..., Tensor]
"""The model as a function of its inputs, whatever holds its parameters."""


def nothing(means: Mapping[str, float]) -> Mapping[str, float]:
    """No derived figures."""
    return {}


def no_remark(figures: Mapping[str, float]) -> str:
    """Nothing to warn of."""
    return ""


class Task(NamedTuple):
    """What is learned. All functions are pure, so that they run under ``torch.func`` as well.

    Args:
        build: makes the model; the caller seeds torch's generator around it.
        losses: (model, batch) -> (B,), one loss an example, each a function of that example alone
            where ``decomposable``.
        metrics: (model, batch) -> name -> (B,), figures that are averaged over examples.
        decomposable: whether the loss of a batch is a mean over examples. DP-SGD needs that.
        unit: what one example is, such as a window of text: what example-level privacy hides.
        derived: figures of means, such as the perplexity, which no mean over examples is.
        episodes: what a batch is, where it is not a random sample.
        test: the task that evaluation measures; ``None``: this one.
        test_episodes: how many evaluation draws, where batches are episodes.
        adapt: (model, episode) -> the model that evaluation asks about it; ``None``: as it is.
        parts: (model, batch) -> (B, parts), the losses of several tasks in one, not weighted.
        collect: makes the examples of a round at the client, which its losses and metrics are then
            given; ``None``: what the client holds are the examples. ``test`` measures what is held.
        collects_apart: whether the i-th of these is made from the i-th that is held, and from no
            other: then a bound on one's gradient bounds the influence of what is held as well.
        keeps: the examples that a round was trained on -> what the client keeps of them for its
            next round, where ``collect`` finds it in the moment; a function of these alone, never
            sent; ``None``: nothing.
        around: what is put around the model once it has begun, from earlier runs and with its
            adapter, such as a frozen copy beside it; ``None``: nothing.
    """

    build: Callable[[], nn.Module]
    losses: Callable[[Forward, Batch], Tensor]
    metrics: Callable[[Forward, Batch], Mapping[str, Tensor]]
    decomposable: bool = True
    unit: str = "example"
    derived: Callable[[Mapping[str, float]], Mapping[str, float]] = nothing
    episodes: Episodes | None = None
    test: Task | None = None
    test_episodes: int = 200
    adapt: Callable[[nn.Module, Batch], Forward] | None = None
    parts: Callable[[Forward, Batch], Tensor] | None = None
    follow: Callable[[nn.Module, int], None] | None = None
    pictures: Callable[[Forward, Batch], Tensor] | None = None
    remark: Callable[[Mapping[str, float]], str] = no_remark
    collect: Collect | None = None
    collects_apart: bool = False
    keeps: Callable[[Columns], Columns] | None = None
    around: Callable[[nn.Module], nn.Module] | None = None
