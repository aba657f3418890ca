"""``umbel site doctor`` and ``umbel server doctor``: is all ready, and what is to be done?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from umbel.client.folder import SiteFolder
from umbel.client.policy import read_policy
from umbel.core import audit_log, locks
from umbel.core.errors import UmbelError
from umbel.core.versions import versions
from umbel.deploy.findings import Finding, certificate, private, reachable, room
from umbel.deploy.server_folder import ServerFolder
from umbel.deploy.state import server_state


def examine_site(folder: SiteFolder) -> Iterator[Finding]:
    """Everything that a site needs, from its folder outwards.

    Raises:
        InputError: there is no site in the folder.
    """
    settings = folder.settings()
    yield Finding("ok", "site", f"'{settings.name}' in {folder.path}")
    yield _versions()
    yield private(folder.loose(), folder.keys)
    yield _node_key(folder.node_key)
    yield _told("identity key", lambda: _said(folder.identity(), "Ed25519"))
    yield _told("policy", lambda: _said(read_policy(folder.policy_file), "can be read"))
    yield _data(settings.data)
    yield _told("audit log", lambda: _chain(folder.audit_file))
    yield from room(folder.path)
    if not folder.joined():
        fix = "umbel site request, then umbel site join KIT --ca-fingerprint …"
        yield Finding("error", "membership", "the site has not joined a server", fix)
        return
    kit = folder.kit()
    host, _, port = kit.server.rpartition(":")
    found = list(reachable(host, int(port), kit.authority))
    yield from found
    if found[0].level == "ok":
        yield _member(folder)
    yield Finding("ok", "process", "running" if _runs(folder) else "not running")


def examine_server(folder: ServerFolder) -> Iterator[Finding]:
    """Everything that a server needs, from its folder outwards.

    Raises:
        InputError: there is no server in the folder.
    """
    settings = folder.settings()
    yield Finding("ok", "server", f"{', '.join(settings.hosts)} in {folder.path}")
    yield _versions()
    yield private(folder.loose(), folder.keys)
    yield from certificate(
        folder.certificate.read_bytes(), settings.hosts, "umbel server renew, then restart"
    )
    if folder.authority_key.exists():
        yield Finding("ok", "authority's key", "here; a copy elsewhere survives this machine")
    else:
        yield Finding("warning", "authority's key", "not here", "needed for kits and renewals")
    yield _told("audit log", lambda: _chain(folder.audit_file))
    yield from room(folder.path)
    state = server_state(folder)
    if not state.running:
        yield Finding("warning", "process", "not running", "umbel server start")
        return
    yield Finding("ok", "process", f"running, {state.pid}")
    yield from reachable(settings.hosts[0], settings.port, folder.authority.read_bytes())
    away = [name for name, site in state.sites.items() if not site["online"]]
    if away:
        fix = "umbel site doctor there; umbel server revoke if it has left for good"
        yield Finding("warning", "sites", f"offline: {', '.join(away)}", fix)
    else:
        yield Finding("ok", "sites", f"{len(state.sites)} online")


def _versions() -> Finding:
    found = versions()
    names = ("umbel", "flwr", "torch", "python")
    return Finding("ok", "versions", " ".join(f"{n} {found[n]}" for n in names if n in found))


def _node_key(path: Path) -> Finding:
    fix = "umbel site rotate, then umbel site request"
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        found = f"{path}: not a key in OpenSSH's format ({type(error).__name__})"
        return Finding("error", "connection key", found, fix)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        return Finding("error", "connection key", "not on the curve P-384", fix)
    return Finding("ok", "connection key", "P-384")


def _data(data: str | None) -> Finding:
    if data is None:
        fix = 'set data = "/path" in site.toml'
        return Finding("warning", "data", "no path: data sets are looked for by their readers", fix)
    path = Path(data)
    if not path.exists():
        return Finding("error", "data", f"there is no {path}", "set data in site.toml")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        return Finding("error", "data", f"{path} cannot be read by this user", f"chmod u+rX {path}")
    return Finding("ok", "data", f"{path} can be read")


def _member(folder: SiteFolder) -> Finding:
    from umbel.client.flower.fleet import DeniedError, Fleet, GoneError, LostError

    kit = folder.kit()
    fleet = Fleet(kit.server, kit.authority, folder.node_key.read_bytes(), kit.node_id)
    try:
        fleet.beat()
    except DeniedError as error:
        fix = "send the request again; was the site revoked, or has it another server's kit?"
        return Finding("error", "membership", str(error), fix)
    except (LostError, GoneError) as error:
        return Finding("warning", "membership", str(error), "try again")
    finally:
        fleet.close(leave=not _runs(folder))
    return Finding("ok", "membership", f"node {kit.node_id}, {len(kit.peers)} sites in the kit")


def _runs(folder: SiteFolder) -> bool:
    return locks.is_held(folder.state / "lock")


def _said(value: object, text: str) -> str:
    return text


def _chain(path: Path) -> str:
    return f"{sum(1 for _ in audit_log.read(path))} entries, none changed"


def _told(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding("ok", what, look())
    except UmbelError as error:
        return Finding("error", what, error.message, error.fix)
