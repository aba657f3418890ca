"""``umbel server …``: what the machine in the middle does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from umbel.cli import audit_log, output
from umbel.cli.output import Format, FormatOption

app = typer.Typer(help="Run a federation's server: let sites in, carry out runs.")

ServerOption: TypeAlias = Annotated[
    Path, typer.Option("--folder", metavar="DIR", help="The server's folder.")
]
HERE = Path("umbel-server")


def _log(folder: Path) -> Path:
    from umbel.deploy.server_folder import ServerFolder

    return ServerFolder(folder).audit_file


app.add_typer(
    audit_log.verbs("Who was let in, who was not, what was run.", HERE, _log), name="audit-log"
)


@app.command()
def init(
    host: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="DNS name or address that sites connect to; repeatable."),
    ],
    port: Annotated[int, typer.Option(metavar="P", help="The port that they connect to.")] = 8443,
    folder: ServerOption = HERE,
    format: FormatOption = Format.text,
) -> None:
    """Make a server: authority, certificate, keys and the admin's password, shown once."""
    from umbel.deploy import provisioning
    from umbel.deploy.server_folder import ServerFolder

    server = ServerFolder(folder)
    made = provisioning.init_server(server, host, port)
    if format is Format.json:
        output.emit({"folder": str(server.path), **made._asdict()})
        return
    print(f"server made in {server.path}")
    print(f"authority's fingerprint, to be told to sites by telephone:\n  {made.fingerprint}")
    print(f"password of 'admin', shown this once:\n  {made.password}")
    print("next: umbel server start")


@app.command()
def approve(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What the site sent.")],
    fingerprint: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="What the site says on the telephone; checked."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="New keys for a site that lost its old ones.")
    ] = False,
    folder: ServerOption = HERE,
    format: FormatOption = Format.text,
) -> None:
    """Let a site in, and write the kit to send back."""
    from umbel.deploy import provisioning
    from umbel.deploy.server_folder import ServerFolder
    from umbel.server.flower import link

    server = ServerFolder(folder)
    done = provisioning.approve(
        server, file, link.register, link.revoke, fingerprint=fingerprint, replace=replace
    )
    authority = provisioning.fingerprint_of(server)
    if format is Format.json:
        told = {"kit": str(done.kit), "fingerprint": done.fingerprint, "authority": authority}
        output.emit({"site": done.name, **told})
        return
    print(f"site '{done.name}' is in; its fingerprint is\n  {done.fingerprint}")
    print(f"send {done.kit} back; it is used with --ca-fingerprint\n  {authority}")


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="SITE", help="Who is shut out.")],
    folder: ServerOption = HERE,
    format: FormatOption = Format.text,
) -> None:
    """Shut a site out; its next request is refused."""
    from umbel.deploy import provisioning
    from umbel.deploy.server_folder import ServerFolder
    from umbel.server.flower import link

    provisioning.revoke_site(ServerFolder(folder), name, link.revoke)
    if format is Format.json:
        output.emit({"revoked": name})
    else:
        print(f"'{name}' is shut out; the other sites' kits name it until they are written again")


@app.command()
def kit(
    name: Annotated[str, typer.Argument(metavar="SITE", help="Whose.")],
    folder: ServerOption = HERE,
    format: FormatOption = Format.text,
) -> None:
    """Write a site's kit again, with the sites that are members today."""
    from umbel.deploy import provisioning
    from umbel.deploy.server_folder import ServerFolder

    server = ServerFolder(folder)
    path, authority = provisioning.write_kit(server, name), provisioning.fingerprint_of(server)
    if format is Format.json:
        output.emit({"kit": str(path), "authority": authority})
        return
    print(path)
    output.note(f"it is used with --ca-fingerprint\n  {authority}")


@app.command()
def renew(folder: ServerOption = HERE, format: FormatOption = Format.text) -> None:
    """Make a new certificate by the same authority; sites need nothing new. Restart the server."""
    from umbel.deploy import provisioning
    from umbel.deploy.server_folder import ServerFolder

    server = ServerFolder(folder)
    provisioning.renew_certificate(server)
    if format is Format.json:
        output.emit({"certificate": str(server.certificate)})
    else:
        print(f"{server.certificate} is new; start the server again")


@app.command()
def start(
    dashboard: Annotated[
        bool,
        typer.Option(
            "--dashboard/--no-dashboard", help="Whether `umbel dashboard` runs beside it."
        ),
    ] = True,
    folder: ServerOption = HERE,
    format: FormatOption = Format.text,
) -> None:
    """Serve until interrupted: open to the sites' port alone, runs from the queue."""
    from umbel.deploy import node
    from umbel.deploy.server_folder import ServerFolder

    node.start(ServerFolder(folder), output.note, dashboard=dashboard)
    if format is Format.json:
        output.emit({"status": "ended"})


@app.command()
def status(
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 where it is not up.")] = False,
    folder: ServerOption = HERE,
    format: FormatOption = Format.text,
) -> int:
    """Show whether the server runs, who is there, and the queue."""
    from umbel.deploy.jobs import Jobs
    from umbel.deploy.server_folder import ServerFolder
    from umbel.deploy.state import server_state

    server = ServerFolder(folder)
    found = server_state(server)
    jobs = Jobs(server.jobs_database).list()
    if format is Format.json:
        output.emit({**found._asdict(), "jobs": [job.as_json() for job in jobs]})
        return int(check and not found.up)
    print(f"running, process {found.pid}" if found.running else "not running")
    rows = [(name, "online" if s["online"] else "offline") for name, s in found.sites.items()]
    output.table(["site", ""], rows, left=2)
    output.table(
        ["run", "state", "in the store", "round", "error"],
        [(j.id, j.state, j.run_id, f"{j.round}/{j.rounds}", j.error) for j in jobs],
        left=5,
    )
    return int(check and not found.up)


@app.command()
def doctor(folder: ServerOption = HERE, format: FormatOption = Format.text) -> None:
    """Look at keys, certificate, clock, gate and sites; says what to do."""
    from umbel.cli.doctor import tell
    from umbel.deploy.doctor import examine_server
    from umbel.deploy.server_folder import ServerFolder

    tell(examine_server(ServerFolder(folder)), format)
