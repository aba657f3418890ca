"""A site's worker: a child process that keeps torch, data and model warm between rounds.

The parent faces the network and never opens the data; the child opens the data and faces nobody but
its parent: gRPC over a unix socket in a folder of their own. A document goes over in pieces, so
that its size has no bound but memory. A child that dies, or is too slow, is replaced; it ends by
itself when its parent does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from umbel.core.errors import RunError

SERVICE = "umbel.site.Worker"
PIECE = 1 << 20
START_SECONDS = 600.0
"""How long a child may take to import what it needs, on a small or busy machine."""


class WorkerDiedError(Exception):
    """The child ended, or did not answer in time; the next request has a fresh one."""


class Worker:
    """The parent's handle on its child; used by one thread.

    Args:
        command: starts the child; it is given the socket's path as its last argument.
        settings: what the child is told at the start, over its standard input.
        log: what the child says goes here.
        environment: of the child, beside the parent's.
    """

    def __init__(
        self,
        command: Sequence[str],
        settings: dict[str, Any],
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._command = list(command)
        self._settings = settings
        self._log = log
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None
        self._folder: Path | None = None

    def warm(self) -> None:
        """Starts the child where there is none, and waits until it is ready.

        Raises:
            RunError: it does not start; its log says why.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        # Unix sockets have short names, so not in the site's own folder.
        self._folder = Path(tempfile.mkdtemp(prefix="umbel-"))
        address = self._folder / "worker"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, str(address)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(self._settings).encode() + b"\n")
            self._process.stdin.flush()
        self._channel = grpc.insecure_channel(f"unix:{address}", options=_options())
        until = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None:
                code = self._process.returncode
                self.stop()
                raise RunError(
                    f"the worker ended at its start, with status {code}",
                    where=str(self._log),
                    fix="see its last lines; `umbel site doctor`",
                )
            try:
                self._ready()
                return
            except grpc.RpcError:
                if time.monotonic() > until:
                    self.stop()
                    raise RunError(
                        f"the worker did not start in {START_SECONDS:g} s", where=str(self._log)
                    ) from None
                time.sleep(0.05)

    def answer(self, document: bytes, seconds: float | None) -> bytes:
        """What the child makes of ``document``.

        Args:
            document: the request.
            seconds: after which the child is ended; ``None``: it may take its time.
        Raises:
            WorkerDiedError: it died, or its time was up.
            RunError: it cannot be started.
        """
        self.warm()
        assert self._channel is not None
        call = self._channel.stream_stream(f"/{SERVICE}/Answer")
        try:
            return b"".join(call(_pieces(document), timeout=seconds))
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            self.stop()
            raise WorkerDiedError(str(code)) from None

    def stop(self) -> None:
        """Ends the child."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process, self._channel, self._folder = None, None, None

    @property
    def pid(self) -> int | None:
        """Of the child, while there is one."""
        return None if self._process is None else self._process.pid

    def _ready(self) -> None:
        assert self._channel is not None
        self._channel.unary_unary(f"/{SERVICE}/Ready")(b"", timeout=5.0)


def serve(make: Callable[[dict[str, Any]], Callable[[bytes], bytes]]) -> None:
    """The child's whole life: reads its settings, answers one document after the other.

    Args:
        make: what is read from standard input -> what answers. It is called before the child says
            that it is ready, so that imports are done by then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    address = sys.argv[-1]
    settings = json.loads(sys.stdin.buffer.readline() or b"{}")
    threading.Thread(target=_until_the_parent_ends, daemon=True).start()
    answer = make(settings)

    def answered(pieces: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from _pieces(answer(b"".join(pieces)))

    # One thread that computes, one that says that it is there.
    server = grpc.server(ThreadPoolExecutor(max_workers=2), options=_options())
    handlers = {
        "Answer": grpc.stream_stream_rpc_method_handler(answered),
        "Ready": grpc.unary_unary_rpc_method_handler(lambda request, context: b""),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    os.umask(0o077)
    server.add_insecure_port(f"unix:{address}")
    server.start()
    server.wait_for_termination()


def _until_the_parent_ends() -> None:
    while sys.stdin.buffer.read(1):
        continue
    os._exit(0)


def _pieces(document: bytes) -> Iterator[bytes]:
    for start in range(0, len(document), PIECE):
        yield document[start : start + PIECE]


def _options() -> list[tuple[str, int]]:
    largest = 2 * PIECE
    return [("grpc.max_receive_message_length", largest), ("grpc.max_send_message_length", largest)]
