"""``umbel site …``: what a hospital's machine does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from umbel.cli import audit_log, output, site_ledger
from umbel.cli.output import Format, FormatOption

app = typer.Typer(help="Take part in a federation with this machine's data.")
app.command()(site_ledger.ledger)
policy = typer.Typer(help="What this site allows.")
app.add_typer(policy, name="policy")

FolderOption: TypeAlias = Annotated[
    Path, typer.Option("--folder", metavar="DIR", help="The site's folder.")
]
HERE = Path("umbel-site")


def _log(folder: Path) -> Path:
    from umbel.client.folder import SiteFolder

    return SiteFolder(folder).audit_file


app.add_typer(
    audit_log.verbs("What this site was asked, and what it decided.", HERE, _log), name="audit-log"
)


@app.command()
def init(
    name: Annotated[str, typer.Option(metavar="NAME", help="What the site is called in runs.")],
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder or file that holds its data.")
    ] = None,
    folder: FolderOption = HERE,
    format: FormatOption = Format.text,
) -> None:
    """Make a site: its keys, which never leave this machine, its settings and its policy."""
    from umbel.client.folder import SiteFolder
    from umbel.deploy import provisioning

    site = SiteFolder(folder)
    fingerprint = provisioning.init_site(site, name, data)
    if format is Format.json:
        output.emit({"site": name, "folder": str(site.path), "fingerprint": fingerprint})
        return
    print(f"site '{name}' made in {site.path}\nfingerprint {fingerprint}")
    print(f"next: read {site.policy_file}, then umbel site request")


@app.command()
def request(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Where to; default: NAME.request.")
    ] = None,
    folder: FolderOption = HERE,
    format: FormatOption = Format.text,
) -> None:
    """Write the request to take part: public keys only, to be sent to the server."""
    from umbel.client.folder import SiteFolder
    from umbel.deploy import provisioning

    site = SiteFolder(folder)
    path = file or Path(f"{site.settings().name}.request")
    fingerprint = provisioning.write_request(site, path)
    if format is Format.json:
        output.emit({"file": str(path), "fingerprint": fingerprint})
        return
    print(f"send {path} to the server's administrator, and tell them on the telephone:")
    print(fingerprint)


@app.command()
def join(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="What the server sent back.")],
    ca_fingerprint: Annotated[
        str, typer.Option(metavar="HEX", help="Of the server's authority, told by telephone.")
    ],
    folder: FolderOption = HERE,
    format: FormatOption = Format.text,
) -> None:
    """Pin what the server's kit says, if its authority has this fingerprint."""
    from umbel.client.folder import SiteFolder
    from umbel.deploy import provisioning

    site = SiteFolder(folder)
    server = provisioning.join(site, kit, ca_fingerprint)
    peers = sorted(site.kit().peers)
    if format is Format.json:
        output.emit({"server": server, "peers": peers})
        return
    print(f"joined {server}; sites: {', '.join(peers)}\nnext: umbel site doctor")


@app.command()
def rotate(folder: FolderOption = HERE, format: FormatOption = Format.text) -> None:
    """Make new keys; the old ones stay in use until the site joins with its next kit."""
    from umbel.client.folder import SiteFolder
    from umbel.deploy import provisioning

    fingerprint = provisioning.rotate_site(SiteFolder(folder))
    if format is Format.json:
        output.emit({"fingerprint": fingerprint})
        return
    print(f"new fingerprint {fingerprint}\nnext: umbel site request")


@app.command()
def start(folder: FolderOption = HERE, format: FormatOption = Format.text) -> None:
    """Take part until interrupted: connects out, listens on no port."""
    from umbel.client.flower.site import Site
    from umbel.client.folder import SiteFolder

    served = Site(SiteFolder(folder), output.note).run()
    if format is Format.json:
        output.emit({"answered": served.answered, "refused": served.refused})


@app.command()
def status(
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 where it is not up.")] = False,
    folder: FolderOption = HERE,
    format: FormatOption = Format.text,
) -> int:
    """Show whether the site takes part, and when its server last answered."""
    from umbel.client.folder import SiteFolder

    running, heard = SiteFolder(folder).up()
    if format is Format.json:
        output.emit({"running": running, "heard_seconds_ago": heard})
    else:
        ago = "never" if heard is None else f"{output.duration(heard)} ago"
        print(f"{'running' if running else 'not running'}; the server last answered {ago}")
    return int(check and not running)


@app.command()
def doctor(folder: FolderOption = HERE, format: FormatOption = Format.text) -> None:
    """Look at keys, policy, data, clock and the way to the server; says what to do."""
    from umbel.cli.doctor import tell
    from umbel.client.folder import SiteFolder
    from umbel.deploy.doctor import examine_site

    tell(examine_site(SiteFolder(folder)), format)


@policy.command("check")
def policy_check(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run to be tried.")],
    sites: Annotated[int, typer.Option(metavar="N", help="Sites in a round.")] = 1_000_000,
    folder: FolderOption = HERE,
    format: FormatOption = Format.text,
) -> None:
    """Say whether this site would take part in a run; exit code 3 where not."""
    from datetime import datetime

    from umbel.client.folder import SiteFolder
    from umbel.client.policy import check_round, check_run, read_policy
    from umbel.core.run_file import load

    rules = read_policy(SiteFolder(folder).policy_file)
    check_run(rules, load(run_file))
    check_round(rules, sites, 0, datetime.now(), trains=True)
    if format is Format.json:
        output.emit({"allowed": True})
    else:
        print("allowed")


@policy.command("show")
def policy_show(folder: FolderOption = HERE, format: FormatOption = Format.text) -> None:
    """Show the rules in force, the defaults included."""
    from umbel.client.folder import SiteFolder
    from umbel.client.policy import read_policy

    table = read_policy(SiteFolder(folder).policy_file).model_dump(mode="json")
    if format is Format.json:
        output.emit(table)
        return
    rows = [(f"{s}.{k}", str(v)) for s, keys in table.items() for k, v in keys.items()]
    output.table(["rule", "value"], rows, left=2)
