"""Secure aggregation in Umbel's ClientApp: a message type for each stage, one answer for all.

Flower's own ClientApp lives for one message. Between the messages of a round the client's secrets
are in its node's ``Context``, which Flower keeps in the memory of the SuperNode, on the site's own
machine, and never sends; the last answer, a refusal and the next round remove them. A set-up that
``keep_setup`` asks for stays there for the rounds of one run, at most so many.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from umbel.core import messages
from umbel.core.errors import RefusedError
from umbel.core.messages import MODEL, SECURE, SECURE_STAGES, Answer, Hello, Request
from umbel.core.run_file import RunFile

if TYPE_CHECKING:  # stages before training are answered without loading torch
    from umbel.client.secure import Demands, Round, Seat
    from umbel.core.payloads import Updates
    from umbel.privacy.secure_aggregation.keystream import Words
    from umbel.privacy.secure_aggregation.terms import Terms

KEPT = "umbel.secure"
"""Where a round's secrets are in the node's state; those of a set-up that is kept, with its purpose
behind a dot."""


class Parts(Protocol):
    """What the app has for every kind of message."""

    def answer(
        self, message: Message, work: Callable[[Request], tuple[Hello | Answer, bytes]]
    ) -> Message:
        """Reads the request, and turns what goes wrong into a problem."""

    def trained(
        self, request: Request, context: Context, message: Message
    ) -> tuple[Updates, frozenset[str]]:
        """What the client learns in the round, and which of its tensors are buffers."""

    def tested(
        self, request: Request, context: Context, message: Message
    ) -> tuple[int, dict[str, float]]:
        """How many test examples the client has, and the model's figures on them."""

    def stage(self, code: str) -> Any:
        """Turns an exception into a problem of this code."""

    def names(self, run: RunFile, context: Context) -> list[str]:
        """The clients of a simulation."""


def register(app: ClientApp, parts: Parts) -> None:
    """Adds the stages to ``app``."""
    for stage in SECURE_STAGES:
        for purpose, route in (("train", app.train), ("evaluate", app.evaluate)):
            route(stage)(_handler(parts, purpose, stage))


def _handler(parts: Parts, purpose: str, stage: str) -> Callable[[Message, Context], Message]:
    def handle(message: Message, context: Context) -> Message:
        def work(request: Request) -> tuple[Answer, bytes]:
            from umbel.client import secure

            names: list[str] = []

            def payload(terms: Terms) -> Words:
                _check_model(message, str(about["model"]))
                if purpose == "train":
                    words, found = _train(parts, request, context, message, terms)
                else:
                    words, found = _evaluate(parts, request, context, message, terms)
                names.extend(found)
                return words

            with parts.stage("secure"):
                section = request.run.secure_aggregation
                if not section.enabled or section.accounting_only:
                    raise RefusedError("a round under masks of a run that has none")
                about = json.loads(str(message.content[SECURE]["about"]))
                data = message.content[SECURE][SECURE]
                assert isinstance(data, bytes)
                seat = _seat(parts, request, context)
                announced = _announced(request, purpose, about)
                fresh = stage == SECURE_STAGES[0]
                kept = _take(context, announced, fresh=fresh)
                setup, used = _take_setup(context, purpose, announced, fresh=fresh)
                demands = _demands(request.run, purpose)
                answered = secure.step(kept, data, seat, announced, demands, payload, setup)
                _keep(context, announced, answered.kept)
                if answered.setup is not None and announced.number < request.run.run.rounds:
                    _keep_setup(context, purpose, announced, answered.setup, used + fresh)
            metrics = dict.fromkeys(names, float("nan"))  # names travel, figures do not
            return messages.answer(request.client, request.round, 0, metrics), answered.answer

        return parts.answer(message, work)

    return handle


def _demands(run: RunFile, purpose: str) -> Demands:
    from umbel.client.secure import Demands

    cohort = run.strategy.cohort
    if not run.privacy.distributed or purpose != "train" or not isinstance(cohort, int):
        return Demands(run.secure_aggregation)
    return Demands(run.secure_aggregation, modular=True, max_cohort=cohort)


def _seat(parts: Parts, request: Request, context: Context) -> Seat:
    from umbel.client import secure

    config = context.node_config
    name = request.client
    if "client" not in config:
        return secure.simulated_seat(name, parts.names(request.run, context), request.run.run.seed)
    if str(config["client"]) != name:
        raise RefusedError(f"asked for '{name}'")
    if "folder" in config:
        from umbel.client.folder import SiteFolder
        from umbel.client.policy import read_policy

        folder = SiteFolder(Path(str(config["folder"])))
        least = read_policy(folder.policy_file).limits.minimum_cohort
        return secure.seat_at(name, folder.identity(), folder.kit().peers, least)
    identity, peers = Path(str(config["identity"])), Path(str(config["peers"]))
    return secure.seat_from_files(name, identity, peers)


def _announced(request: Request, purpose: str, about: dict[str, Any]) -> Round:
    from umbel.client.secure import Round
    from umbel.privacy.secure_aggregation.context import context_of

    tables = messages.write_run(request.run)
    digest = bytes.fromhex(str(about["model"]))
    context = context_of(tables, purpose, request.round, digest)
    return Round(bytes.fromhex(str(about["run"])), request.round, context)


def _check_model(message: Message, announced: str) -> None:
    from umbel.privacy.secure_aggregation.refusals import Reason, Refused

    document = message.content[MODEL][MODEL]
    if not isinstance(document, bytes) or hashlib.sha256(document).hexdigest() != announced:
        raise Refused(Reason.OTHER_MODEL, "the model is not the one that was announced")


def _train(
    parts: Parts, request: Request, context: Context, message: Message, terms: Terms
) -> tuple[Words, list[str]]:
    from umbel.core.payloads import Updates
    from umbel.privacy.secure_aggregation.refusals import Reason, Refused
    from umbel.strategies.build import build_strategy
    from umbel.strategies.parts.combine import weighted_mean
    from umbel.strategies.parts.secure_sum import SecureSum, named

    run = request.run
    updates, buffers = parts.trained(request, context, message)
    if run.privacy.distributed:
        return _noised(run, updates, buffers, terms, people="client" in context.node_config), []
    cap = cap_of(run)
    weights = updates.weights.clamp(max=cap) if run.strategy.weights == "examples" else None
    weights = updates.weights.new_ones(1) if weights is None else weights
    updates = Updates(updates.round, updates.clients, updates.delta, weights, updates.metrics)
    combiner = build_strategy(run.strategy).combine
    told = request.stage is not None and request.stage.question in ("importance", "prototypes")
    if combiner.merge is None or told:  # what clients say of a model is no step of the strategy
        combiner = weighted_mean()
    template = {name: tensor[0] for name, tensor in updates.delta.items()}
    sums = SecureSum(
        combiner,
        lambda: combiner.zero(template),
        template,
        buffers,
        run.secure_aggregation,
        cap,
        terms.value_bits,
    )
    if sums.size != terms.size or terms.ring_bits != run.secure_aggregation.bits:
        raise Refused(Reason.OTHER_TERMS, f"the vector has {sums.size} numbers, not {terms.size}")
    return sums.encode(updates), named(updates.metrics)


def _noised(
    run: RunFile, updates: Updates, buffers: frozenset[str], terms: Terms, *, people: bool
) -> Words:
    """The vector with the client's own share of the noise: of the operating system, where the data
    are people's."""
    from umbel.privacy.secure_aggregation.refusals import Reason, Refused
    from umbel.privacy.streams import seeded_stream, system_stream
    from umbel.strategies.parts.noisy_sum import NoisySum

    template = {name: tensor[0] for name, tensor in updates.delta.items()}
    sums = NoisySum(run, template, buffers, updates.round)
    if (sums.size, sums.value_bits) != (terms.size, terms.ring_bits):
        raise Refused(Reason.OTHER_TERMS, f"the vector has {sums.size} numbers, not {terms.size}")
    if people:
        return sums.encode(updates, system_stream())
    noise = seeded_stream(run.run.seed, "distributed noise", updates.round, updates.clients[0])
    return sums.encode(updates, noise)


def _evaluate(
    parts: Parts, request: Request, context: Context, message: Message, terms: Terms
) -> tuple[Words, list[str]]:
    from umbel.privacy.secure_aggregation.refusals import Reason, Refused
    from umbel.strategies.parts.secure_sum import SecureMeans, named

    examples, metrics = parts.tested(request, context, message)
    run = request.run
    means = SecureMeans(run.secure_aggregation, cap_of(run), terms.value_bits)
    if means.layout.size != terms.size or terms.ring_bits != run.secure_aggregation.bits:
        raise Refused(Reason.OTHER_TERMS, f"{means.layout.size} numbers, not {terms.size}")
    weight = float(examples) if run.strategy.weights == "examples" else 1.0
    return means.layout.encode(means.numbers(metrics, weight)), named(metrics)


def cap_of(run: RunFile) -> float:
    """The most that a client weighs: what bounds a claim that nobody can check."""
    if run.strategy.weights == "uniform":
        return 1.0
    if run.strategy.max_weight is None:
        raise RefusedError("weights without a bound")
    return run.strategy.max_weight


def _take(context: Context, announced: Round, *, fresh: bool) -> bytes | None:
    """What was kept for this very round; whatever else was is dropped."""
    record = context.state.pop(KEPT, None)
    if fresh or not isinstance(record, ConfigRecord):
        return None
    if record["run"] != announced.run or record["round"] != announced.number:
        return None
    kept = record["state"]
    return kept if isinstance(kept, bytes) else None


def _keep(context: Context, announced: Round, kept: bytes | None) -> None:
    if kept is not None:
        context.state[KEPT] = ConfigRecord(
            {"run": announced.run, "round": announced.number, "state": kept}
        )


def _take_setup(
    context: Context, purpose: str, announced: Round, *, fresh: bool
) -> tuple[bytes | None, int]:
    """The set-up of this run, and how many later rounds it has served; any other is dropped."""
    from umbel.privacy.secure_aggregation.parameters import KEPT_ROUNDS

    record = context.state.pop(f"{KEPT}.{purpose}", None)
    if not isinstance(record, ConfigRecord) or record["run"] != announced.run:
        return None, 0
    setup, used = record["setup"], record["used"]
    if not isinstance(setup, bytes) or not isinstance(used, int):
        return None, 0
    if fresh and used + 2 > KEPT_ROUNDS:
        return None, 0
    return setup, used


def _keep_setup(context: Context, purpose: str, announced: Round, setup: bytes, used: int) -> None:
    record = ConfigRecord({"run": announced.run, "setup": setup, "used": used})
    context.state[f"{KEPT}.{purpose}"] = record
