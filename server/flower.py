"""Clients reached through Flower.

``GridFederation`` is a federation over Flower's ``Grid``, be it that of a deployment or of Flower's
own simulation; :func:`simulation` opens the latter; ``app`` is the ``ServerApp`` of a deployment.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from queue import Queue
from typing import Any, TypeVar

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from umbel.core import messages, run_file
from umbel.core.errors import InputError, RunError
from umbel.core.messages import EVALUATE, HELLO, MANIFEST, MODEL, TRAIN, Answer, Hello, Problem
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
from umbel.server.records import RoundRecord

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
}

# A reply that is larger than the model by this many bytes is not read.
SLACK = 1 << 20

SLOWEST_POLL = 1.0


R = TypeVar("R", Hello, Answer)


def nothing() -> None:
    """Does nothing."""


class GridFederation:
    """The clients behind a Flower ``Grid``: one node each.

    Waits for the nodes and asks each who it is and what it holds. A client's name leads to its
    node; what a node says of itself binds it to no name but one, and two nodes of one name are an
    error.

    Args:
        grid: of the ServerApp.
        run: the run file; its tables go to the clients.
        sites: how many nodes to wait for.
        wait: seconds until the nodes must be there and have answered.
        alive: raises where the machinery behind the grid has ended.
        end: called by :meth:`close`.

    Raises:
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
        self._grid = grid
        self._tables = messages.write_run(run)
        self._alive = alive
        self._end = end
        self._nodes: dict[str, int] = {}
        self._hellos: dict[str, Hello] = {}
        self._greet(sites, wait)
        self._names = sorted(self._hellos)
        self.info = self._agreed_info()

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
        document = pack(plan.model.tensors())
        limit = len(document) + SLACK
        for client, reply in self._ask(TRAIN, plan.round, plan.clients, document, plan.deadline):
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
        document = pack(plan.model.tensors())
        for client, reply in self._ask(EVALUATE, plan.round, tested, document, plan.deadline):
            if isinstance(reply, Failure):
                yield reply
            elif (held := self._hellos[client].test_examples) != reply[0].examples:
                said = reply[0].examples
                yield Failure(client, f"evaluated on {said:g} examples, declared {held}")
            else:
                yield Evaluation(client, held, reply[0].means())

    def close(self) -> None:
        """Ends what is behind the grid, where it was opened for this federation."""
        self._end()

    def _ask(
        self,
        kind: str,
        round_number: int,
        clients: Sequence[str],
        document: bytes,
        deadline: float | None,
    ) -> Iterator[tuple[str, tuple[Answer, bytes] | Failure]]:
        requests = {
            client: self._message(
                kind, self._nodes[client], round_number, client, document, deadline
            )
            for client in clients
        }
        for client, message in self._exchange(requests, deadline):
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

    def _message(
        self,
        kind: str,
        node: int,
        round_number: int,
        client: str,
        document: bytes,
        deadline: float | None,
    ) -> Message:
        # Two records: Flower stores what is equal once, and the model is equal for all clients.
        # The time to live keeps a late client from working through the rounds that it missed.
        request = messages.write_request(self._tables, round_number, client)
        content = RecordDict(
            {
                MANIFEST: ConfigRecord({MANIFEST: request}),
                MODEL: ConfigRecord({MODEL: document}),
            }
        )
        return Message(content, node, kind, ttl=deadline, group_id=str(round_number))

    def _exchange(
        self, requests: dict[str, Message], deadline: float | None
    ) -> Iterator[tuple[str, Message | str]]:
        """Sends the requests; yields (key, reply), or (key, why there is none), as they come.

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
        pause = 0.01
        while waiting:
            self._alive()
            for message in self._grid.pull_messages(list(waiting)):
                if (found := waiting.pop(message.metadata.reply_to_message_id, None)) is not None:
                    pause = 0.01
                    yield found, message
            left = float("inf") if deadline is None else began + deadline - time.monotonic()
            if left <= 0:
                break
            if waiting:
                time.sleep(min(pause, left))
                pause = min(1.5 * pause, SLOWEST_POLL)
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
            requests = {str(n): self._message(HELLO, n, 0, "", b"", left) for n in fresh}
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
        return RunError(
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


def simulation(
    client_app: ClientApp, nodes: int
) -> tuple[Grid, Callable[[], None], Callable[[], None]]:
    """Starts Flower's own simulation: virtual nodes whose client app runs in Ray workers.

    Flower would have its ServerApp in command. Here the ServerApp hands out its grid and waits, so
    that the caller's round loop drives this federation as it does any other.

    Args:
        client_app: what the nodes run.
        nodes: how many; node i is given ``partition-id`` i.

    Returns:
        the grid; a function that raises where the simulation has ended; one that ends it.
    Raises:
        RunError: it does not start.
    """
    # In process, though Flower calls this entry legacy: `flwr run` needs a SuperLink, a FAB and
    # three processes for the same Ray workers, and cannot hand its grid to anyone.
    from flwr.simulation import run_simulation

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers may see the GPU
    flower_log = logging.getLogger("flwr")
    before, path = flower_log.level, os.environ.get("PYTHONPATH")
    flower_log.setLevel(logging.CRITICAL)
    server = ServerApp()
    opened: Queue[Grid | BaseException] = Queue()
    closing = threading.Event()
    ended: list[BaseException] = []

    @server.main()
    def lend(grid: Grid, context: Context) -> None:
        opened.put(grid)
        closing.wait()

    workers = max(1, min(os.cpu_count() or 1, nodes))
    backend: Any = {
        "client_resources": {"num_cpus": 1},
        "init_args": {
            "num_cpus": workers,
            "include_dashboard": False,
            "logging_level": "error",
            "log_to_driver": False,
        },
    }

    def run() -> None:
        try:
            run_simulation(server, client_app, nodes, backend_config=backend)
        except BaseException as error:  # handed to whoever waits for the grid or for a reply
            ended.append(error)
            closing.set()
            opened.put(error)

    thread = threading.Thread(target=run, name="flower-simulation")

    def alive() -> None:
        if not closing.is_set() and thread.is_alive():
            return
        why = f": {type(ended[0]).__name__}: {ended[0]}" if ended else ""
        raise RunError(f"Flower's simulation has ended{why}", fix="see Ray's logs")

    def end() -> None:
        closing.set()
        thread.join()
        flower_log.setLevel(before)
        if path is None:  # Flower's backend sets it for the workers
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = path

    thread.start()
    try:
        grid = opened.get()
        if isinstance(grid, BaseException):
            alive()
            raise RunError(f"Flower's simulation did not start: {grid}")
    except BaseException:
        end()
        raise
    return grid, alive, end


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A deployed run.

    Its run config holds ``run``, the resolved run file as JSON; ``sites``, how many to wait for, at
    most ``wait`` seconds; and ``resume``, the id of a run to go on with, or an empty string.
    """
    from umbel.server.serve import serve

    settings = context.run_config
    run = run_file.resolve(json.loads(str(settings["run"])), "run config")
    sites, wait = int(str(settings["sites"])), float(str(settings["wait"]))
    federation = GridFederation(grid, run, sites=sites, wait=wait)
    print(f"{sites} sites: {', '.join(federation.clients())}", flush=True)

    def on_round(record: RoundRecord) -> None:
        figures = " ".join(f"{n} {v:.4f}" for n, v in sorted(record.metrics.items()))
        lost = "".join(f"; {f.client} {f.reason}" for f in record.failures)
        print(
            f"round {record.round}/{run.run.rounds}: {len(record.participants)} clients, "
            f"{record.seconds:.1f} s {figures}{lost}",
            flush=True,
        )

    serve(
        run,
        federation,
        federation.info,
        engine="flower-deployment",
        resume=str(settings.get("resume", "")) or None,
        on_start=lambda run_id: print(f"run {run_id}", flush=True),
        on_round=on_round,
    )
