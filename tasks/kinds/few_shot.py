"""Few-shot classification: tell classes apart that were never seen, from a few examples each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.core.settings import Count, NonNegative
from umbel.datasets.episodes import Episodes
from umbel.datasets.federated import Info
from umbel.tasks.models.build import builder
from umbel.tasks.task import Batch, Forward, Task

Compare: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(support (ways, shots, d), queries (q, d)) -> logits (q, ways)."""


def prototypical(support: Tensor, queries: Tensor) -> Tensor:
    """Minus the squared distance to the mean of each class.

    Source: Snell, Swersky and Zemel 2017, equations 1 and 2 (arXiv:1703.05175).
    """
    return -(queries[:, None] - support.mean(1)[None]).square().sum(-1)


def matching(support: Tensor, queries: Tensor) -> Tensor:
    """The logarithm of what attention by cosine similarity gives each class.

    Source: Vinyals et al. 2016, equation 1 and section 2.1.1 (arXiv:1606.04080), without the
    embeddings of whole episodes of section 2.1.2.
    """
    ways, shots, width = support.shape
    known = F.normalize(support.reshape(ways * shots, width), dim=1)
    attention = F.log_softmax(F.normalize(queries, dim=1) @ known.T, dim=1)
    return attention.view(-1, ways, shots).logsumexp(2)


COMPARE: Mapping[str, Compare] = {"prototypical": prototypical, "matching": matching}


def few_shot(
    info: Info,
    model: Part | str | None,
    *,
    method: Literal["prototypical", "matching", "gradient"] = "prototypical",
    ways: Count = 5,
    shots: Count = 1,
    queries: Count = 5,
    test_ways: Count | None = None,
    test_shots: Count | None = None,
    test_queries: Count = 15,
    test_episodes: Count = 200,
    embedding: Count = 64,
    adapt_steps: Count = 5,
    adapt_lr: NonNegative = 0.1,
) -> Task:
    """N-way K-shot episodes: each batch is one, and a client's local steps are as many.

    The figures are those of the queries. Evaluation draws the same episodes each time; ``gradient``
    first adapts a copy of the model to each one's support part, so that a strategy such as ``maml``
    with ``support = shots / (shots + queries)`` is measured as it was trained. An epoch is as many
    episodes as the client's examples fill.

    Args:
        info: of the data; ``y`` holds the classes.
        model: gives an embedding, or for ``gradient`` a logit for each of ``ways`` classes.
        method: how queries are told apart.
        ways: classes in an episode.
        shots: known examples of each.
        queries: asked examples of each.
        test_ways: the same in evaluation; ``None``: as in training, as ``gradient`` needs it.
        test_shots: the same; ``None``: as in training.
        test_queries: the same.
        test_episodes: how many are drawn.
        embedding: numbers that the model gives, where it does not settle that itself.
        adapt_steps: ``gradient``: steps of SGD on the support part, in evaluation.
        adapt_lr: their rate.
    """
    if info.classes is None:
        raise InputError(
            f"few-shot needs class labels; data set '{info.name}' has real-valued targets",
            where="[task]",
            fix='kind = "regression"',
        )
    if method == "gradient" and test_ways not in (None, ways):
        raise InputError(
            f"test_ways = {test_ways}: the model has an output for each of {ways} ways",
            where="[task]",
            fix=f"set test_ways = {ways}, or another method",
        )
    train = Episodes(ways, shots, queries)
    test = Episodes(test_ways or ways, test_shots or shots, test_queries)
    if method == "gradient":
        build = builder(model, info, ways)
        asked = _by_outputs(test, build)._replace(
            adapt=_adaptation(test, adapt_steps, adapt_lr), test_episodes=test_episodes
        )
        return _by_outputs(train, build, known_too=True)._replace(test=asked)
    build = builder(model, info, embedding, head="features")
    asked = _by_distance(test, build, COMPARE[method])._replace(test_episodes=test_episodes)
    return _by_distance(train, build, COMPARE[method])._replace(test=asked)


def _by_distance(episodes: Episodes, build: Callable[[], nn.Module], compare: Compare) -> Task:
    known = episodes.known

    def logits(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        z = forward(batch["x"]).flatten(1)
        if len(z) != episodes.size:
            raise InputError(
                f"a batch of {len(z)} is no episode of {episodes.size}",
                where="[task]",
                fix=f"strategies that divide batches, such as maml, need method = 'gradient'; "
                f"[client] accumulation needs to be 1; a model gives {episodes.size} embeddings",
            )
        support = z[:known].view(episodes.ways, episodes.shots, -1)
        return compare(support, z[known:]), _labels(episodes.ways, episodes.queries, z.device)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        found, labels = logits(forward, batch)
        return _of_queries(F.cross_entropy(found, labels, reduction="none"), episodes)

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        found, labels = logits(forward, batch)
        return {"accuracy": _of_queries((found.argmax(1) == labels).to(found.dtype), episodes)}

    return Task(build, losses, metrics, decomposable=False, unit="episode", episodes=episodes)


def _by_outputs(
    episodes: Episodes, build: Callable[[], nn.Module], known_too: bool = False
) -> Task:
    """Classes by their place in the episode, a logit each; over an episode, or over one part."""

    def logits(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        out, ways = forward(batch["x"]), episodes.ways
        if len(out) == episodes.size:
            parts = [_labels(ways, n, out.device) for n in (episodes.shots, episodes.queries)]
            return out, torch.cat(parts)
        return out, _labels(ways, len(out) // ways, out.device)

    def only(figures: Tensor) -> Tensor:
        if known_too or len(figures) != episodes.size:
            return figures
        return _of_queries(figures[episodes.known :], episodes)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        out, labels = logits(forward, batch)
        return only(F.cross_entropy(out, labels, reduction="none"))

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        out, labels = logits(forward, batch)
        return {"accuracy": only((out.argmax(1) == labels).to(out.dtype))}

    return Task(build, losses, metrics, decomposable=False, unit="episode", episodes=episodes)


def _labels(ways: int, each: int, device: torch.device) -> Tensor:
    return torch.arange(ways, device=device).repeat_interleave(each)


def _of_queries(figures: Tensor, episodes: Episodes) -> Tensor:
    """One figure an example of the episode, whose mean is the mean over the queries."""
    scaled = figures * (episodes.size / len(figures))
    return torch.cat([scaled.new_zeros(episodes.known), scaled])


def _adaptation(episodes: Episodes, steps: int, lr: float) -> Callable[[nn.Module, Batch], Forward]:
    """(model, episode) -> the model after some steps of SGD on the support part."""
    labels = _labels(episodes.ways, episodes.shots, torch.device("cpu"))

    def adapt(module: nn.Module, batch: Batch) -> Forward:
        x = batch["x"][: episodes.known]
        target = labels.to(x.device)
        params = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            for _ in range(steps):
                leaves = {n: p.requires_grad_() for n, p in params.items()}
                loss = F.cross_entropy(functional_call(module, leaves, (x,)), target)
                found = torch.autograd.grad(loss, list(leaves.values()))
                params = {
                    n: (p - lr * g).detach()
                    for (n, p), g in zip(leaves.items(), found, strict=True)
                }

        def forward(*inputs: Any, **named: Any) -> Tensor:
            output: Tensor = functional_call(module, params, inputs, named)
            return output

        return forward

    return adapt
