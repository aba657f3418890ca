"""Secure aggregation over Flower's Grid: its stages are messages, and the server sees sums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flwr.app import ConfigRecord

from umbel.core import messages
from umbel.core.errors import InputError
from umbel.core.messages import MODEL, SECURE, SECURE_STAGES, Question
from umbel.core.payloads import (
    EvaluatePlan,
    Evaluation,
    Failure,
    Folded,
    TrainPlan,
    Updates,
    pack,
)
from umbel.datasets.federated import Info
from umbel.privacy.secure_aggregation.context import context_of
from umbel.privacy.secure_aggregation.identities import Directory, simulated
from umbel.privacy.secure_aggregation.parameters import KEPT_ROUNDS
from umbel.privacy.secure_aggregation.server import (
    Aborted,
    Outbox,
    Server,
    Setup,
    Stage,
    Total,
)
from umbel.privacy.secure_aggregation.terms import Terms
from umbel.server import secure
from umbel.server.flower.grid import SLACK, GridFederation
from umbel.server.private_sum import private_sum
from umbel.server.remote_ground import Asked
from umbel.server.rounds import Fold
from umbel.strategies.build import build_strategy
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.combine import weighted_mean
from umbel.strategies.parts.noisy_sum import NoisySum
from umbel.strategies.parts.secure_sum import SecureMeans, SecureSum, Sum, value_bits

KINDS = dict(zip(list(Stage)[:6], SECURE_STAGES, strict=True))
"""What the server waits for -> message type."""


class Found(NamedTuple):
    """What became of one group: its sum or why there is none, and the metrics' names."""

    clients: Sequence[str]
    end: Total | Aborted
    survivors: Sequence[str]
    metrics: Sequence[str]
    lost: Mapping[str, str]


class Shape(NamedTuple):
    """Of the vector that clients send: numbers, bits of each, whether their sum goes round."""

    size: int
    value_bits: int
    modular: bool


class _Kept(NamedTuple):
    """The set-ups of a round's groups, and how many rounds they have served."""

    groups: Sequence[Sequence[str]]
    setups: Sequence[Setup | None]
    used: int


class SecureGrid:
    """The clients behind a Grid, summed under masks.

    Args:
        inner: the clients, and their run.
        strategy: what the run names.
        peers: client -> raw Ed25519 key, as it was pinned at the sites; ``None`` in a simulation.
    Raises:
        InputError: the run cannot be summed securely, or a client is not among the peers.
    """

    def __init__(
        self,
        inner: GridFederation,
        strategy: Strategy,
        peers: Mapping[str, bytes] | None,
    ) -> None:
        run = inner.run
        secure.check(run, strategy.combine, len(inner.clients()))
        if run.secure_aggregation.accounting_only:
            raise InputError(
                "accounting_only masks nothing, and these clients are asked for masks",
                where="[secure_aggregation] accounting_only",
                fix="remove it, or simulate in process",
            )
        if strategy.client.keeps and run.strategy.weights == "examples":
            raise InputError(
                f"strategy '{run.strategy.name}' needs the cohort's share of all examples, and "
                "nobody tells how many there are",
                where="[strategy] weights",
                fix="set weights = 'uniform'",
            )
        central = (run.privacy.unit, run.privacy.place) == ("client", "server")
        if central and not run.privacy.distributed:
            raise InputError(
                f"mechanism = '{run.privacy.mechanism}' has the server add the noise, to a sum "
                "that it would have seen without",
                where="[privacy] mechanism",
                fix="set mechanism = 'distributed-discrete-gaussian', or place = 'client'",
            )
        if run.privacy.unit == "example" and run.privacy.noise_multiplier is None:
            raise InputError(
                "noise cannot be calibrated where nobody tells how many examples it has",
                where="[privacy] noise_multiplier",
                fix="state it; each site's own ledger counts what it costs there",
            )
        self.run = run
        self._inner, self._strategy = inner, strategy
        self._section = run.secure_aggregation
        if peers is None:
            peers = {c: simulated(run.run.seed, c).public_key for c in inner.clients()}
        if missing := [c for c in inner.clients() if c not in peers]:
            raise InputError(
                f"client '{missing[0]}' has no pinned identity key",
                where="secure aggregation",
                fix="provision the site, and hand the new kit to all sites",
            )
        self._names = sorted(peers)
        self._directory = Directory([peers[name] for name in self._names])
        self._tables = messages.write_run(run)
        self.info: Info = inner.info
        self._peers = peers
        self._about = ""
        self._kept: dict[str, _Kept] = {}

    def clients(self) -> Sequence[str]:
        """The names of the clients."""
        return self._inner.clients()

    def examples(self) -> Sequence[int]:
        """One for each: nobody says how many."""
        return self._inner.examples()

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure | Folded]:
        """Runs the protocol among the plan's clients; yields the failures, and the sum."""
        combine = self._strategy.combine
        expected = plan.expected()
        groups = secure.deal(plan, self.run.run.seed, self._section.groups)
        buffers = frozenset(plan.model.buffers)
        sums: SecureSum | NoisySum
        if self.run.privacy.distributed:
            assert isinstance(plan.fold, Fold)
            assert plan.fold.parts is not None
            combine = private_sum(plan.fold.parts)
            sums = NoisySum(self.run, expected, buffers, plan.round)
        else:
            combiner = weighted_mean() if combine.merge is None else combine
            sums = SecureSum(
                combiner,
                lambda: combiner.zero(expected),
                expected,
                buffers,
                self._section,
                secure.cap_of(self.run),
                value_bits(max(map(len, groups)), self._section),
            )
        shape = Shape(sums.size, sums.value_bits, sums.modular)
        document = pack({**plan.model.tensors(), **plan.shared})
        parts: list[tuple[Sequence[str], Sum]] = []
        for found in self._carry_out("train", plan, groups, shape, document):
            if isinstance(found.end, Total):
                words, count = found.end.words, len(found.survivors)
                parts.append((found.survivors, secure.opened(sums, words, count, found.metrics)))
                lost = found.lost.items()
                yield from (Failure(c, why) for c, why in lost if c not in found.survivors)
            else:
                yield from secure.aborted(found.clients, found.lost, found.end.why)
        if parts:
            yield secure.cohort(parts, combine, plan)

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        """The figures of all clients together, weighted as in training; nobody's own are seen."""
        tested = self._inner.tested(plan.clients)
        if len(tested) < self._section.min_cohort:
            return
        bits = value_bits(len(tested), self._section)
        means = SecureMeans(self._section, secure.cap_of(self.run), bits)
        document = pack({**plan.model.tensors(), **plan.shared})
        shape = Shape(means.layout.size, bits, False)
        for found in self._carry_out("evaluate", plan, [tested], shape, document):
            if isinstance(found.end, Aborted):
                yield from secure.aborted(found.clients, found.lost, found.end.why)
                continue
            fields = means.layout.decode(found.end.words, len(found.survivors))
            totals = means.totals(fields, len(found.survivors), found.metrics)
            figures = {name: total / weight for name, (total, weight) in totals.items()}
            yield Evaluation("all", len(found.survivors), figures)

    def sizes(
        self, stages: Mapping[str, messages.Stage]
    ) -> Mapping[str, Mapping[Question, Sequence[int]]]:
        """Whether each client answers each question, stage after stage: 1 or 0."""
        return self._inner.sizes(stages)

    def asked(self, how: Asked) -> SecureGrid:
        """The clients who are there, as they are asked in a stage."""
        there = SecureGrid(self._inner.asked(how), how.strategy, self._peers)
        # What is asked in one round number more than once has keys of its own each time.
        there._about = "\0".join({s.question for s in how.stages.values()})
        return there

    def plan_record(self) -> Mapping[str, Any]:
        """That sums were masked."""
        return {**self._inner.plan_record(), "secure_aggregation": "masked"}

    def close(self) -> None:
        """Ends what is behind the grid."""
        self._inner.close()

    def _carry_out(
        self,
        purpose: str,
        plan: TrainPlan | EvaluatePlan,
        groups: Sequence[Sequence[str]],
        shape: Shape,
        document: bytes,
    ) -> list[Found]:
        """Runs one round of the protocol in each group, all groups stage by stage together."""
        digest = hashlib.sha256(document).digest()
        run_id = hashlib.sha256(f"{plan.run_id}\0{purpose}{self._about}".encode()).digest()[:16]
        context = context_of(self._tables, purpose, plan.round, digest)
        terms = Terms(
            run_id,
            plan.round,
            context,
            self._directory.digest,
            shape.size,
            self._section.bits,
            shape.value_bits,
            shape.modular,
        )
        about = json.dumps({"run": run_id.hex(), "model": digest.hex()})
        number = {name: place for place, name in enumerate(self._names)}
        setups, used = self._kept_of(purpose, groups)
        rounds = [
            _Group(
                [*clients],
                Server(
                    terms,
                    self._directory,
                    [number[c] for c in clients],
                    secure.design(self._section),
                    self._section.min_cohort,
                    setup,
                ),
            )
            for clients, setup in zip(groups, setups, strict=True)
        ]
        for group in rounds:
            group.out = group.server.invite()
        names = self._names.__getitem__
        began = SECURE_STAGES[0]  # sites count the rounds that they begin, with keys or without
        while stages := {g.server.stage for g in rounds if isinstance(g.out, Outbox)}:
            stage = min(stages, key=list(Stage).index)
            there = [g for g in rounds if g.server.stage is stage]
            owner = {names(m): g for g in there for m in _messages(g.out)}
            model = document if stage is Stage.MASKED else b""
            contents = {
                names(m): {
                    SECURE: ConfigRecord({SECURE: data, "about": about}),
                    MODEL: ConfigRecord({MODEL: model}),
                }
                for g in there
                for m, data in _messages(g.out).items()
            }
            limit = 4 * shape.size + SLACK
            kind = f"{purpose}.{began or KINDS[stage]}"
            began = ""
            for client, reply in self._inner.ask(
                kind, plan.round, contents, plan.deadline, plan.run_id
            ):
                group = owner[client]
                if isinstance(reply, Failure):
                    group.lost[client] = reply.reason
                elif len(reply[1]) > limit:
                    group.lost[client] = f"sent {len(reply[1])} bytes, at most {limit} are read"
                else:
                    group.server.receive(number[client], reply[1])
                    if stage is Stage.MASKED:
                        group.metrics[client] = sorted(reply[0].metrics)
            for group in there:
                group.out = group.server.advance()
        self._keep(purpose, rounds, used)
        return [group.found(names) for group in rounds]

    def _kept_of(
        self, purpose: str, groups: Sequence[Sequence[str]]
    ) -> tuple[Sequence[Setup | None], int]:
        """The set-ups of the very same groups, and how many rounds they have served."""
        kept = self._kept.pop(purpose, None)
        if kept is None or kept.groups != [[*clients] for clients in groups]:
            return [None] * len(groups), 0
        return kept.setups, kept.used

    def _keep(self, purpose: str, groups: Sequence[_Group], used: int) -> None:
        """For the next round, if this one came to its end and all of its members have theirs."""
        if not self._section.keep_setup or used + 1 >= KEPT_ROUNDS:
            return
        if all(isinstance(group.out, Total) and group.complete for group in groups):
            listed = [group.clients for group in groups]
            setups = [group.server.setup for group in groups]
            self._kept[purpose] = _Kept(listed, setups, used + 1)


def secured(
    inner: GridFederation, peers: Mapping[str, bytes] | None
) -> GridFederation | SecureGrid:
    """``inner``, or as :class:`SecureGrid` where the run asks for it."""
    if not inner.run.secure_aggregation.enabled:
        return inner
    return SecureGrid(inner, build_strategy(inner.run.strategy), peers)


class _Group:
    """A group of clients on their way through a round."""

    def __init__(self, clients: list[str], server: Server) -> None:
        self.clients, self.server = clients, server
        self.again = server.setup is not None
        self.out: Outbox | Total | Aborted = Aborted("not begun")
        self.lost: dict[str, str] = {}
        self.metrics: dict[str, list[str]] = {}

    @property
    def complete(self) -> bool:
        """Whether everybody has the set-up of this group, as far as can be seen from here."""
        if self.again:
            return not any(why.startswith("refused") for why in self.server.lost.values())
        return self.server.dealt == len(self.clients)

    def found(self, name: Callable[[int], str]) -> Found:
        """How it ended."""
        assert not isinstance(self.out, Outbox)
        survivors = [name(m) for m in self.out.survivors] if isinstance(self.out, Total) else []
        said = {tuple(self.metrics.get(c, ())) for c in survivors} - {()}
        # Places go by the alphabet: they mean something only where all have the same names.
        metrics = list(said.pop()) if len(said) == 1 else []
        aside = {name(m): f"set aside: {why}" for m, why in self.server.turned_away}
        lost = {
            name(m): self.lost.get(name(m), f"secure aggregation: {aside.get(name(m), why)}")
            for m, why in self.server.lost.items()
        }
        order = {c: i for i, c in enumerate(self.clients)}
        survivors.sort(key=order.__getitem__)
        return Found(self.clients, self.out, survivors, metrics, lost)


def _messages(out: Outbox | Total | Aborted) -> Mapping[int, bytes]:
    return out.messages if isinstance(out, Outbox) else {}
