"""The exceptions of Umbel, one small tree.

UmbelError                an error that a user can act on: message, where, fix
├── InputError            a run file, an option, a data file or a model is wrong      exit 2
├── RefusedError          a privacy budget or a policy said no                        exit 3
└── RunError              a run could not go on (all clients failed, store broken)    exit 1
    └── NotNowError       clients say at what hours they take part, and it is none    exit 1

Everything else is a defect of Umbel and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UmbelError(Exception):
    """An error that a user can act on.

    Args:
        message: what is wrong, with the offending value and its bound.
        where: the file, section, key, client or round that it was found in.
        fix: the next step.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where and self.where not in self.message else ""
        fix = f"; {self.fix}" if self.fix else ""
        return f"{where}{self.message}{fix}"


class InputError(UmbelError):
    """A run file, an option, a data file or a model is wrong; nothing was started."""

    exit_code = 2


class RefusedError(UmbelError):
    """A privacy budget or a policy said no."""

    exit_code = 3


class RunError(UmbelError):
    """A run could not go on."""


class NotNowError(RunError):
    """A run could not go on at this hour; it can at another, with nothing mended."""


def suggest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'lr'?`` for the known name nearest to ``name``, or the list of them all."""
    options = sorted(known)
    near = difflib.get_close_matches(name.replace("_", "-"), [o.replace("_", "-") for o in options])
    for option in options:
        if near and option.replace("_", "-") == near[0]:
            return f"did you mean '{option}'?"
    return f"known: {', '.join(options)}" if options else "none is known"
