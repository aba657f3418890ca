"""Worker processes for another project's Flower ``ClientApp``, and the threads that feed them.

A template process loads the app and splits off workers (see ``umbel.client.flower.host``). A thread
for each worker takes the next work, sends it, and sleeps until the answer is there: nothing polls.
Whatever happens to this process, its workers notice that their lines are hung up, and end.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from signal import Signals
from types import TracebackType
from typing import NamedTuple

from umbel.client.flower.host import END, SETTINGS, START, Settings
from umbel.core.errors import RunError
from umbel.server.flower.local_grid import Died, Work
from umbel.server.flower.run_app import LoadFailure

PATIENCE = 5.0
"""Seconds that the template has for ending its workers."""
AHEAD = 32768
"""Bytes that a line holds while nobody reads: more is not sent to a worker that may itself send."""


class Worker(NamedTuple):
    """A process and the line to it."""

    pid: int
    line: Connection


class Pool:
    """Workers that are up between ``with`` and its end.

    Args:
        settings: the ClientApp and how to load it.
        processes: how many workers.
        on_failure: is called, on another thread, where no worker can be had any more.

    Raises:
        RunError: this system cannot pass sockets between processes.
    """

    def __init__(
        self, settings: Settings, processes: int, on_failure: Callable[[Exception], None]
    ) -> None:
        if not hasattr(socket, "AF_UNIX") or not hasattr(os, "fork"):
            raise RunError("needs Linux or macOS", where="umbel flower", fix="use WSL 2")
        self._settings = settings
        self._processes = processes
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._ready: deque[Work] = deque()
        self._waiting: dict[int, deque[Work]] = {}
        self._closed = False
        self._asking = threading.Lock()
        self._workers: list[Worker | None] = [None] * processes
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Pool:
        here, there = socket.socketpair()
        self._template = self._launch(there)
        there.close()
        self._control = Connection(here.detach())
        return self

    def _launch(self, line: socket.socket) -> subprocess.Popen[bytes]:
        environment = {**os.environ, SETTINGS: json.dumps(self._settings._asdict())}
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        # Its own threads for each worker, as Ray does it: more would fight for the cores.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self._processes)))
        # torch asks the driver by a way that leaves CUDA to the forks.
        environment.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        handle = line.fileno()
        module = "umbel.client.flower.host"
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, "template", str(handle)],
            pass_fds=[handle],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=2 if sys.stdout is sys.stderr else None,
            start_new_session=True,  # Ctrl-C is this process's to handle
        )

    def start(self) -> None:
        """Waits until the app is loaded, and starts the workers.

        Raises:
            InputError: the app cannot be loaded; with the place.
            RunError: the template process ended.
        """
        try:
            told = json.loads(self._control.recv_bytes())
        except (EOFError, ConnectionError):
            code = self._template.wait()
            message = f"the process that loads the ClientApp ended {_how(code)}"
            raise RunError(message, where=self._settings.reference, fix="see above") from None
        if told:
            raise LoadFailure("clientapp", self._settings.reference, **told).as_error()
        for place in range(self._processes):
            self._workers[place] = self._start()
            thread = threading.Thread(target=self._feed, args=(place,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def submit(self, work: Work) -> None:
        """Queues a work behind all others, and behind those of its own node."""
        with self._changed:
            if work.node in self._waiting:
                self._waiting[work.node].append(work)
            else:
                self._waiting[work.node] = deque()
                self._ready.append(work)
                self._changed.notify()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        up = [worker for worker in self._workers if worker is not None]
        for worker in up:  # so that each end stops reading: the worker, and the thread here
            with suppress(OSError), socket.socket(fileno=os.dup(worker.line.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)
        self._control.close()  # the template ends the workers, and then itself
        try:
            self._template.wait(PATIENCE)
        except subprocess.TimeoutExpired:  # it is still loading the app, or worse
            self._template.kill()
            self._template.wait()
        for thread in self._threads:
            thread.join()
        for worker in up:
            worker.line.close()

    def _feed(self, place: int) -> None:
        """A worker's thread: sends it work, one ahead of what it does, and awaits its answers."""
        sent: deque[Work] = deque()
        last = b""
        try:
            while True:
                if (work := self._take(ahead=len(sent))) is None:
                    if not sent:
                        return
                    last = last if self._answered(place, sent) else b""
                    continue
                head = work.head()
                if head is None:
                    self._finish(work, None)
                    continue
                size = len(head) + (0 if work.content is last else len(work.content))
                if sent and size > AHEAD:
                    last = last if self._answered(place, sent) else b""
                worker = self._workers[place] or self._start()
                self._workers[place] = worker
                sent.append(work)
                with suppress(OSError):  # it died: the answer will not come either
                    worker.line.send_bytes(head)
                    worker.line.send_bytes(b"" if work.content is last else work.content)
                    last = work.content
        except BaseException as error:  # else whoever waits for a reply would wait for ever
            if not self._closed:
                self._on_failure(RunError(f"no more workers: {error}", where="umbel flower"))

    def _answered(self, place: int, sent: deque[Work]) -> bool:
        """Awaits the answer to the first of what was sent; false: the worker died instead."""
        worker = self._workers[place]
        assert worker is not None
        try:
            answer = worker.line.recv_bytes(), worker.line.recv_bytes()
        except (EOFError, OSError):
            self._workers[place] = None
            self._finish(sent.popleft(), self._bury(worker))
            self._again(sent)
            return False
        self._finish(sent.popleft(), answer)
        return True

    def _take(self, ahead: int) -> Work | None:
        """The next work; ``None``: there is none to be had, or not now.

        Work ahead of an answer keeps a worker from waiting for its next message. It is taken only
        while there is enough for all, so that no worker idles at the end of a round.
        """
        with self._changed:
            if ahead:
                enough = ahead == 1 and len(self._ready) > self._processes
                return self._ready.popleft() if enough and not self._closed else None
            self._changed.wait_for(lambda: self._ready or self._closed)
            return None if self._closed else self._ready.popleft()

    def _finish(self, work: Work, answer: tuple[bytes, bytes] | Died | None) -> None:
        work.done(answer)
        with self._changed:
            if following := self._waiting[work.node]:
                self._ready.append(following.popleft())
                self._changed.notify()
            else:
                del self._waiting[work.node]

    def _again(self, works: deque[Work]) -> None:
        """Puts work back that a worker had not begun when it died."""
        with self._changed:
            while works:
                self._ready.appendleft(works.pop())
                self._changed.notify()

    def _start(self) -> Worker:
        here, there = socket.socketpair()
        for end in (here, there):  # room for AHEAD and the framing, on every system
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * AHEAD)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * AHEAD)
        with self._asking, here, there:
            self._control.send_bytes(START)
            reduction.send_handle(self._control, there.fileno(), self._template.pid)
            pid = int(self._control.recv_bytes())
            return Worker(pid, Connection(here.detach()))

    def _bury(self, worker: Worker) -> Died:
        worker.line.close()
        with self._asking:
            self._control.send_bytes(b"%s %d" % (END, worker.pid))
            code = int(self._control.recv_bytes())
        return Died(f"the process that ran the ClientApp ended {_how(code)}")


def _how(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    with suppress(ValueError):
        return f"by signal {-code} ({Signals(-code).name})"
    return f"by signal {-code}"
