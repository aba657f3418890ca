"""``umbel submit``, ``pause``, ``resume`` and ``stop``: orders to a server on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption
from umbel.cli.server import HERE, ServerOption

if TYPE_CHECKING:
    from umbel.deploy.jobs import Jobs

JobArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="RUN", help="Its id in the queue or the store, or its beginning.")
]


def submit(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.")],
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key.")
    ] = None,
    sites: Annotated[int, typer.Option(metavar="N", help="Sites to wait for; 0: all members.")] = 0,
    folder: ServerOption = HERE,
    format: FormatOption = Format.text,
) -> None:
    """Put a run into the server's queue."""
    from umbel.core.run_file import load

    queue = _queue(folder)
    text = run_file.read_text(encoding="utf-8") if run_file.is_file() else ""
    job = queue.submit(load(run_file, set or ()), text, sites)
    if format is Format.json:
        output.emit(job.as_json())
    else:
        print(f"{job.id} {job.state}")


def pause(
    run: JobArgument, folder: ServerOption = HERE, format: FormatOption = Format.text
) -> None:
    """Pause a run of the server after the round under way."""
    _order(run, "pause", folder, format)


def resume(
    run: JobArgument, folder: ServerOption = HERE, format: FormatOption = Format.text
) -> None:
    """Let a run of the server go on, from its last committed round."""
    _order(run, "resume", folder, format)


def stop(run: JobArgument, folder: ServerOption = HERE, format: FormatOption = Format.text) -> None:
    """Stop a run of the server at once; its committed rounds stay."""
    _order(run, "stop", folder, format)


def _queue(folder: Path) -> Jobs:
    """The queue of the server in a folder.

    Raises:
        InputError: there is no server.
    """
    from umbel.deploy.jobs import Jobs
    from umbel.deploy.server_folder import ServerFolder

    server = ServerFolder(folder)
    server.settings()
    return Jobs(server.jobs_database)


def _order(
    name: str, order: Literal["pause", "resume", "stop"], folder: Path, format: Format
) -> None:
    jobs = _queue(folder)
    job = jobs.want(jobs.get(name), order)
    if format is Format.json:
        output.emit(job.as_json())
    else:
        print(f"{job.id} {job.state}" + (f", {order} ordered" if job.wanted else ""))
