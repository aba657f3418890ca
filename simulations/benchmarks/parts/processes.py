"""A program in a process of its own: its time line, its CPU seconds, the memory of its whole tree.

Processes are found by a mark in their environment, not by their parents: what a program starts in
turn (Ray's daemons, forked workers) inherits the mark, and keeps it when its parent has gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from umbel.simulations.benchmarks.peers.peer import MARK

INTERVAL = 0.2
"""Seconds between two looks at the memory, at least."""
REST = 50
"""Times as long as a look took must pass until the next: looking costs 2 % at most."""


class Measured(NamedTuple):
    """What one run of a program took.

    Args:
        rounds: seconds from the end of round k to the end of round k + 1, k = 1 …
        first_round: seconds from the start of the process to the end of round 1.
        cpu_seconds: of the whole tree, between the ends of the first and of the last round.
        peak_bytes: the most proportional memory (PSS) that the tree held; ``None`` where a run was
            over before it was looked at.
        others: cores that other programs kept busy meanwhile, on average.
        facts: what else the program said.
        error: why there are no figures; empty where there are.
    """

    rounds: list[float]
    first_round: float
    cpu_seconds: float
    peak_bytes: int | None
    others: float
    facts: dict[str, Any]
    error: str = ""


class Tree:
    """The processes that carry a mark, while they live and after."""

    def __init__(self, mark: str) -> None:
        self._mark = f"UMBEL_BENCH={mark}".encode()
        self._known: dict[tuple[int, int], bool] = {}
        self._ticks: dict[tuple[int, int], tuple[int, int]] = {}
        # A process that is older than this one's first look is not ours, whatever it becomes.
        for pid, born, _, _ in _processes():
            self._known[pid, born] = False

    def alive(self) -> list[int]:
        """Process ids; their CPU time is noted on the way."""
        found = []
        for pid, born, own, reaped in _processes():
            key = (pid, born)
            if not self._known.get(key, True):
                continue
            # Before its exec a new process still shows its parent's environment: look again.
            if key not in self._known and self._mark not in _read(f"/proc/{pid}/environ"):
                continue
            self._known[key] = True
            self._ticks[key] = (own, reaped)
            found.append(pid)
        return found

    def cpu_seconds(self) -> float:
        """So far. What a process used after the last look is missing once it has ended, except
        where its parent waited for it: the larger of both counts is nearer."""
        living = set(self.alive())
        seen = sum(own for own, _ in self._ticks.values())
        held = sum(sum(t) for (pid, _), t in self._ticks.items() if pid in living)
        return max(seen, held) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Bytes now: memory that processes share is counted once (PSS)."""
        return sum(_pss(pid) for pid in self.alive())

    def end(self, patience: float = 10.0) -> None:
        """Waits for what is left to end by itself, then ends it."""
        for number, seconds in ((None, patience), (signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            limit = time.monotonic() + seconds
            for pid in self.alive() if number else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number or 0)
            while self.alive() and time.monotonic() < limit:
                time.sleep(0.05)


def measure(
    command: Sequence[str], environment: Mapping[str, str], rounds: int, limit: float = 600.0
) -> Measured:
    """Runs ``command`` to its end.

    Args:
        command: a program of ``peers/`` with its settings.
        environment: of the process.
        rounds: how many it will run, at least two.
        limit: seconds after which it is ended.
    """
    mark = secrets.token_hex(8)
    tree = Tree(mark)
    busy, mine = _busy_seconds(), time.process_time()
    start = time.monotonic()
    facts: dict[str, Any] = {}
    ends: dict[int, float] = {}
    cpu: dict[int, float] = {}
    peak, pause, looked = 0, INTERVAL, 0.0
    with tempfile.TemporaryFile() as errors:
        program = subprocess.Popen(
            command,
            env={**environment, "UMBEL_BENCH": mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert program.stdout is not None
        lines = Lines(program.stdout)
        over = False
        try:
            while not over and time.monotonic() - start < limit:
                # Before the reading, so that nothing which was told is left unread.
                over = _is_over(program.pid)
                for told in lines.within(0.0 if over else pause):
                    when, number = told.pop("time"), told.pop("round", None)
                    if number in (1, rounds):
                        cpu[number] = tree.cpu_seconds()
                    if number is not None:
                        ends[number] = when
                    facts.update(told)
                if not over and time.monotonic() - looked > pause:
                    looked = time.monotonic()
                    peak = max(peak, tree.memory())
                    pause = max(INTERVAL, REST * (time.monotonic() - looked))
        finally:
            seconds = time.monotonic() - start
            others = _busy_seconds() - busy - tree.cpu_seconds() - (time.process_time() - mine)
            if over:
                program.wait()
            tree.end(patience=10.0 if over else 0.0)
            program.wait()
            program.stdout.close()
        error = _error(program.returncode, not over, limit, ends, rounds, errors)
    if error:
        return Measured([], 0.0, 0.0, None, 0.0, facts, error)
    return Measured(
        rounds=[ends[n + 1] - ends[n] for n in range(1, rounds)],
        first_round=ends[1] - start,
        cpu_seconds=cpu[rounds] - cpu[1],
        peak_bytes=peak or None,
        others=max(0.0, others / seconds),
        facts=facts,
    )


class Lines:
    """What a program tells on its stdout, as it comes."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._descriptor = pipe.fileno()
        os.set_blocking(self._descriptor, False)
        self._rest = b""

    def within(self, seconds: float) -> list[dict[str, Any]]:
        """What was told; waits up to ``seconds`` for something."""
        readable, _, _ = select.select([self._descriptor], [], [], seconds)
        while readable:
            try:
                piece = os.read(self._descriptor, 65536)
            except BlockingIOError:
                break
            if not piece:  # closed: the program is about to end
                time.sleep(min(seconds, 0.01))
                break
            self._rest += piece
        *whole, self._rest = self._rest.split(b"\n")
        marked = (line for line in whole if line.startswith(MARK.encode()))
        return [json.loads(line[len(MARK) :]) for line in marked]


def _error(
    code: int,
    late: bool,
    limit: float,
    ends: Mapping[int, float],
    rounds: int,
    errors: IO[bytes],
) -> str:
    if late:
        return f"ended after {limit:.0f} s, in round {max(ends, default=0) + 1} of {rounds}"
    if code or len(ends) <= rounds:
        errors.seek(0)
        text = errors.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}: {text[-1] if text else 'no message'}"
    return ""


def _is_over(pid: int) -> bool:
    """Whether a child has ended; it is left unreaped, so that its CPU time can still be read."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _processes() -> Iterator[tuple[int, int, int, int]]:
    """(id, start time, own ticks, ticks of children waited for) of every process."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := _read(f"/proc/{name}/stat")):
            # The second field is the name in brackets, which may hold anything.
            fields = stat[stat.rindex(b")") + 2 :].split()
            own, reaped = (int(fields[i]) + int(fields[i + 1]) for i in (11, 13))
            yield int(name), int(fields[19]), own, reaped


def _pss(pid: int) -> int:
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _busy_seconds() -> float:
    """What all cores have worked since the machine started, time stolen by its host included."""
    fields = _read("/proc/stat").split(b"\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, *rest = (int(f) for f in fields)
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _read(path: str) -> bytes:
    """A file of /proc; empty where the process has gone, or is another user's."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
