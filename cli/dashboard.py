"""``umbel dashboard``: pages about runs and sites, on this machine."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption


def dashboard(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", metavar="DIR", help="A server's folder, with its store and sites."
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--store", metavar="S", help="A run store, such as that of simulations [default: runs]."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="P", help="In place of the one in dashboard.toml.")
    ] = None,
    reset: Annotated[
        bool, typer.Option("--new-password", help="Show a new password of 'admin', and end.")
    ] = False,
    beside: Annotated[
        int | None, typer.Option(hidden=True, help="The process that it ends with.")
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Serve the dashboard until interrupted: pages, an API, figures for Prometheus, alerts."""
    from umbel.deploy.dashboard.serve import new_password, serve
    from umbel.deploy.server_folder import ServerFolder

    server = None if folder is None else ServerFolder(folder)
    if reset:
        password = new_password(store, server)
        if format is Format.json:
            output.emit({"user": "admin", "password": password})
        else:
            print(f"password of 'admin', shown this once:\n  {password}")
        return
    with contextlib.suppress(KeyboardInterrupt):
        serve(store, server, port=port, report=output.note, beside=beside)
    if format is Format.json:
        output.emit({"status": "ended"})
