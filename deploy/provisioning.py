"""How a server comes into being, and how a site and a server come to know each other.

Nothing secret ever travels. A site makes its keys and writes a *request* with the public ones; the
administrator approves it and hands back a *kit* with the server's public ones, signed by the
federation's authority. Both files may go by e-mail: each side reads the other's fingerprint aloud,
and a changed file is refused.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from umbel.client.folder import NAME, SiteFolder, read_kit
from umbel.client.policy import POLICY
from umbel.core import signing
from umbel.core.audit_log import AuditLog
from umbel.core.canonical import canonical_json
from umbel.core.errors import InputError
from umbel.deploy import certificates
from umbel.deploy.server_folder import ServerFolder, SiteRecord
from umbel.deploy.services import write_services

AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 825
REQUEST = "site request"

# OWASP's second recommendation for Argon2id: 19 MiB, two passes, one lane.
PASSES, MEMORY_KIB = 2, 19 * 1024


class Made(NamedTuple):
    """What ``umbel server init`` shows, once.

    Args:
        fingerprint: of the authority; sites are told it by another way than the kit.
        password: of the admin; only its hash is kept.
    """

    fingerprint: str
    password: str


class Approved(NamedTuple):
    """A site that was let in.

    Args:
        name: of the site.
        kit: the file to hand back.
        fingerprint: of the site's keys, to be compared with what the site says.
    """

    name: str
    kit: Path
    fingerprint: str


def _check_host(host: str) -> None:
    label = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
    if len(host) <= 253 and re.fullmatch(rf"{label}(\.{label})*", host):
        return
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise InputError(
            f"'{host}' is neither a DNS name nor an address",
            where="--host",
            fix="give the name alone, as in fl.example.org, without scheme and port",
        ) from None


def init_server(folder: ServerFolder, hosts: Sequence[str], port: int) -> Made:
    """Makes authority, server certificate, keys, admin and settings.

    Args:
        folder: must not hold a server yet.
        hosts: DNS names and addresses that sites will connect to.
        port: that they will connect to.
    Raises:
        InputError: there is a server in the folder, or a host is neither name nor address.
    """
    for host in hosts:
        _check_host(host)
    if folder.settings_file.exists() or folder.authority.exists():
        raise InputError(
            "there is a server here already",
            where=str(folder.path),
            fix="use another --folder; `umbel server renew` makes a new certificate",
        )
    folder.make()
    certificates.make_authority(folder.keys, AUTHORITY_DAYS)
    certificates.issue_server_files(folder.keys, hosts, CERTIFICATE_DAYS)
    signing.make_key(folder.manifest_key)
    signing.write_new(folder.session_key, secrets.token_bytes(32), 0o600)
    password = secrets.token_urlsafe(15)
    table = {"user": "admin", "role": "admin", "password": password_hash(password)}
    signing.write_new(folder.admin_file, json.dumps(table, indent=2).encode(), 0o600)
    names = ", ".join(json.dumps(host) for host in hosts)
    text = f"hosts = [{names}]\nport = {port}\n"
    signing.write_new(folder.settings_file, text.encode(), 0o600)
    write_services("server", folder.path, port=port)
    fingerprint = fingerprint_of(folder)
    note(folder, "server made", hosts=list(hosts), authority=fingerprint)
    return Made(fingerprint, password)


def renew_certificate(folder: ServerFolder) -> None:
    """A new certificate and key by the same authority; sites need nothing new."""
    hosts = folder.settings().hosts
    fresh = folder.keys / "new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    for name in ("authority.pem", "authority.key"):
        shutil.copy2(folder.keys / name, fresh / name)
    certificates.issue_server_files(fresh, hosts, CERTIFICATE_DAYS)
    for name in ("server.key", "server.pem"):
        (fresh / name).replace(folder.keys / name)
    shutil.rmtree(fresh)
    note(folder, "certificate renewed", hosts=list(hosts))


def init_site(folder: SiteFolder, name: str, data: Path | None) -> str:
    """Makes a site's keys, settings and policy; returns the fingerprint of the keys.

    Raises:
        InputError: there is a site in the folder, or the name is not allowed.
    """
    if not re.fullmatch(NAME, name):
        raise InputError(
            f"'{name}' cannot be a site's name",
            where="--name",
            fix="letters, digits, '.', '_' and '-', at most 64, beginning with one of the former",
        )
    if folder.settings_file.exists() or folder.node_key.exists():
        raise InputError(
            "there is a site here already",
            where=str(folder.path),
            fix="use another --folder; `umbel site rotate` makes new keys",
        )
    folder.make()
    certificates.make_node_key(folder.node_key)
    signing.make_key(folder.identity_key)
    text = f"name = {json.dumps(name)}\n"
    if data is not None:
        text += f"data = {json.dumps(str(data.absolute()))}\n"
    signing.write_new(folder.settings_file, text.encode(), 0o600)
    signing.write_new(folder.policy_file, POLICY.encode(), 0o600)
    write_services("site", folder.path, data=None if data is None else data.absolute())
    return site_fingerprint(_request(folder)["request"])


def rotate_site(folder: SiteFolder) -> str:
    """New keys beside the old ones, which stay in use until the site joins with the next kit.

    Returns:
        the fingerprint of the new keys.
    """
    fresh = folder.keys / "next"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    certificates.make_node_key(fresh / "node.key")
    signing.make_key(fresh / "identity.pem")
    return site_fingerprint(_request(folder)["request"])


def write_request(folder: SiteFolder, path: Path) -> str:
    """Writes the request of a site, and returns the fingerprint that it stands for."""
    table = _request(folder)
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return site_fingerprint(table["request"])


def approve(
    folder: ServerFolder,
    request_file: Path,
    register: Callable[[Path, bytes, str], int],
    revoke: Callable[[Path, int], None],
    *,
    fingerprint: str | None = None,
    replace: bool = False,
) -> Approved:
    """Lets a site in, and writes its kit.

    Args:
        folder: the server's.
        request_file: what the site wrote.
        register: (link database, node key PEM, name) -> node id.
        revoke: (link database, node id).
        fingerprint: what the site's operator said on the telephone; checked where given.
        replace: whether a site of that name may get new keys without a signature by the old ones.
    Raises:
        InputError: the request was changed, or its name is taken.
    """
    where = str(request_file)
    request, signatures = _read_request(request_file)
    name, identity = request["name"], bytes.fromhex(request["identity"])
    found = site_fingerprint(request)
    if fingerprint is not None and not signing.same_fingerprint(fingerprint, found):
        raise InputError(
            f"the request's fingerprint is {found}, not {fingerprint}",
            where=where,
            fix="do not approve it: ask the site to send its request again",
        )
    before = folder.sites().get(name)
    message = canonical_json(request).encode()
    if before is not None and not before.revoked and before.node_key != _pem(request["node_key"]):
        known = signing.verify(before.identity, REQUEST, message, signatures.get("before", ""))
        if not (known or replace):
            raise InputError(
                f"there is a site '{name}', and its key has not signed this request",
                where=where,
                fix="is it the same hospital? then --replace, after a telephone call",
            )
        revoke(folder.link_database, before.node_id)
    if before is not None and not before.revoked and before.node_key == _pem(request["node_key"]):
        node_id = before.node_id  # the same site again: it wants a kit with today's peers
    else:
        try:
            node_id = register(folder.link_database, _pem(request["node_key"]), name)
        except ValueError as error:
            raise InputError(
                f"the node key cannot be registered: {error}",
                where=where,
                fix="`umbel site rotate` makes new keys",
            ) from None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    folder.save_site(SiteRecord(name, _pem(request["node_key"]), identity, node_id, now))
    note(folder, "site approved", site=name, fingerprint=found, replaced=before is not None)
    return Approved(name, write_kit(folder, name), found)


def write_kit(folder: ServerFolder, name: str) -> Path:
    """Writes ``NAME.kit`` with what the site may believe from now on; no secrets.

    Raises:
        InputError: no such member.
    """
    members = folder.members()
    if name not in members:
        raise InputError(
            f"'{name}' is not a member", where=str(folder.path), fix="umbel server status"
        )
    settings = folder.settings()
    kit = {
        "version": 1,
        "site": name,
        "server": f"{settings.hosts[0]}:{settings.port}",
        "authority": folder.authority.read_text(encoding="ascii"),
        "manifest_key": signing.public_bytes(signing.read_key(folder.manifest_key)).hex(),
        "node_id": members[name].node_id,
        "node_key": members[name].node_key.decode("ascii"),
        "peers": {peer: record.identity.hex() for peer, record in members.items()},
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    signature = certificates.sign_as_authority(folder.keys, canonical_json(kit).encode())
    table = {"kit": kit, "signature": base64.b64encode(signature).decode("ascii")}
    path = folder.path / f"{name}.kit"
    signing.replace_file(path, (json.dumps(table, indent=2) + "\n").encode(), 0o644)
    return path


def join(folder: SiteFolder, kit_file: Path, fingerprint: str) -> str:
    """Pins what a kit says, if the authority with this fingerprint says it; the server's address.

    Raises:
        InputError: another authority, a changed kit, or one for another site.
    """
    where = str(kit_file)
    try:
        table = json.loads(kit_file.read_text(encoding="utf-8"))
        kit, signature = table["kit"], base64.b64decode(table["signature"], validate=True)
        authority = kit["authority"].encode("ascii")
        found = certificates.authority_fingerprint(authority)
        read_kit(kit)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"not a kit: {type(error).__name__}", where=where, fix="ask for it again"
        ) from None
    if not signing.same_fingerprint(fingerprint, found):
        raise InputError(
            f"the kit is by another authority, {found}",
            where=where,
            fix="do not use it: read the fingerprint again with the server's administrator",
        )
    message = canonical_json(kit).encode()
    if not certificates.signed_by_authority(authority, message, signature):
        raise InputError("the kit was changed on its way", where=where, fix="ask for it again")
    name = folder.settings().name
    if kit["site"] != name:
        raise InputError(
            f"the kit is for '{kit['site']}', this is '{name}'", where=where, fix="take your own"
        )
    fresh = folder.keys / "next"
    if fresh.is_dir() and kit["node_key"].encode() == _node_pem(fresh / "node.key"):
        for file in fresh.iterdir():
            file.replace(folder.keys / file.name)
        fresh.rmdir()
    if kit["node_key"].encode() != _node_pem(folder.node_key):
        raise InputError(
            "the kit is for other keys than this site's",
            where=where,
            fix="send the request that `umbel site request` writes now",
        )
    signing.replace_file(folder.kit_file, json.dumps(table, indent=2).encode())
    return str(kit["server"])


def revoke_site(folder: ServerFolder, name: str, revoke: Callable[[Path, int], None]) -> None:
    """Shuts a site out; its next request is refused.

    Raises:
        InputError: no such member.
    """
    members = folder.members()
    if name not in members:
        raise InputError(
            f"'{name}' is not a member", where=str(folder.path), fix="umbel server status"
        )
    revoke(folder.link_database, members[name].node_id)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    folder.save_site(members[name]._replace(revoked=now))
    note(folder, "site revoked", site=name)


def fingerprint_of(folder: ServerFolder) -> str:
    """Of the server's authority."""
    return certificates.authority_fingerprint(folder.authority.read_bytes())


def note(folder: ServerFolder, event: str, **facts: Any) -> None:
    """An entry in the server's audit log."""
    AuditLog(folder.audit_file).add(event, **facts)


def password_hash(password: str) -> str:
    """Argon2id with a fresh salt, in the PHC format."""
    salt = secrets.token_bytes(16)
    kdf = Argon2id(salt=salt, length=32, iterations=PASSES, lanes=1, memory_cost=MEMORY_KIB)
    return kdf.derive_phc_encoded(password.encode())


def password_fits(password: str, phc: str) -> bool:
    """Whether ``phc`` is a hash of the password."""
    try:
        Argon2id.verify_phc_encoded(password.encode(), phc)
    except Exception:  # whatever is wrong with the hash or the password
        return False
    return True


def site_fingerprint(request: dict[str, Any]) -> str:
    """Of a site's name and public keys."""
    kept = {key: request[key] for key in ("name", "node_key", "identity")}
    return signing.fingerprint(canonical_json(kept).encode())


def _request(folder: SiteFolder) -> dict[str, Any]:
    keys = folder.keys / "next" if (folder.keys / "next").is_dir() else folder.keys
    identity = signing.read_key(keys / "identity.pem")
    request = {
        "version": 1,
        "name": folder.settings().name,
        "node_key": (keys / "node.key.pub").read_text(encoding="ascii").strip(),
        "identity": signing.public_bytes(identity).hex(),
        "umbel": metadata.version("umbel"),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    message = canonical_json(request).encode()
    signatures = {"identity": signing.sign(identity, REQUEST, message)}
    if keys != folder.keys:
        signatures["before"] = signing.sign(folder.identity(), REQUEST, message)
    return {"request": request, "signatures": signatures}


def _read_request(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        request, signatures = table["request"], table["signatures"]
        identity = bytes.fromhex(request["identity"])
        good = (
            re.fullmatch(NAME, request["name"]) is not None
            and signing.verify(
                identity, REQUEST, canonical_json(request).encode(), signatures["identity"]
            )
            and bool(_pem(request["node_key"]))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise InputError(
            "not a site's request, or it was changed on its way",
            where=str(path),
            fix="ask the site for the file that `umbel site request` writes",
        )
    return request, signatures


def _pem(ssh: str) -> bytes:
    key = load_ssh_public_key(ssh.encode("ascii"))
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise ValueError("not a key on P-384")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _node_pem(path: Path) -> bytes:
    key = load_ssh_private_key(path.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
