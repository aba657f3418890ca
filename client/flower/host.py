"""Processes that run another project's Flower ``ClientApp``, for as many nodes as there are.

A template loads the app once and then splits off workers: whatever the app imports is read once,
and a worker that died is replaced in milliseconds. Each worker takes a message at a time from the
socket that it was given, and ends with it; the template ends with its own, and its workers too.

    python -m umbel.client.flower.host template FD      # or worker FD, settings in the environment
"""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import random
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import ClientAppException, LoadClientAppError
from flwr.common.constant import ErrorCode
from flwr.supercore.object_ref import load_app
from flwr.supercore.task_identity import TaskIdentity

from umbel.client.flower import quick_arrays
from umbel.core.places import place_in

log = logging.getLogger("flwr")

SETTINGS = "UMBEL_FLOWER_HOST"
"""The environment variable that holds :class:`Settings` as JSON."""

START, END = b"start", b"end"
"""What a template is asked: to start a worker, to end one and say how it ended."""


class Settings(NamedTuple):
    """What a host runs.

    Args:
        folder: of the app; goes to the front of ``sys.path``.
        reference: ``module:attribute`` of the ClientApp.
        run_config: what every node's context holds.
    """

    folder: str
    reference: str
    run_config: dict[str, bool | int | float | str]

    def load(self) -> ClientApp:
        """The ClientApp.

        Raises:
            LoadClientAppError: there is none at the reference.
        """
        found = load_app(self.reference, LoadClientAppError, self.folder)
        if not isinstance(found, ClientApp):
            kind = type(found).__name__
            raise LoadClientAppError(f"{self.reference} is a {kind}, not a ClientApp")
        return found


class Request(NamedTuple):
    """A message on its way to a node, apart from its content.

    Args:
        metadata: Flower's.
        node_config: the node's.
        context: the node's context as its last message left it, pickled; empty: a fresh one.
    """

    metadata: Any
    node_config: dict[str, Any]
    context: bytes


def answer(app: ClientApp, settings: Settings, head: bytes, content: bytes) -> tuple[bytes, bytes]:
    """Runs the app on one message.

    An exception of the app is a reply with Flower's error code and the exception's text, as in
    Flower's simulation; its traceback goes to the log. The context is then as it was before.

    Args:
        app: the ClientApp.
        settings: what the app was loaded by.
        head: a pickled :class:`Request`.
        content: the message's pickled content.

    Returns:
        the pickled reply, the node's pickled context (empty: as fresh).
    """
    request = Request(*pickle.loads(head))
    metadata, node_config = request.metadata, request.node_config
    delivered = metadata.delivered_at
    message = make_message(metadata, pickle.loads(content))
    message.metadata.delivered_at = delivered  # which the constructor cleared
    TaskIdentity.task_id, TaskIdentity.run_id = metadata.src_task_id, metadata.run_id
    TaskIdentity.node_id = metadata.dst_node_id
    if request.context:
        context: Context = pickle.loads(request.context)
    else:
        node, config = metadata.dst_node_id, dict(settings.run_config)
        context = Context(metadata.run_id, node, dict(node_config), RecordDict(), config)
    try:
        reply = _call(app, message, context)
        if context.run_config != settings.run_config:
            raise ValueError("the run_config of a Context cannot be modified")
        if not isinstance(reply, Message):
            raise TypeError(f"the ClientApp returned {type(reply).__name__}, not a Message")
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        return pickle.dumps(reply, protocol=5), _context(context, node_config)
    except Exception as error:
        shown = traceback.format_exception(error.__cause__ or error)
        log.error("ClientApp, node %d: %s", metadata.dst_node_id, "".join(shown).rstrip())
        raised = isinstance(error, ClientAppException)
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION if raised else ErrorCode.UNKNOWN
        failed = Message(Error(code, f"{type(error)}:<'{error}'>"), reply_to=message)
        failed.metadata.__dict__["_message_id"] = str(uuid4())
        return pickle.dumps(failed, protocol=5), request.context


def _call(app: ClientApp, message: Message, context: Context) -> Any:
    try:
        return app(message=message, context=context)
    except (Exception, SystemExit) as error:  # sys.exit() in an app must not end a worker
        raise ClientAppException(str(error)) from error


def _context(context: Context, node_config: dict[str, Any]) -> bytes:
    fresh = not context.state and context.node_config == node_config
    return b"" if fresh else pickle.dumps(context, protocol=5)


def work(line: Connection, app: ClientApp, settings: Settings) -> None:
    """Answers one message after the other; ends this process when the line is hung up.

    A message is two frames, its head and its content; no content says: the last one's again. So is
    an answer: the reply and the node's context.
    """
    quick_arrays.quicken()
    threading.Thread(target=_watch, args=(line.fileno(),), daemon=True).start()
    content = b""
    with suppress(ConnectionError, EOFError):
        while True:
            head, sent = line.recv_bytes(), line.recv_bytes()
            content = sent or content
            for frame in answer(app, settings, head, content):
                line.send_bytes(frame)
            sys.stdout.flush()


def _watch(handle: int) -> None:
    """Ends this process when its line is hung up, however long the app is busy."""
    hung_up = select.poll()
    hung_up.register(handle, 0)  # that is always told; what there is to read wakes nobody here
    hung_up.poll()
    _leave(0)


def template(line: Connection, settings: Settings) -> None:
    """Loads the app, says so, and then starts and ends workers until the line is hung up."""
    loaded = _random_state()
    try:
        app = settings.load()
    except (Exception, SystemExit) as error:
        told = {
            "error": f"{type(error).__name__}: {error}".splitlines()[0],
            "where": place_in(Path(settings.folder), error),
            "missing": (error.name or "") if isinstance(error, ModuleNotFoundError) else "",
        }
        line.send_bytes(json.dumps(told).encode())
        return
    if "torch" in sys.modules:
        import torch._dynamo  # noqa: F401  # seconds, which each worker's first optimizer would take
    reseed, splits = loaded(), _single_threaded()
    gc.freeze()  # what is here stays: forks share its memory
    line.send_bytes(b"{}")
    workers: set[int] = set()
    try:
        while True:
            asked, _, number = line.recv_bytes().partition(b" ")
            if asked == END:
                pid = int(number)
                workers.discard(pid)
                line.send_bytes(b"%d" % _end(pid))
                continue
            handle = reduction.recv_handle(line)
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                line.close()
                _worker(handle, app, settings, reseed if splits else None)
            os.close(handle)
            workers.add(pid)
            line.send_bytes(b"%d" % pid)
    except (EOFError, ConnectionError):
        return
    finally:
        for pid in workers:
            _end(pid)


def _worker(
    handle: int, app: ClientApp, settings: Settings, reseed: Callable[[], None] | None
) -> None:
    """What a fork of the template does; never returns.

    It goes on as it is where that is safe, and as a fresh interpreter elsewhere: ``reseed`` is
    ``None``, or the app opened a CUDA device on import.
    """
    try:
        torch = sys.modules.get("torch")
        if reseed is None or (torch is not None and torch.cuda._is_in_bad_fork()):
            os.set_inheritable(handle, True)
            module = "umbel.client.flower.host"
            arguments = [sys.executable, "-P", "-m", module, "worker", str(handle)]
            os.execv(sys.executable, arguments)
        reseed()
        work(Connection(handle), app, settings)
        _leave(0)
    except BaseException:
        traceback.print_exc()
        _leave(1)


def _single_threaded() -> bool:
    """Whether a fork of this process has all of its threads; no where there is no /proc to ask.

    Native libraries (OpenMP, gRPC, JAX, TensorFlow) start threads, and in a fork wait for ever.
    """
    threads = Path("/proc/self/task")
    return threads.is_dir() and len(list(threads.iterdir())) == 1


def _random_state() -> Callable[[], Callable[[], None]]:
    """Sees to it that forks draw the random numbers that fresh processes would.

    Call the first result when the app is loaded, the second one in each fork. A process that
    imports an app has seeds from the system, except where the app sets its own on the way; torch's
    default is the same in all processes.
    """
    before = random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002

    def loaded() -> Callable[[], None]:
        after = random.getstate(), np.random.get_state()  # noqa: NPY002

        def forked() -> None:
            if after[0] != before[0]:
                random.setstate(after[0])  # os.fork gave it a new seed
            if pickle.dumps(after[1]) == before[1]:
                np.random.seed()  # noqa: NPY002

        return forked

    return loaded


def _end(pid: int) -> int:
    """Ends a process if it still runs; its exit code, negative: the signal that it died of."""
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # whoever read it is gone
            continue
    os._exit(code)


def main() -> None:
    """The entry point: ``template FD`` or ``worker FD``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever holds the other end decides
    role, handle = sys.argv[1], int(sys.argv[2])
    settings = Settings(**json.loads(os.environ[SETTINGS]))
    line = Connection(handle)
    if role == "template":
        template(line, settings)
    else:
        work(line, settings.load(), settings)
    _leave(0)


if __name__ == "__main__":
    main()
