"""``umbel flower``."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption
from umbel.core.errors import RunError


def flower(
    folder: Annotated[
        str, typer.Argument(metavar="APP_DIR", help="The folder with the app's pyproject.toml.")
    ],
    supernodes: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="How many nodes; default: the app's default federation's, else 10."
        ),
    ] = None,
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            metavar='"KEY=VALUE …"', help="Overrides keys of the app's config, as for flwr run."
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(metavar="K", help="How many worker processes; default: one a core."),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Run an existing Flower app, unmodified, without Ray."""
    from umbel.simulations.flower_apps import run_flower_app

    # What the app prints is its result; only JSON must have stdout for itself.
    stdout = sys.stderr if format is Format.json else sys.stdout
    try:
        with contextlib.redirect_stdout(stdout):
            done = run_flower_app(
                folder, supernodes=supernodes, run_config=run_config or (), processes=processes
            )
    except KeyboardInterrupt:
        raise RunError("interrupted", where="umbel flower", fix="start it again") from None
    if format is Format.json:
        output.emit(done._asdict())
    else:
        output.note(
            f"{done.app}: {done.messages} messages to {done.supernodes} nodes in "
            f"{output.duration(done.seconds)}, {done.processes} processes, {done.errors} errors"
        )
