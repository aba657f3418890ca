"""A federation whose every figure is known: client k minimises ``curvature/2 * ||w - c_k||^2``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from umbel.client import own
from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, TrainPlan, Updates
from umbel.core.trees import Tree, map_tree, unflatten
from umbel.strategies.parts import ClientRule, Local

BATCH = {"y": torch.zeros(4)}


class Forward:
    """Examples with the same loss, the quadratic."""

    def __init__(self, optimum: Tree, curvature: float) -> None:
        self._optimum, self._curvature = optimum, curvature

    def losses(self, params: Tree, batch: Tree) -> Tensor:
        far = [(params[n] - c).square().sum() for n, c in self._optimum.items()]
        loss = 0.5 * self._curvature * torch.stack(far).sum()
        return loss.expand(len(next(iter(batch.values()))))

    def outputs(self, params: Tree, batch: Tree) -> Tensor:
        flat = torch.cat([params[n].flatten() for n in self._optimum])
        return flat.expand(len(next(iter(batch.values()))), -1)

    features = outputs

    def parts(self, params: Tree, batch: Tree) -> Tensor:
        return self.losses(params, batch)[:, None]


class Quadratic:
    """Client k holds ``weights[k]`` examples, all with the optimum ``optima[k]``."""

    def __init__(
        self,
        optima: Sequence[Tree],
        weights: Sequence[int],
        rule: ClientRule,
        lr: float,
        steps: int,
        curvatures: Sequence[float] | None = None,
    ) -> None:
        self._weights, self._rule, self._lr, self._steps = weights, rule, lr, steps
        curved = curvatures or [1.0] * len(optima)
        self._forwards = [Forward(*pair) for pair in zip(optima, curved, strict=True)]
        self.kept: dict[str, Any] = {}

    def clients(self) -> list[str]:
        return [f"c{k}" for k in range(len(self._forwards))]

    def examples(self) -> Sequence[int]:
        return self._weights

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure]:
        for client in plan.clients:
            delta = self._delta(plan, client, self._forwards[int(client[1:])])
            weight = torch.tensor([self._weights[int(client[1:])]], dtype=torch.float64)
            yield Updates(plan.round, [client], delta, weight)

    def _delta(self, plan: TrainPlan, client: str, forward: Forward) -> dict[str, Tensor]:
        rule, anchor, shared = self._rule, plan.model.params, unflatten(plan.shared)
        mine = own.restored(self.kept.get(client), own.first(rule, plan.model), client)
        params: Tree = map_tree(torch.clone, own.start(rule, anchor, shared, mine))
        loss = float(forward.losses(anchor, BATCH).mean().detach())
        for step in range(self._steps):
            leaves = map_tree(lambda t: t.detach().requires_grad_(), params)
            local = Local(leaves, anchor, shared, mine, step, self._steps)
            if rule.objective is None:
                value = rule.loss(forward.losses(leaves, BATCH).mean(), local)
            else:
                value = rule.objective(forward, local, BATCH, None)
            grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
            gradient = rule.gradient(dict(zip(leaves, grads, strict=True)), local)
            params = map_tree(lambda p, g: p.detach() - self._lr * g, leaves, gradient)
            if rule.after is not None:
                before = local._replace(params=map_tree(torch.Tensor.detach, leaves))
                params = rule.after(params, gradient, before)
        taken = own.Taken.of(self._steps, self._weights[int(client[1:])], loss)
        local = Local(params, anchor, shared, mine, 0, self._steps)
        left = own.end(rule, params, local, taken, self._lr)
        self.kept[client] = {f"{k}/{n}": t for k, tree in left.own.items() for n, t in tree.items()}
        delta = {n: params[n] - anchor[n] for n in anchor}
        delta |= {n: torch.zeros_like(b) for n, b in plan.model.buffers.items()}
        return {n: d[None] for n, d in {**delta, **left.delta, **left.uploads}.items()}

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        yield from ()

    def close(self) -> None: ...
