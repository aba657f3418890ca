"""A run while it goes on, on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from umbel.cli.output import duration, note

if TYPE_CHECKING:
    from umbel.server.records import RoundRecord

LINES_A_SECOND = 2


class Progress(Protocol):
    """Shows rounds as they are committed; a context that ends the display."""

    def on_round(self, record: RoundRecord, rounds: int) -> None:
        """A round of ``rounds`` was committed."""

    def announce(self, text: str) -> None:
        """Something that the user should know."""

    def __enter__(self) -> Progress: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def progress() -> Progress:
    """The display that suits stderr."""
    return Live() if sys.stderr.isatty() else Lines()


class Lines:
    """One plain line a round; of fast rounds two a second, and always the last."""

    def __init__(self) -> None:
        self._shown = -1.0
        self._waiting = ""
        self._pace = Pace()

    def on_round(self, record: RoundRecord, rounds: int) -> None:
        """Prints the round, or keeps it in case that it is the last."""
        now = time.monotonic()
        line = "  ".join(
            part for part in (describe(record, rounds), self._pace(record, rounds, now)) if part
        )
        if now - self._shown < 1 / LINES_A_SECOND and record.round < rounds:
            self._waiting = line
            return
        note(line)
        self._shown, self._waiting = now, ""

    def announce(self, text: str) -> None:
        """Prints the note."""
        note(f"note: {text}")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._waiting:
            note(self._waiting)
            self._waiting = ""


class Live:
    """A bar with the round, clients a second, the time left and the last metrics."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("round {task.completed:.0f} of {task.total:.0f}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("[bold]{task.fields[figures]}"),
            TextColumn("{task.fields[epsilon]}"),
            console=Console(file=sys.stderr),
        )
        self._task = self._bar.add_task(
            "", total=None, visible=False, rate="", figures="", epsilon=""
        )
        self._begun = False

    def on_round(self, record: RoundRecord, rounds: int) -> None:
        """Moves the bar; failures and notes stay on lines of their own."""
        if not self._begun:  # rounds of an earlier process say nothing about this one's pace
            self._bar.reset(self._task, total=rounds, completed=record.round - 1)
            self._begun = True
        fields = {"completed": record.round, "rate": rate(record), "visible": True}
        if record.metrics:
            fields["figures"] = figures(record.metrics)
        if record.epsilon is not None:
            fields["epsilon"] = f"ε {record.epsilon:.3f}"
        self._bar.update(self._task, **fields)  # type: ignore[arg-type]
        if record.failures or record.note:
            self._bar.console.print(describe(record, rounds), markup=False, highlight=False)

    def announce(self, text: str) -> None:
        """Prints the note above the bar."""
        self._bar.console.print(f"note: {text}", markup=False, highlight=False)

    def __enter__(self) -> Live:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class Pace:
    """How many clients a second, and the time left as the rounds of this process went."""

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None

    def __call__(self, record: RoundRecord, rounds: int, now: float) -> str:
        """``83 clients/s  12 s left``; ``now`` is any clock's time at the end of the round."""
        if self._start is None:
            self._start = record.round - 1, now - record.seconds
        first, began = self._start
        left = (now - began) / (record.round - first) * (rounds - record.round)
        words = [rate(record)] if record.participants else []
        return "  ".join(words + ([f"{duration(left)} left"] if left else []))


def rate(record: RoundRecord) -> str:
    """``83 clients/s``."""
    return f"{len(record.participants) / max(record.seconds, 1e-9):.3g} clients/s"


def describe(record: RoundRecord, rounds: int) -> str:
    """``round 3/15  accuracy 0.8123  loss 0.61  10 clients  0.12 s``."""
    trained = {f"training {n}": v for n, v in record.training.items()}
    clients = len(record.participants)
    parts = [
        f"round {record.round:>{len(str(rounds))}}/{rounds}",
        figures(record.metrics or trained),
        f"{clients} client{'' if clients == 1 else 's'}",
        f"{record.seconds:.2f} s",
    ]
    if record.epsilon is not None:
        parts.append(f"ε {record.epsilon:.3f}")
    if record.failures:
        first = record.failures[0]
        more = f" and {len(record.failures) - 1} more" if len(record.failures) > 1 else ""
        parts.append(f"failed: {first.client} ({first.reason}){more}")
    if record.note:
        parts.append(record.note)
    return "  ".join(part for part in parts if part)


def figures(metrics: Mapping[str, float]) -> str:
    """The first four metrics, scores before losses."""
    from umbel.server.summary import lower_is_better

    names = sorted(metrics, key=lower_is_better)[:4]
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in names)
