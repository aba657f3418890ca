"""A federation whose clients are the nodes behind Flower's ``Grid``.

Be it the grid of a deployment or of Flower's own simulation: the round loop does not know.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any, TypeVar

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from umbel.core import messages
from umbel.core.errors import InputError, NotNowError, RunError
from umbel.core.messages import (
    EVALUATE,
    HELLO,
    MANIFEST,
    MODEL,
    NOT_NOW,
    QUESTIONS,
    STAGES,
    TRAIN,
    Answer,
    Hello,
    Problem,
    Question,
    Stage,
    Stages,
)
from umbel.core.payloads import (
    EvaluatePlan,
    Evaluation,
    Failure,
    TrainPlan,
    Updates,
    pack,
    unpack,
)
from umbel.core.run_file import RunFile
from umbel.datasets.federated import Info
from umbel.server.remote_ground import Asked
from umbel.tasks.begin import base_hash
from umbel.tasks.build import build_task, initial_module

# What Flower says when its own machinery could not deliver or run a message, by its error code.
# Its reasons may quote a client's exception and are never passed on.
FLOWER_ERRORS = {
    1: "could not load Umbel's client app",
    2: "crashed in Umbel's client app",
    3: "was not given the message in time",
    4: "answered too late",
    5: "is not connected",
    7: "was sent a damaged app",
    8: "crashed",
    messages.BROKEN_SEAL: "sent a reply that is not sealed by its key",
    messages.OTHER_NAME: "answered under another site's name",
}

EMPTY = {MODEL: ConfigRecord({MODEL: b""})}

# A reply that is larger than the model by this many bytes is not read.
SLACK = 1 << 20

TOGETHER_SECONDS = 15.0
"""Two signs of life: after an outage, all who are back have given one by then."""

QUICKEST_POLL, SLOWEST_POLL = 0.01, 1.0
LATE = 0.05
"""By how much of the time that it took an answer may be seen late."""


R = TypeVar("R", Hello, Stages, Answer)
T = TypeVar("T")


def nothing() -> None:
    """Does nothing."""


def patient(stream: Iterator[T | None], deadline: float | None) -> Iterator[T]:
    """What comes, waiting wherever ``stream`` has nothing yet; not longer than to the deadline."""
    now = heard = time.monotonic()
    end = float("inf") if deadline is None else now + deadline
    for item in stream:
        now = time.monotonic()
        if item is None:
            pause = min(max(QUICKEST_POLL, LATE * (now - heard)), SLOWEST_POLL)
            time.sleep(min(pause, max(0.0, end - now)))
        else:
            heard = now
            yield item


class GridFederation:
    """The clients behind a Flower ``Grid``: one node each.

    Waits for the nodes and asks each who it is and what it holds. From then on a client is its
    node: who comes later is not asked, and who is lost fails by name, round after round.

    Args:
        grid: of the ServerApp.
        run: the run file; its tables go to the clients, with the noise that its privacy budget asks
            for, which depends on what they hold: :attr:`run`.
        sites: how many nodes to wait for.
        wait: seconds until the nodes must be there and have answered; and how long the run waits
            for one of them where later all are lost.
        alive: raises where the machinery behind the grid has ended.
        end: called by :meth:`close`.

    Raises:
        NotNowError: all that is missing is the hours at which nodes take part.
        RunError: too few nodes, a node that cannot take part, or nodes that contradict each other.
    """

    def __init__(
        self,
        grid: Grid,
        run: RunFile,
        *,
        sites: int,
        wait: float = 600.0,
        alive: Callable[[], None] = nothing,
        end: Callable[[], None] = nothing,
    ) -> None:
        self.run = run
        self._grid = grid
        self._tables = messages.write_run(run)
        self._alive = alive
        self._end = end
        self._wait = wait
        self._nodes: dict[str, int] = {}
        self._hellos: dict[str, Hello] = {}
        self._stages: Mapping[str, Stage] = {}
        self._greet(sites, wait)
        self._names = sorted(self._hellos)
        self.info = self._agreed_info()
        if run.privacy.unit != "none":
            from umbel.server.private_plan import calibrated  # accountants take seconds to load

            self.run = calibrated(run, self.examples())
            self._tables = messages.write_run(self.run)

    def clients(self) -> Sequence[str]:
        """The names that the nodes gave, in lexicographic order."""
        return self._names

    def examples(self) -> Sequence[int]:
        """How many training examples each declares."""
        return [self._hellos[name].examples for name in self._names]

    def train(self, plan: TrainPlan) -> Iterator[Updates | Failure]:
        """Asks all the plan's clients at once; answers come in the order of their arrival.

        Who has not answered at the deadline is a failure, and what it sends later is never read.
        """
        self._somebody()
        return patient(self.attend(plan), plan.deadline)

    def attend(self, plan: TrainPlan) -> Iterator[Updates | Failure | None]:
        """As :meth:`train`; but in place of waiting, ``None`` where nobody is back yet."""
        document = pack({**plan.model.tensors(), **plan.shared})
        limit = sum(t.numel() * t.element_size() for t in plan.expected().values()) + SLACK
        record = {MODEL: ConfigRecord({MODEL: document})}
        contents = dict.fromkeys(plan.clients, record)
        for pair in self._asked(TRAIN, plan.round, contents, plan.deadline, plan.run_id):
            if pair is None:
                yield None
                continue
            client, reply = pair
            if isinstance(reply, Failure):
                yield reply
                continue
            answer, tensors = reply
            if len(tensors) > limit:
                yield Failure(client, f"sent {len(tensors)} bytes, at most {limit} are read")
                continue
            try:
                delta, _ = unpack(tensors, f"client '{client}'")
            except InputError:
                yield Failure(client, "sent tensors that are not a safetensors document")
                continue
            yield Updates(
                answer.round,
                [client],
                {name: tensor[None] for name, tensor in delta.items()},
                torch.tensor([answer.examples], dtype=torch.float64),
                {n: torch.tensor([v], dtype=torch.float64) for n, v in answer.means().items()},
            )

    def evaluate(self, plan: EvaluatePlan) -> Iterator[Evaluation | Failure]:
        """Asks those of the plan's clients that have a test part, as :meth:`train` does."""
        tested = [c for c in plan.clients if self._hellos[c].test_examples]
        document = pack({**plan.model.tensors(), **plan.shared})
        for client, reply in self._ask(EVALUATE, plan, tested, document):
            if isinstance(reply, Failure):
                yield reply
            elif (held := self._hellos[client].test_examples) != reply[0].examples:
                said = reply[0].examples
                yield Failure(client, f"evaluated on {said:g} examples, declared {held}")
            else:
                yield Evaluation(client, held, reply[0].means())

    def tested(self, clients: Sequence[str]) -> list[str]:
        """Those of ``clients`` that have a test part."""
        return [c for c in clients if self._hellos[c].test_examples]

    def sizes(self, stages: Mapping[str, Stage]) -> Mapping[str, Mapping[Question, Sequence[int]]]:
        """How many examples each client answers each question with, stage after stage.

        Raises:
            RunError: one does not say, or not of all stages.
        """
        requests = {
            client: self._message(STAGES, self._nodes[client], 0, client, EMPTY, None, stage=stage)
            for client, stage in stages.items()
        }
        found: dict[str, Mapping[Question, Sequence[int]]] = {}
        for client, message in self._exchange(requests, self._wait):
            reply = message if isinstance(message, str) else _read(message, Stages)
            wanted = len(stages[client].order)
            if not isinstance(reply, str):
                said = reply[0].examples
                if said.keys() == set(QUESTIONS) and {*map(len, said.values())} == {wanted}:
                    found[client] = said
                    continue
                reply = "does not say what it has in each stage"
            raise RunError(
                f"client '{client}' {reply}", where="[continual]", fix="see the site's log"
            )
        return found

    def asked(self, how: Asked) -> GridFederation:
        """The clients who are there, as they are asked in a stage. Closing it closes nothing."""
        there = copy.copy(self)
        there.run, there._tables = how.run, messages.write_run(how.run)
        there._stages, there._end = how.stages, nothing
        there.__dict__["_base"] = how.base
        there._names = [name for name in self._names if name in how.sizes]
        there._hellos = {
            name: self._hellos[name].model_copy(update={"examples": how.sizes[name]})
            for name in there._names
        }
        return there

    def plan_record(self) -> Mapping[str, Any]:
        """Nothing was chosen."""
        return {}

    def close(self) -> None:
        """Ends what is behind the grid, where it was opened for this federation."""
        self._end()

    def _ask(
        self,
        kind: str,
        plan: TrainPlan | EvaluatePlan,
        clients: Sequence[str],
        document: bytes,
    ) -> Iterator[tuple[str, tuple[Answer, bytes] | Failure]]:
        record = {MODEL: ConfigRecord({MODEL: document})}
        contents = dict.fromkeys(clients, record)
        return self.ask(kind, plan.round, contents, plan.deadline, plan.run_id)

    def ask(
        self,
        kind: str,
        round_number: int,
        contents: Mapping[str, Mapping[str, ConfigRecord]],
        deadline: float | None,
        run_id: str = "",
    ) -> Iterator[tuple[str, tuple[Answer, bytes] | Failure]]:
        """Asks each client of ``contents`` with its records; what each answers, as it comes.

        Args:
            kind: of message.
            round_number: 1 … rounds.
            contents: client -> records beside the manifest.
            deadline: seconds; ``None`` waits.
            run_id: under which clients keep what they keep from round to round.
        """
        self._somebody()
        return patient(self._asked(kind, round_number, contents, deadline, run_id), deadline)

    def _somebody(self) -> None:
        """Waits where all have gone: a network that is cut must not cost a run its rounds.

        Who comes back first is not asked alone at once: the others are on their way.
        """
        nodes = set(self._nodes.values())
        now = began = time.monotonic()
        first: float | None = None
        while now - began < self._wait:
            there = nodes & set(self._grid.get_node_ids())
            if there == nodes or (there and now == began):
                return
            if there:
                first = now if first is None else first
                if now - first >= TOGETHER_SECONDS:
                    return
            self._alive()
            time.sleep(SLOWEST_POLL)
            now = time.monotonic()

    def _asked(
        self,
        kind: str,
        round_number: int,
        contents: Mapping[str, Mapping[str, ConfigRecord]],
        deadline: float | None,
        run_id: str,
    ) -> Iterator[tuple[str, tuple[Answer, bytes] | Failure] | None]:
        requests = {
            client: self._message(
                kind, self._nodes[client], round_number, client, records, deadline, run_id
            )
            for client, records in contents.items()
        }
        for pair in self._polled(requests, deadline):
            if pair is None:
                yield None
                continue
            client, message = pair
            if isinstance(message, str):
                yield client, Failure(client, message)
                continue
            reply = _read(message, Answer)
            if isinstance(reply, str):
                yield client, Failure(client, reply)
            elif reply[0].client != client:
                yield client, Failure(client, "answered under another client's name")
            elif reply[0].round != round_number:
                yield client, Failure(client, f"answered round {reply[0].round}")
            else:
                yield client, reply

    @cached_property
    def _base(self) -> str | None:
        """Of the frozen parameters as this side builds them; every client compares its own."""
        return base_hash(initial_module(build_task(self.run.task, self.info), self.run.run.seed))

    def _message(
        self,
        kind: str,
        node: int,
        round_number: int,
        client: str,
        records: Mapping[str, ConfigRecord],
        deadline: float | None,
        run_id: str = "",
        stage: Stage | None = None,
    ) -> Message:
        # Two records: Flower stores what is equal once, and the model is equal for all clients.
        # The time to live keeps a late client from working through the rounds that it missed.
        base = None if kind in (HELLO, STAGES) else self._base
        stage = self._stages.get(client, stage)
        request = messages.write_request(self._tables, round_number, client, run_id, base, stage)
        content = RecordDict({MANIFEST: ConfigRecord({MANIFEST: request}), **records})
        return Message(content, node, kind, ttl=deadline, group_id=str(round_number))

    def _exchange(
        self, requests: dict[str, Message], deadline: float | None
    ) -> Iterator[tuple[str, Message | str]]:
        """Sends the requests; yields (key, reply), or (key, why there is none), as they come."""
        return patient(self._polled(requests, deadline), deadline)

    def _polled(
        self, requests: dict[str, Message], deadline: float | None
    ) -> Iterator[tuple[str, Message | str] | None]:
        """As :meth:`_exchange`; but in place of waiting, ``None`` where there is no reply yet.

        A reply is attributed by the request that it answers: Flower may name no node, or a wrong
        one, for a client that was lost.
        """
        began = time.monotonic()
        sent = list(self._grid.push_messages(list(requests.values())))
        if len(sent) == len(requests):
            waiting = {i: key for i, key in zip(sent, requests, strict=True) if i}
        else:  # some grids leave out what they refuse
            waiting = {
                m.metadata.message_id: key
                for key, m in requests.items()
                if m.metadata.message_id in set(sent)
            }
        for key in requests.keys() - set(waiting.values()):
            yield key, FLOWER_ERRORS[5]
        while waiting:
            self._alive()
            for message in self._grid.pull_messages(list(waiting)):
                if (found := waiting.pop(message.metadata.reply_to_message_id, None)) is not None:
                    yield found, message
            if deadline is not None and time.monotonic() >= began + deadline:
                break
            if waiting:
                yield None
        for key in waiting.values():
            yield key, f"no reply within {deadline:g} s"

    def _greet(self, sites: int, wait: float) -> None:
        until = time.monotonic() + wait
        refusals: dict[int, str] = {}
        while len(self._nodes) < sites:
            self._alive()
            connected = set(self._grid.get_node_ids())
            fresh = sorted(connected - refusals.keys() - set(self._nodes.values()))
            left = until - time.monotonic()
            if left <= 0 or (refusals and not fresh and len(connected) >= sites):
                raise self._too_few(sites, wait, refusals)
            requests = {str(n): self._message(HELLO, n, 0, "", EMPTY, left) for n in fresh}
            for key, message in self._exchange(requests, left):
                reply = message if isinstance(message, str) else _read(message, Hello)
                if isinstance(reply, str):
                    refusals[int(key)] = reply
                    continue
                name = reply[0].client
                if name in self._nodes:
                    raise RunError(
                        f"two nodes say that they are client '{name}'",
                        where="greeting",
                        fix="give each site its own name in its --node-config",
                    )
                self._nodes[name], self._hellos[name] = int(key), reply[0]
            if not fresh:
                time.sleep(0.2)

    def _too_few(self, sites: int, wait: float, refusals: dict[int, str]) -> RunError:
        here = ", ".join(f"'{n}'" for n in sorted(self._nodes)) or "none"
        reasons = "".join(f"; node {node} {why}" for node, why in sorted(refusals.items()))
        kind = NotNowError if {*refusals.values()} == {NOT_NOW} else RunError
        return kind(
            f"{len(self._nodes)} of {sites} clients are ready after at most {wait:g} s: "
            f"{here}{reasons}",
            where="greeting",
            fix="see the logs of the sites that are missing",
        )

    def _agreed_info(self) -> Info:
        """The data as all clients describe them: a model is built from it."""
        first, *others = self._names
        for name in others:
            for key, value in self._hellos[first].info.items():
                found = self._hellos[name].info.get(key)
                if key != "name" and found != value:  # sites name their own files as they like
                    raise RunError(
                        f"clients '{first}' and '{name}' hold different data: {key} is {value!r} "
                        f"and {found!r}",
                        where="greeting",
                        fix="do both sites read the same data set?",
                    )
        table = self._hellos[first].info
        known = {f.name: table[f.name] for f in fields(Info) if f.name in table}
        try:
            return Info(**{**known, "input_shape": tuple(int(n) for n in table["input_shape"])})
        except (KeyError, TypeError, ValueError):
            raise RunError(
                f"client '{first}' does not describe its data", where="greeting"
            ) from None


def _read(message: Message, kind: type[R]) -> tuple[R, bytes] | str:
    """A reply and its tensors, or what a person should read in their place."""
    if message.has_error():
        return FLOWER_ERRORS.get(message.error.code, "failed in Flower's runtime")
    try:
        text = message.content[MANIFEST][MANIFEST]
        document = message.content[MODEL][MODEL]
    except (KeyError, TypeError, ValueError):
        return "sent a malformed reply"
    reply = messages.read_reply(text, kind)
    if isinstance(reply, Problem):
        return reply.reason()
    if reply is None or not isinstance(document, bytes):
        return "sent a malformed reply"
    return reply, document
