"""Which kernel trains the clients, and how many at once: as text, and as it stands in a record."""

from __future__ import annotations

from typing import NamedTuple

from umbel.core.errors import InputError, suggest
from umbel.simulations.kernels.build import KERNELS

WHERE = "engine plan"


class EnginePlan(NamedTuple):
    """What decides, besides the run file, the last bits of a run's result on one machine.

    Args:
        kernel: its name.
        chunk: the most clients in one computation; ``None``: as many as memory allows.
    """

    kernel: str
    chunk: int | None = None

    def __str__(self) -> str:
        return self.kernel if self.chunk is None else f"{self.kernel}:chunk={self.chunk}"

    @classmethod
    def parse(cls, text: str) -> EnginePlan:
        """The inverse of ``str``: ``kernel`` or ``kernel:chunk=N``.

        Raises:
            InputError: no such kernel, another key, or a chunk below one.
        """
        kernel, _, option = text.partition(":")
        if kernel not in KERNELS:
            raise InputError(
                f"unknown kernel '{kernel}'", where=WHERE, fix=suggest(kernel, KERNELS)
            )
        if not option:
            return cls(kernel)
        key, _, number = option.partition("=")
        if key != "chunk" or not number.isdecimal() or int(number) < 1:
            raise InputError(
                f"'{option}' is not chunk=N with N at least 1",
                where=WHERE,
                fix=f"write '{kernel}:chunk=5'",
            )
        return cls(kernel, int(number))


class Choice(NamedTuple):
    """A plan, and how it was found.

    Args:
        plan: what was chosen.
        source: ``trial``, ``cache`` or ``pinned``; ``default`` where the trial met broken data.
        seconds: plan -> seconds that it took for one client's first steps in the trial.
        refused: kernel -> why it cannot train this model.
    """

    plan: EnginePlan
    source: str
    seconds: dict[str, float]
    refused: dict[str, str]

    def record(self) -> dict[str, object]:
        """As plain values, for the run's record."""
        return {
            "plan": str(self.plan),
            "source": self.source,
            "seconds_per_client": dict(self.seconds),
            "refused": dict(self.refused),
        }
