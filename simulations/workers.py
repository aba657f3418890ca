"""Worker processes that live for a run, hold its data once, and are replaced when they die."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from umbel.core.errors import RunError
from umbel.simulations.arena import Arena

Work = Callable[[Any, Any], Any]
"""(what all tasks of a round share, a task) -> its result."""

DEATHS = 2
"""A task that this many workers died of is not tried again."""

IDLE_DEATHS = 100
"""A run in which more workers died with nothing to do is ended: something kills them all."""

_ROUND = 0  # the part of the arena that a round's shared value is in; results are in the others


def available() -> bool:
    """Whether workers can be had: by forking, in a process whose torch has no threads of a GPU.

    Forked, they find the data where the parent has read them: no second copy, no pickling of a
    user's model. Where torch knows an accelerator, its autograd runs threads that no fork survives.
    """
    return sys.platform == "linux" and not torch.accelerator.is_available()


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@dataclass
class _Worker:
    """A process, the line to it, the round that it knows of, and the task it is at."""

    process: BaseProcess
    line: connection.Connection
    round: int = 0
    task: int | None = None


class Workers:
    """Forked processes that compute ``work`` on one thread each.

    What passes: a round's shared value once, through shared memory, for all; and the result of a
    task the same way, with its other values in one small message. The result of :meth:`map` does
    not depend on how many workers there are, nor on their deaths.

    They end with :meth:`close`, and with this process however it ends: each watches a pipe that
    nobody ever writes to.

    Args:
        work: a function of its arguments alone.
        count: how many.
        shared: bytes of tensors in a round's shared value.
        result: bytes of tensors in a task's result.
        announce: told once when a worker died.
    """

    def __init__(
        self, work: Work, count: int, shared: int, result: int, announce: Callable[[str], None]
    ) -> None:
        self._work = work
        self._announce = announce
        self._died = False
        self._idle_deaths = 0
        # As many results may wait for an earlier one as there are workers, twice over.
        self._slots = 2 * count
        self._arena = Arena(1 + self._slots, max(shared, result))
        self._round, self._rest = 0, b""
        self._watched, self._life = os.pipe()
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    def pids(self) -> list[int]:
        """The process ids."""
        return [w.process.pid for w in self._workers if w.process.pid is not None]

    def map(self, shared: Any, tasks: Sequence[Any], costs: Sequence[float]) -> Iterator[Any]:
        """The results of ``tasks``, in their order; the tensors of one are valid until the next.

        The most costly task is begun first, as far as there is room for results that wait.

        Args:
            shared: what all tasks share; it may hold tensors anywhere.
            tasks: picklable.
            costs: of each, in any unit.

        Raises:
            RunError: two workers died of one task, or one could not be started.
            Exception: what ``work`` raised, with the worker's traceback as a note.
        """
        self._drain()
        self._round += 1
        self._rest = self._arena.write(_ROUND, shared)
        waiting = set(range(len(tasks)))
        deaths: Counter[int] = Counter()
        done: dict[int, bytes] = {}
        for wanted in range(len(tasks)):
            while wanted not in done:
                self._hand_out(tasks, costs, waiting, wanted)
                for worker, task, answer in self._answers():
                    if answer is None:
                        deaths[task] += 1
                        self._replace(worker, deaths[task] == DEATHS)
                        waiting.add(task)
                    else:
                        done[task] = answer
            yield self._open(done.pop(wanted))

    def close(self) -> None:
        """Ends the workers, at once: they hold nothing that is missed."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.process.close()
            worker.line.close()
        self._workers = []
        for end in (self._watched, self._life):
            if end >= 0:
                os.close(end)
        self._watched = self._life = -1

    def _hand_out(
        self, tasks: Sequence[Any], costs: Sequence[float], waiting: set[int], wanted: int
    ) -> None:
        """Gives each idle worker a task whose result there will be room for, if there is one."""
        for worker in [w for w in self._workers if w.task is None]:
            near = [t for t in waiting if t < wanted + self._slots]
            if not near:
                return
            task = max(near, key=lambda t: (costs[t], -t))
            rest = self._rest if worker.round < self._round else b""
            message = (self._round, rest, 1 + task % self._slots, tasks[task])
            try:
                worker.line.send_bytes(pickle.dumps(message))
            except OSError:  # it died while it had nothing to do
                self._idle_deaths += 1
                self._replace(worker, self._idle_deaths > IDLE_DEATHS)
                continue
            worker.round, worker.task = self._round, task
            waiting.discard(task)

    def _answers(self) -> list[tuple[_Worker, int, bytes | None]]:
        """What busy workers have sent, with its task; ``None``: that one died."""
        busy = {w.line: (w, w.task) for w in self._workers if w.task is not None}
        found: list[tuple[_Worker, int, bytes | None]] = []
        for line in connection.wait(list(busy)) if busy else ():
            assert isinstance(line, connection.Connection)
            worker, task = busy[line]
            worker.task = None
            try:
                found.append((worker, task, line.recv_bytes()))
            except (EOFError, OSError):
                found.append((worker, task, None))
        return found

    def _open(self, answer: bytes) -> Any:
        value, error, trace = self._arena.read(answer)
        if error is None:
            return value
        try:
            raised = pickle.loads(error)
        except Exception:
            raised = RuntimeError(trace.splitlines()[-1])
        raised.add_note(f"in a worker process:\n{trace}")
        raise raised

    def _drain(self) -> None:
        """Waits for what an interrupted round left behind: it reads the shared value."""
        while found := self._answers():
            for worker, _, answer in found:
                if answer is None:
                    self._replace(worker, False)

    def _replace(self, dead: _Worker, give_up: bool) -> None:
        self._workers.remove(dead)
        dead.process.join()
        code = dead.process.exitcode or 0
        dead.process.close()
        dead.line.close()
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        if give_up:
            raise RunError(
                f"worker processes die again and again, the last one {how}",
                where="worker processes",
                fix="if memory ran out, set [run] processes lower, or [client] batch_size; "
                "processes = 0 trains in this process",
            )
        if not self._died:
            self._died = True
            self._announce(f"a worker process died ({how}); it is replaced and its work redone")
        self._workers.append(self._start())

    def _start(self) -> _Worker:
        here, there = multiprocessing.Pipe()
        others = [self._life, here.fileno(), *(w.line.fileno() for w in self._workers)]
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(self._work, self._arena, there, self._watched, others), daemon=True
        )
        # A signal that came to a worker before it has handlers of its own would be taken for ours.
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with warnings.catch_warnings():
                # Of torch's threads, which a worker does not use: it computes on one.
                warnings.filterwarnings("ignore", message=".*multi-threaded", module=".*popen_fork")
                process.start()
        except OSError as error:
            here.close()
            raise RunError(
                f"a worker process cannot be started: {error.strerror}",
                where="worker processes",
                fix="set [run] processes = 0, or raise the limit on processes",
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            there.close()
        return _Worker(process, here)


def _serve(
    work: Work, arena: Arena, line: connection.Connection, watched: int, others: Sequence[int]
) -> None:
    """The life of a worker. It never returns: what the parent has to do at its end is not done."""
    try:
        for descriptor in others:
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        threading.Thread(target=_watch, args=(watched,), daemon=True).start()
        torch.set_num_threads(1)
        gc.freeze()  # a collection would write to, and so copy, every page of the parent's objects
        current, shared = 0, None
        while True:
            number, rest, slot, task = pickle.loads(line.recv_bytes())
            if number != current:
                current, shared = number, arena.read(rest)
            line.send_bytes(_answer(work, arena, slot, shared, task))
    except (EOFError, OSError):  # the parent is gone, or has closed the line
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _answer(work: Work, arena: Arena, slot: int, shared: Any, task: Any) -> bytes:
    try:
        return arena.write(slot, (work(shared, task), None, ""))
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        try:
            document = pickle.dumps(error)
            pickle.loads(document)
        except Exception:
            document = b""
        return arena.write(slot, (None, document, trace))


def _watch(descriptor: int) -> None:
    # Returns when the last process that could write has ended, which is the parent.
    os.read(descriptor, 1)
    os._exit(0)
