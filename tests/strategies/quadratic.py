"""A federation whose every figure is known: client k minimises ``0.5 * ||w - c_k||^2``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, TrainPlan, Updates
from umbel.core.trees import Tree, map_tree, unflatten
from umbel.strategies.parts import ClientRule, Local


class Quadratic:
    """Client k holds ``weights[k]`` examples, all with the optimum ``optima[k]``."""

    def __init__(
        self,
        optima: Sequence[Tree],
        weights: Sequence[int],
        rule: ClientRule,
        lr: float,
        steps: int,
    ) -> None:
        self._optima, self._weights, self._rule = optima, weights, rule
        self._lr, self._steps = lr, steps

    def clients(self) -> list[str]:
        return [f"c{k}" for k in range(len(self._optima))]

    def examples(self) -> Sequence[int]:
        return self._weights

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure]:
        for client in plan.clients:
            k = int(client[1:])
            anchor = plan.model.params
            params = map_tree(torch.clone, anchor)
            for _ in range(self._steps):
                leaves = map_tree(lambda t: t.detach().requires_grad_(), params)
                local = Local(leaves, anchor, unflatten(plan.shared))
                far = [(leaves[n] - c).square().sum() for n, c in self._optima[k].items()]
                loss = self._rule.loss(0.5 * torch.stack(far).sum(), local)
                grads = torch.autograd.grad(loss, list(leaves.values()))
                gradient = self._rule.gradient(dict(zip(leaves, grads, strict=True)), local)
                params = map_tree(lambda p, g: p.detach() - self._lr * g, leaves, gradient)
            delta = {n: (params[n] - anchor[n])[None] for n in anchor}
            delta |= {n: torch.zeros_like(b)[None] for n, b in plan.model.buffers.items()}
            weight = torch.tensor([self._weights[k]], dtype=torch.float64)
            yield Updates(plan.round, [client], delta, weight)

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        yield from ()

    def close(self) -> None: ...
