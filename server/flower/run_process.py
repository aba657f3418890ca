"""The process that carries out one run of a server's queue: ``python -m`` this module.

It is told its run, and later orders, on standard input, one JSON object a line, and says what
happens on standard output in the same way. It ends when the process that started it ends. The run's
record is in the store; who kills it loses the round under way.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from umbel.core import run_file, signing
from umbel.core.errors import NotNowError, RefusedError, UmbelError
from umbel.core.run_file import RunFile
from umbel.server.records import RoundRecord

PAUSE, STOP = "pause", "stop"


class Settings(NamedTuple):
    """What the process is told.

    Args:
        database: the link state's file.
        manifest_key: file of the key that seals requests.
        job: what the queue calls the run.
        run: the run file's tables; ``[run] store`` names the server's store.
        text: the run file as the user wrote it; empty: not known.
        resume: id of the run in the store; empty: a new one.
        peers: node id (text) -> (site's name, identity key in hexadecimal digits).
        sites: whom the run waits for: all of ``peers`` where it is 0.
        wait: seconds to wait for them.
    """

    database: str
    manifest_key: str
    job: str
    run: dict[str, Any]
    text: str
    resume: str
    peers: dict[str, tuple[str, str]]
    sites: int
    wait: float


class Orders:
    """What was ordered since the start; read in a thread of its own."""

    def __init__(self) -> None:
        self.pause = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            if line.strip() == PAUSE:
                self.pause.set()
        os._exit(1)  # whoever gave the orders is gone


def say(event: str, **facts: Any) -> None:
    """Tells the server what happened."""
    sys.stdout.write(json.dumps({"event": event, "time": time.time(), **facts}) + "\n")
    sys.stdout.flush()


def carry_out(settings: Settings, orders: Orders) -> str:
    """Runs the run, to its end or until it is paused; how it ended.

    Raises:
        UmbelError: what ended it.
    """
    from umbel.server.flower.grid import GridFederation
    from umbel.server.flower.link import Heard, LinkGrid, Peer, open_factory, running
    from umbel.server.flower.secure_grid import secured
    from umbel.server.index import Dispatch
    from umbel.server.serve import serve
    from umbel.server.store import RunStore

    run = run_file.resolve(settings.run, "run")
    peers = {
        int(node): Peer(name, bytes.fromhex(key)) for node, (name, key) in settings.peers.items()
    }
    state = open_factory(Path(settings.database)).state()
    key = signing.read_key(Path(settings.manifest_key))

    def refused(site: str, text: str) -> None:
        say("refused", site=site, text=text)

    asked: dict[tuple[int, str], Dispatch] = {}

    def heard(answer: Heard) -> None:
        if answer.versions:
            told = {"versions": dict(answer.versions), "hardware": dict(answer.hardware)}
            say("site", site=answer.site, told=told)
        if answer.group.isdigit() and int(answer.group):
            key = int(answer.group), answer.site
            first = asked.get(key, Dispatch(*key, answer.sent, None, 0, 0))
            down, up = first.bytes_down + answer.bytes_down, first.bytes_up + answer.bytes_up
            asked[key] = first._replace(done=answer.done, bytes_down=down, bytes_up=up)

    def on_round(record: RoundRecord) -> None:
        store.keep_dispatches(started[0], list(asked.values()))
        asked.clear()
        say("round", round=record.round, of=run.run.rounds, record=record.as_json())
        if orders.pause.is_set() and record.round < run.run.rounds:
            raise KeyboardInterrupt

    started: list[str] = []
    with running(state) as link, closing(RunStore(run.run.store)) as store:
        grid = LinkGrid(state, link, settings.job, key, peers, refused, heard)
        sites = settings.sites or len(peers)
        inner = GridFederation(grid, run, sites=sites, wait=settings.wait)
        federation = secured(inner, {peer.name: peer.identity for peer in peers.values()})
        say("sites", names=list(federation.clients()))

        def on_start(run_id: str) -> None:
            started.append(run_id)
            say("started", run_id=run_id, round=store.get(run_id).rounds_done)

        try:
            serve(
                federation.run,
                federation,
                federation.info,
                engine="deployment",
                resume=settings.resume or None,
                text=settings.text or None,
                on_start=on_start,
                on_round=on_round,
            )
        except KeyboardInterrupt:
            return "paused"
        except RefusedError:
            if not started or _status(run, started[0]) != "budget_exhausted":
                raise
    return _status(run, started[0])


def _status(run: RunFile, run_id: str) -> str:
    from umbel.server.store import RunStore

    store = RunStore(run.run.store)
    try:
        return store.get(run_id).status
    finally:
        store.close()


def main() -> int:
    """The entry point."""
    # A server that a script started with `&` passes on that SIGINT is to be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("flwr").setLevel(logging.ERROR)
    settings = Settings(**json.loads(sys.stdin.readline()))
    orders = Orders()
    try:
        say("ended", status=carry_out(settings, orders))
    except UmbelError as error:
        later = isinstance(error, NotNowError)
        say("ended", status="failed", error=str(error), exit_code=error.exit_code, later=later)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
