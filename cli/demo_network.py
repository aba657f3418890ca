"""``umbel demo-network``: a server and three sites on this machine, for a first look."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption


class Where(StrEnum):
    """Where server and sites run."""

    auto = "auto"
    docker = "docker"
    processes = "processes"


def demo_network(
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Of the run.")] = 5,
    where: Annotated[
        Where,
        typer.Option(
            "--with", help="auto: as containers where an engine has the images, else as processes."
        ),
    ] = Where.auto,
    server_image: Annotated[
        str, typer.Option(metavar="IMAGE", help="Of the server's container.")
    ] = "umbel-server",
    site_image: Annotated[
        str, typer.Option(metavar="IMAGE", help="Of the sites' containers.")
    ] = "umbel-site",
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Keys, data and results; kept.")
    ] = Path("umbel-demo"),
    format: FormatOption = Format.text,
) -> None:
    """Bring up a server and three sites on this machine, and run a federation on them."""
    from umbel.cli.simulate import show_outcome
    from umbel.core.errors import RunError
    from umbel.deploy.demo import demo_network as start
    from umbel.deploy.docker_hosting import Containers

    hosting = None
    if where is not Where.processes:
        try:
            hosting = Containers({"server": server_image, "site": site_image})
        except RunError as missing:
            if where is Where.docker:
                raise
            output.note(f"as processes: {missing.message}")
    outcome = start(folder.absolute(), rounds, hosting, output.note).as_json()
    if format is Format.json:
        output.emit(outcome)
    else:
        show_outcome(outcome, str(folder / "server" / "runs"))
