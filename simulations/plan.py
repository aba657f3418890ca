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
        compiled: whether a step is compiled.
    """

    kernel: str
    chunk: int | None = None
    compiled: bool = False

    def __str__(self) -> str:
        options = [] if self.chunk is None else [f"chunk={self.chunk}"]
        options += ["compile"] if self.compiled else []
        return ":".join([self.kernel, *([",".join(options)] if options else [])])

    @classmethod
    def parse(cls, text: str) -> EnginePlan:
        """The inverse of ``str``: ``kernel``, ``kernel:chunk=N`` or ``kernel:chunk=N,compile``.

        Raises:
            InputError: no such kernel, another option, or a chunk below one.
        """
        kernel, _, options = text.partition(":")
        if kernel not in KERNELS:
            raise InputError(
                f"unknown kernel '{kernel}'", where=WHERE, fix=suggest(kernel, KERNELS)
            )
        plan = cls(kernel)
        for option in options.split(",") if options else ():
            key, _, number = option.partition("=")
            if option == "compile":
                plan = plan._replace(compiled=True)
            elif key == "chunk" and number.isdecimal() and int(number) > 0:
                plan = plan._replace(chunk=int(number))
            else:
                raise InputError(
                    f"'{option}' is neither chunk=N with N at least 1 nor compile",
                    where=WHERE,
                    fix=f"write '{kernel}:chunk=5' or '{kernel}:chunk=5,compile'",
                )
        return plan


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
