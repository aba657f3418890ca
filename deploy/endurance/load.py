"""Hundreds of sites on one server: most idle, some training, in processes that are not the server.

The idle ones, in a process of theirs, speak the protocol as a site does, over TLS connections of
their own each: a request for work that waits at the server, and a sign of life. Those that train
are whole sites, whose workers are threads of this process, because twenty copies of torch would
measure this machine's memory and not the server.
"""

from __future__ import annotations

import logging
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from umbel.client.flower.fleet import BEAT_SECONDS, Fleet, LostError
from umbel.client.flower.site import WAIT, Site
from umbel.client.flower.site_worker import make
from umbel.client.folder import SiteFolder
from umbel.core.errors import RunError
from umbel.core.run_file import resolve
from umbel.deploy.jobs import Job
from umbel.deploy.loopback import Site as Place
from umbel.deploy.network import SERVER, Network
from umbel.server.store import RunStore

LARGEST = 1 << 30
_one_at_a_time = threading.Lock()


class Loaded(NamedTuple):
    """What the server stood.

    Args:
        idle: sites that waited for work.
        training: sites that took part in a run.
        rounds: committed while the idle ones were there.
        round_seconds: median.
        polls: requests for work that were answered.
        poll_p99_ms: how late an empty answer came, beside the wait that was asked for.
        beats: signs of life that were answered.
        beat_p99_ms: how long one took.
        lost: requests that the server did not answer.
        faults: what was not as it must be; empty: nothing.
    """

    idle: int
    training: int
    rounds: int
    round_seconds: float
    polls: int
    poll_p99_ms: float
    beats: int
    beat_p99_ms: float
    lost: int
    faults: tuple[str, ...]


def load(
    folder: Path,
    idle: int,
    training: int,
    seconds: float,
    report: Callable[[str], None] = print,
) -> Loaded:
    """Runs a federation of ``training`` sites for ``seconds`` while ``idle`` more wait for work."""
    folder.mkdir(parents=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request is a load of its own
    trainers = [f"site-{number:02d}" for number in range(training)]
    places = [Place(name, _data(folder, name)) for name in trainers]
    places += [Place(f"idle-{number:03d}") for number in range(idle)]
    network = Network(folder, places)
    network.provision()
    report(f"{len(places)} sites have joined")
    network.start(SERVER)
    threads = [_site(network.sites[name]) for name in trainers]
    crowd = _Crowd()
    try:
        network.wait_for(lambda: len(network.online()) >= training, "the sites", 600)
        job = network.submit(_run(), training)
        network.wait_for(lambda: _begun(network, job), "the first round", 600)
        crowd.start([network.sites[place.client].path for place in places[training:]])
        network.wait_for(lambda: len(network.online()) >= len(places), "the idle ones", 600)
        before = network.job(job).round
        report(f"{idle} idle sites are there, at round {before}")
        time.sleep(seconds)
        online = len(network.online())
        after = network.job(job).round
        if network.job(job).state == "running":  # all rounds may be done
            network.umbel("stop", job.id, "--folder", str(network.server.path))
        done = network.finish(job, 300)
        return _loaded(network, crowd.end(), idle, training, done, before, after, online)
    finally:
        crowd.kill()
        network.stop()
        del threads  # daemons: their server is gone


def _begun(network: Network, job: Job) -> bool:
    now = network.job(job)
    if now.state == "failed":
        raise RunError(f"the run failed: {now.error}", where=str(network.folder))
    return now.round >= 1


def _loaded(
    network: Network,
    waited: _Waited,
    idle: int,
    training: int,
    job: Job,
    before: int,
    after: int,
    online: int,
) -> Loaded:
    store = RunStore(network.server.store)
    history = store.history(job.run_id)
    store.close()
    faults = []
    if online < idle + training:
        faults.append(f"{online} of {idle + training} sites were online at the end")
    if [record.round for record in history] != list(range(1, len(history) + 1)):
        faults.append("rounds have gaps")
    for record in history:
        faults += [f"round {record.round}: {f.client} {f.reason}" for f in record.failures]
    if after <= before:
        faults.append("no round was committed")
    return Loaded(
        idle,
        training,
        after - before,
        round(statistics.median(r.seconds for r in history[before:] or history), 3),
        len(waited.polls),
        _p99(waited.polls),
        len(waited.beats),
        _p99(waited.beats),
        waited.lost,
        tuple(faults),
    )


def _p99(seconds: list[float]) -> float:
    return round(1000 * float(np.quantile(seconds, 0.99)), 1) if seconds else float("nan")


class _Waited(NamedTuple):
    """What idle sites saw: how late empty answers came, how long beats took, and what was lost."""

    polls: list[float]
    beats: list[float]
    lost: int


class _Crowd:
    """Idle sites, in a process of their own."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ended = context.Event()
        self._found: Any = context.Queue()
        self._make = partial(context.Process, daemon=True, target=_wait_for_work)
        self._process: multiprocessing.process.BaseProcess | None = None

    def start(self, folders: list[Path]) -> None:
        """Begins."""
        self._process = self._make(args=(folders, self._ended, self._found))
        self._process.start()

    def end(self) -> _Waited:
        """Ends, with what they saw."""
        self._ended.set()
        found = _Waited(*self._found.get(timeout=60))
        self.kill()
        return found

    def kill(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _wait_for_work(folders: list[Path], ended: Any, found: Any) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stop = threading.Event()
    crowd = [_Idle(SiteFolder(folder), stop) for folder in folders]
    for one in crowd:
        one.start()
    ended.wait()
    stop.set()
    polls = [late for one in crowd for late in one.polls]
    beats = [took for one in crowd for took in one.beats]
    found.put((polls, beats, sum(one.lost for one in crowd)))


class _Idle:
    """A site without work: one thread waits for some, another gives signs of life."""

    def __init__(self, folder: SiteFolder, stop: threading.Event) -> None:
        self.polls: list[float] = []
        self.beats: list[float] = []
        self.lost = 0
        self._stop = stop
        kit = folder.kit()
        key = folder.node_key.read_bytes()
        self._fleets = [Fleet(kit.server, kit.authority, key, kit.node_id) for _ in range(2)]

    def start(self) -> None:
        """Begins."""
        for work in (self._poll, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def _poll(self) -> None:
        while not self._stop.is_set():
            asked = time.monotonic()
            if self._answered(lambda: self._fleets[0].take(WAIT, None, LARGEST)):
                self.polls.append(max(0.0, time.monotonic() - asked - WAIT))

    def _beat(self) -> None:
        while not self._stop.is_set():
            asked = time.monotonic()
            if self._answered(self._fleets[1].beat):
                self.beats.append(time.monotonic() - asked)
            self._stop.wait(BEAT_SECONDS)

    def _answered(self, call: Callable[[], object]) -> bool:
        try:
            call()
        except LostError:
            if not self._stop.is_set():
                self.lost += 1
                time.sleep(1.0)
            return False
        return True


class _Inline:
    """A site's worker in this process; one works at a time."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._answer: Callable[[bytes], bytes] | None = None

    def warm(self) -> None:
        """Loads what is needed."""
        with _one_at_a_time:
            self._answer = self._answer or make(self._settings)

    def answer(self, document: bytes, seconds: float | None) -> bytes:
        """Does the work."""
        self.warm()
        assert self._answer is not None
        with _one_at_a_time:
            return self._answer(document)

    def stop(self) -> None:
        """Nothing to do."""


def _site(folder: SiteFolder) -> threading.Thread:
    site = Site(folder, lambda line: None, _Inline)
    thread = threading.Thread(target=site.run, daemon=True)
    thread.start()
    return thread


def _data(folder: Path, name: str) -> Path:
    generator = np.random.default_rng(sum(name.encode()))
    x = generator.normal(size=(40, 10)).astype(np.float32)
    path = folder / f"{name}.npz"
    np.savez(path, x=x, y=(x[:, 0] > 0).astype(np.int64), client=np.repeat([name], len(x)))
    return path


def _run() -> Any:
    return resolve(
        {
            "run": {"name": "load", "rounds": 1000},
            "data": {"name": "npz", "classes": 2, "holdout": 0.0, "client_holdout": 0.0},
            "task": {"kind": "classification", "model": "logistic"},
            "client": {"batch_size": "full", "lr": 0.1, "device": "cpu"},
            "evaluate": {"every": 0},
        }
    )
