"""A federation of which some clients are hostile, whatever engine the honest ones live on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from umbel.core.payloads import (
    EvaluatePlan,
    Evaluation,
    Failure,
    Federation,
    Folded,
    TrainPlan,
    Updates,
)
from umbel.core.trees import Tree
from umbel.simulations import stacks
from umbel.simulations.attacks.attack import Attack, Scene
from umbel.simulations.residents import Residents


class Attacked:
    """The federation ``inner`` with hostile clients, who answer after the honest ones of a round.

    Args:
        inner: where clients live.
        attack: what the hostile ones do.
        hostile: who they are, by name.
        joined: those of them that ``inner`` does not know.
        seed: of the run.
        rule: what the server makes of updates: (the global tensors, updates) -> name -> (*shape).
        apart: trains hostile clients where ``inner`` cannot, since it reads unpoisoned data itself;
            ``None``: ``inner`` trains them.
    """

    def __init__(
        self,
        inner: Federation,
        attack: Attack,
        hostile: Sequence[str],
        joined: Sequence[str],
        seed: int,
        rule: Callable[[Tree, Updates], Tree],
        apart: Residents | None,
    ) -> None:
        self._inner, self._attack, self._seed, self._rule = inner, attack, seed, rule
        self._hostile = frozenset(hostile)
        self._apart = apart
        known = inner.clients()
        self._joined = tuple(joined)
        self._names: Sequence[str] = sorted([*known, *joined]) if joined else known
        sizes = np.asarray(inner.examples(), dtype=np.int64)
        if joined:
            own = dict(zip(known, sizes.tolist(), strict=True))
            usual = int(np.median(sizes))
            sizes = np.array([own.get(name, usual) for name in self._names], dtype=np.int64)
        self._sizes = sizes

    def clients(self) -> Sequence[str]:
        """The names of all clients."""
        return self._names

    def examples(self) -> npt.NDArray[np.int64]:
        """What each says that it holds; who joined, as many as the median client."""
        return self._sizes

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure | Folded]:
        """Trains the plan's honest clients, and has the others answer; reserves one at a time."""
        if self._attack.forge is None and self._apart is None:
            yield from self._inner.train(plan)
            return
        seen: list[Updates] = []
        yield from self._ask(plan, plan.clients[: plan.wanted], seen)
        for client in plan.clients[plan.wanted :]:
            yield from self._ask(plan, [client], seen)

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        """Evaluates at the clients that hold data; nobody lies about that."""
        joined = set(self._joined)
        return self._inner.evaluate(
            replace(plan, clients=[c for c in plan.clients if c not in joined]) if joined else plan
        )

    def plan_record(self) -> Mapping[str, Any]:
        """How updates are computed, and who is hostile."""
        return {**self._inner.plan_record(), "hostile": sorted(self._hostile)}

    def close(self) -> None:
        """Ends what is inside."""
        self._inner.close()

    def _ask(
        self, plan: TrainPlan, clients: Sequence[str], seen: list[Updates]
    ) -> Iterator[Updates | Failure]:
        honest = [c for c in clients if c not in self._hostile]
        hostile = [c for c in clients if c in self._hostile]
        for item in self._trained(plan, honest) if honest else ():
            if isinstance(item, Updates) and self._attack.sees == "honest":
                seen.append(item)
            yield item
        if not hostile:
            return
        if self._attack.sees == "own" or self._attack.forge is None:
            came: list[Updates] = []
            for item in self._trained(plan, hostile):
                if isinstance(item, Updates):
                    came.append(item)
                else:
                    yield item
            if not came:
                return
            own = stacks.join(came)
            yield own if self._attack.forge is None else self._forged(plan, own.clients, own, None)
        elif self._attack.sees == "nothing" or seen:
            everything = _in_order(stacks.join(seen)) if seen else None
            yield self._forged(plan, hostile, None, everything)
        else:
            yield from (Failure(c, "hostile, and nobody honest to look at") for c in hostile)

    def _trained(self, plan: TrainPlan, clients: Sequence[str]) -> Iterator[Updates | Failure]:
        part = replace(plan.part(clients), fold=None)
        if self._apart is not None and clients[0] in self._hostile:
            settled = self._apart.settled(part)
            for client in clients:
                yield self._apart.train(settled, client)
            return
        for item in self._inner.train(part):
            assert isinstance(item, Updates | Failure)
            yield item

    def _forged(
        self,
        plan: TrainPlan,
        hostile: Sequence[str],
        own: Updates | None,
        honest: Updates | None,
    ) -> Updates:
        template = plan.expected()
        assert self._attack.forge is not None
        forged = self._attack.forge(
            Scene(
                self._seed,
                plan.round,
                hostile,
                min(len(plan.clients), plan.wanted),
                template,
                own,
                honest,
                lambda updates: self._rule(template, updates),
            )
        )
        count = len(hostile)
        delta = {}
        for name, like in template.items():
            if name in forged:
                delta[name] = forged[name].to(like.dtype)
            elif own is not None:
                delta[name] = own.delta[name]
            else:
                delta[name] = torch.zeros_like(like).expand(count, *like.shape)
        if own is not None:
            return replace(own, delta=delta)
        place = {name: i for i, name in enumerate(self._names)}
        held = self._sizes[[place[client] for client in hostile]]
        return Updates(plan.round, list(hostile), delta, torch.from_numpy(held).double())


def _in_order(updates: Updates) -> Updates:
    """Rows by name: what an adversary sends does not depend on who answered first."""
    names = updates.clients
    return updates.take(sorted(range(len(names)), key=names.__getitem__))
