"""Secure aggregation around any federation in this process: real keys, real masks, no network.

The clients' updates come from the engine that is wrapped; each then goes through the client's own
state machine, and the round loop gets the sum alone. Masks cancel exactly and rounding is seeded in
a simulation, so a run has the same bits with and without masks, and for any number of workers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from umbel.core.errors import InputError
from umbel.core.payloads import (
    EvaluatePlan,
    Evaluation,
    Failure,
    Federation,
    Folded,
    TrainPlan,
    Updates,
)
from umbel.core.run_file import RunFile
from umbel.privacy.secure_aggregation.client import Client
from umbel.privacy.secure_aggregation.client import Setup as ClientSetup
from umbel.privacy.secure_aggregation.context import context_of
from umbel.privacy.secure_aggregation.identities import Directory, Identity
from umbel.privacy.secure_aggregation.in_process import nobody, run_round
from umbel.privacy.secure_aggregation.keystream import Words
from umbel.privacy.secure_aggregation.server import Aborted, Server, Stage, Total
from umbel.privacy.secure_aggregation.server import Setup as ServerSetup
from umbel.privacy.secure_aggregation.terms import Terms
from umbel.privacy.streams import seeded_stream
from umbel.server import secure
from umbel.server.gate import Gate, weight_cap
from umbel.server.private_sum import private_sum
from umbel.server.rounds import Fold, uniform
from umbel.strategies.parts import Combiner, Strategy
from umbel.strategies.parts.combine import weighted_mean
from umbel.strategies.parts.noisy_sum import NoisySum
from umbel.strategies.parts.secure_sum import SecureSum, Sum, named, value_bits


class SecureFederation:
    """A federation of which the round loop sees sums only.

    Args:
        inner: where the clients live.
        run: the run file.
        strategy: what it names.
        silent: tests lose messages with it: whether the answer of a client (its place in its group)
            is lost in a stage.
    Raises:
        InputError: the run cannot be summed securely.
    """

    def __init__(
        self,
        inner: Federation,
        run: RunFile,
        strategy: Strategy,
        silent: Callable[[Stage, int], bool] = nobody,
    ) -> None:
        secure.check(run, strategy.combine, len(inner.clients()))
        self._inner, self._run, self._strategy = inner, run, strategy
        self._section = run.secure_aggregation
        self._silent = silent
        self._cap = weight_cap([], run.strategy.max_weight)
        self._identities: dict[str, Identity] = {}
        self._kept: dict[tuple[str, ...], _Kept] = {}

    def clients(self) -> Sequence[str]:
        """The names of the clients."""
        return self._inner.clients()

    def examples(self) -> Any:
        """How many training examples each has, as a simulation knows; sites do not tell."""
        return self._inner.examples()

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure | Folded]:
        """Trains the plan's clients; yields the failures, and the sum of the others as one part."""
        seed, section = self._run.run.seed, self._section
        groups = secure.deal(plan, seed, section.groups)
        member = {c: (g, i) for g, names in enumerate(groups) for i, c in enumerate(names)}
        largest = max(map(len, groups))
        combiner = self._combiner(plan)
        sums: SecureSum | NoisySum | None = None
        vectors: list[dict[int, Words]] = [{} for _ in groups]
        metrics: list[str] = []
        capped: list[str] = []
        # What each client asks of its own update before it hands it to its state machine.
        gate = Gate(plan.round, plan.clients, plan.expected(), self._cap)
        for item in self._inner.train(replace(plan, fold=None)):
            if isinstance(item, Failure):
                yield item
                continue
            assert isinstance(item, Updates)
            passed = gate.check(item)
            yield from passed.failures
            capped.extend(passed.capped)
            for row, client in enumerate(passed.updates.clients):
                update = passed.updates.take([row])
                if self._run.strategy.weights == "uniform":
                    update = uniform(update)
                sums = sums or self._sum(plan, combiner, update, largest)
                metrics = metrics or named(update.metrics)
                group, place = member[client]
                if isinstance(sums, NoisySum):
                    noise = seeded_stream(seed, "distributed noise", plan.round, client)
                    words = sums.encode(update, noise)
                else:
                    words = sums.encode(update, _rounding(seed, plan.round, client))
                self._put(vectors[group], place, words)
        parts: list[tuple[Sequence[str], Sum]] = []
        for names, given in zip(groups, vectors, strict=True):
            if sums is None:
                break
            found = self._add(plan, names, given, sums)
            if isinstance(found[0], Total):
                total = found[0]
                survivors = [names[i] for i in total.survivors]
                found_sum = secure.opened(sums, total.words, len(survivors), metrics)
                parts.append((survivors, found_sum))
            yield from found[1]
        if parts:
            whole = secure.cohort(parts, combiner, plan)
            whole.capped.extend(c for c in capped if c in set(whole.participants))
            yield whole

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        """The figures of all clients together: nobody sees those of one."""
        found: list[Evaluation] = []
        for item in self._inner.evaluate(plan):
            if isinstance(item, Failure):
                yield item
            else:
                found.append(item)
        found.sort(key=lambda e: e.client)
        if total := sum(e.examples for e in found):
            names = found[0].metrics
            means = {n: sum(e.metrics[n] * e.examples for e in found) / total for n in names}
            yield Evaluation("all", total, means)

    def plan_record(self) -> Mapping[str, Any]:
        """What the engine says, and that sums were masked and rounding seeded."""
        how = "accounting only" if self._section.accounting_only else "masked"
        return {**self._inner.plan_record(), "secure_aggregation": f"{how}, seeded rounding"}

    def close(self) -> None:
        """Ends the engine."""
        self._inner.close()

    def _combiner(self, plan: TrainPlan) -> Combiner:
        """The round's: the strategy's own, or under client-level privacy a bounded sum.

        A client is clipped before its numbers are rounded. Rounding may make it longer by a step
        in each number, so it is clipped that much shorter: the sensitivity stays what was stated.
        """
        parts = plan.fold.parts if isinstance(plan.fold, Fold) else None
        if parts is None:
            return self._strategy.combine
        if self._run.privacy.distributed:  # its rounding is part of its sensitivity
            return private_sum(parts)
        bits = value_bits(len(plan.clients), self._section)
        numbers = sum(t.numel() for t in plan.expected().values())
        longer = math.sqrt(numbers) * 2 * self._section.clip / (2**bits - 1)
        share = 1 - longer / parts.clip.clip_norm
        if share < 0.5:
            raise InputError(
                f"rounding to {bits} bits may lengthen a delta by {longer:.3g}, and clip_norm is "
                f"{parts.clip.clip_norm:g}",
                where="[secure_aggregation]",
                fix="set a smaller clip, more bits, or a larger clip_norm",
            )
        return private_sum(parts._replace(cap=parts.cap / share))

    def _sum(
        self, plan: TrainPlan, combine: Combiner, update: Updates, clients: int
    ) -> SecureSum | NoisySum:
        buffers = frozenset(plan.model.buffers)
        if self._run.privacy.distributed:
            template = {name: t[0] for name, t in update.delta.items()}
            return NoisySum(self._run, template, buffers, plan.round)
        combiner = weighted_mean() if combine.merge is None else combine
        tensors = plan.expected()
        cap = 1.0 if self._run.strategy.weights == "uniform" else self._cap
        return SecureSum(
            combiner,
            lambda: combiner.zero(tensors),
            {name: t[0] for name, t in update.delta.items()},
            buffers,
            self._section,
            cap,
            value_bits(clients, self._section),
        )

    def _put(self, vectors: dict[int, Words], place: int, words: Words) -> None:
        if not self._section.accounting_only or not vectors:
            vectors[place] = words
            return
        first = next(iter(vectors))  # one running sum, under the number of whoever came first
        np.add(vectors[first], words, out=vectors[first])
        vectors[place] = _NONE

    def _add(
        self,
        plan: TrainPlan,
        names: Sequence[str],
        vectors: dict[int, Words],
        sums: SecureSum | NoisySum,
    ) -> tuple[Total | Aborted, list[Failure]]:
        """The sum of one group, and who is not in it."""
        section = self._section
        if section.accounting_only:
            if len(vectors) < section.min_cohort:
                why = f"{len(vectors)} members, need {section.min_cohort}"
                there = [names[i] for i in vectors]
                return Aborted(why), secure.aborted(there, {}, why)
            words = next(iter(vectors.values())) & np.uint32((1 << section.bits) - 1)
            return Total(words, tuple(sorted(vectors))), []
        identities = [self._identity(name) for name in names]
        directory = Directory([identity.public_key for identity in identities])
        terms = Terms(
            hashlib.sha256(f"{self._run.run.name}\0{self._run.run.seed}".encode()).digest()[:16],
            plan.round,
            context_of({}, "train", plan.round, secure.model_digest(plan.model.tensors())),
            directory.digest,
            sums.size,
            section.bits,
            sums.value_bits,
            sums.modular,
        )
        policy = secure.policy(self._run, len(self.clients()))

        def payload(place: int) -> Callable[[], Words]:
            return lambda: vectors[place]

        kept = self._kept.pop(tuple(names), None)
        if kept is None or kept.clients.keys() != vectors.keys():
            kept = _Kept(None, dict.fromkeys(vectors))
        clients = {
            i: Client(
                i,
                identities[i],
                directory,
                terms,
                policy,
                payload(i),
                section.keep_setup,
                kept.clients[i],
            )
            for i in vectors
        }
        server = Server(
            terms, directory, clients, secure.design(section), section.min_cohort, kept.server
        )
        found = run_round(server, clients, terms, silent=self._silent)
        if section.keep_setup and isinstance(found, Total):
            setups = {i: client.setup for i, client in clients.items()}
            self._kept[tuple(names)] = _Kept(server.setup, setups)
        lost = {names[i]: f"secure aggregation: {why}" for i, why in server.lost.items()}
        if isinstance(found, Aborted):
            there = [names[i] for i in vectors]
            return found, secure.aborted(there, {}, found.why)
        inside = {names[i] for i in found.survivors}
        return found, [Failure(c, why) for c, why in lost.items() if c not in inside]

    def _identity(self, name: str) -> Identity:
        if name not in self._identities:
            self._identities[name] = Identity.generate()
        return self._identities[name]


class _Kept(NamedTuple):
    """What a group keeps for its next round: the server's part, and each client's."""

    server: ServerSetup | None
    clients: dict[int, ClientSetup | None]


_NONE: Words = np.zeros(0, dtype=np.uint32)


def _rounding(seed: int, round_number: int, client: str) -> bytes:
    """The key of a client's rounding in a simulation: a function of the seed, as all its draws."""
    text = f"umbel secure rounding\0{seed}\0{round_number}\0{client}"
    return hashlib.sha256(text.encode()).digest()
