"""A server's folder: where everything that a server keeps has its place.

::

    server.toml     what it is called in certificates, and where it listens
    keys/           0700: authority, server certificate, manifest key, key of sessions
    admin.json      the admin's password, as an Argon2id hash
    sites/          a file for each site that was approved
    link.db         Flower's: nodes, and messages under way
    jobs.db         the queue of runs
    runs/           the run store
    audit/          who was let in, who was not, what was run; hash-chained
    logs/
    service/        a systemd unit and a compose file for this folder

Whoever may write here is the server's administrator: there is no other way to give it orders.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from umbel.client.folder import NAME, read_toml
from umbel.core import signing
from umbel.core.errors import InputError
from umbel.core.settings import Count, Settings, parse


class ServerSettings(Settings):
    """``server.toml``: what the administrator decides about the machine."""

    hosts: tuple[str, ...] = pydantic.Field(min_length=1, strict=False)
    """DNS names and addresses that sites connect to; the certificate's."""
    listen: str = "0.0.0.0"
    """The address that it listens on."""
    port: int = pydantic.Field(8443, ge=1, le=65535)
    """The port that sites connect to."""
    listen_port: int | None = pydantic.Field(None, ge=1, le=65535)
    """The port that it listens on, where something passes ``port`` on to it; ``None``: ``port``."""
    max_message_mb: Count = 2048
    """The largest message that a known site may send; anybody else: 64 kB."""
    wait_seconds: Count = 600
    """How long a run waits for its sites to be there."""


class SiteRecord(NamedTuple):
    """A site that was approved.

    Args:
        name: of the site.
        node_key: public, as Flower keeps it: PEM.
        identity: raw Ed25519 public key, 32 bytes.
        node_id: Flower's.
        approved: when, ISO 8601.
        revoked: when; empty: it is a member.
    """

    name: str
    node_key: bytes
    identity: bytes
    node_id: int
    approved: str
    revoked: str = ""


class ServerFolder:
    """The folder of a server that was initialised."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.keys = self.path / "keys"
        self.sites_folder = self.path / "sites"
        self.logs = self.path / "logs"
        self.audit = self.path / "audit"
        self.settings_file = self.path / "server.toml"
        self.authority = self.keys / "authority.pem"
        self.authority_key = self.keys / "authority.key"
        self.certificate = self.keys / "server.pem"
        self.certificate_key = self.keys / "server.key"
        self.manifest_key = self.keys / "manifest.pem"
        self.session_key = self.keys / "session.key"
        self.admin_file = self.path / "admin.json"
        self.link_database = self.path / "link.db"
        self.jobs_database = self.path / "jobs.db"
        self.store = self.path / "runs"
        self.audit_file = self.audit / "server.jsonl"
        self.status_file = self.path / "status.json"
        self.lock_file = self.path / "server.lock"
        self.clients_file = self.path / "clients.json"
        self._known: dict[Path, tuple[tuple[int, int, int], SiteRecord]] = {}

    def make(self) -> None:
        """Makes the folders, for the owner's eyes alone."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.keys, self.sites_folder, self.logs, self.audit):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o700)

    def settings(self) -> ServerSettings:
        """What ``server.toml`` says.

        Raises:
            InputError: there is none, or a key or value is wrong.
        """
        table = read_toml(self.settings_file, "umbel server init --host NAME")
        settings: ServerSettings = parse(ServerSettings, table, str(self.settings_file))
        return settings

    def sites(self) -> dict[str, SiteRecord]:
        """Every site that was ever approved, by name."""
        return {site.name: site for site in self._sites()}

    def members(self) -> dict[str, SiteRecord]:
        """The sites that may take part."""
        return {name: site for name, site in self.sites().items() if not site.revoked}

    def loose(self) -> list[Path]:
        """Private files that others than their owner may read or write."""
        secret = [self.authority_key, self.certificate_key, self.manifest_key, self.session_key]
        files = [*secret, self.admin_file, self.keys, self.path]
        return [f for f in files if f.exists() and stat.S_IMODE(f.stat().st_mode) & 0o077]

    def save_site(self, site: SiteRecord) -> None:
        """Writes a site's record in one step."""
        table = site._asdict()
        table["node_key"], table["identity"] = site.node_key.decode("ascii"), site.identity.hex()
        path = self.sites_folder / f"{site.name}.json"
        signing.replace_file(path, json.dumps(table, indent=2).encode())

    def clients(self) -> dict[str, dict[str, Any]]:
        """What sites said of themselves when they were last greeted, by name."""
        try:
            found = json.loads(self.clients_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def keep_client(self, name: str, facts: Mapping[str, Any]) -> None:
        """Notes what a site said of itself."""
        table = {**self.clients(), name: dict(facts)}
        signing.replace_file(self.clients_file, json.dumps(table, indent=2).encode())

    def _sites(self) -> Iterator[SiteRecord]:
        for path in sorted(self.sites_folder.glob("*.json")):
            try:
                status = path.stat()  # a record is replaced, never written over
                version = status.st_ino, status.st_mtime_ns, status.st_size
                known = self._known.get(path)
                if known is not None and known[0] == version:
                    yield known[1]
                    continue
                table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                table["node_key"] = table["node_key"].encode("ascii")
                table["identity"] = bytes.fromhex(table["identity"])
                self._known[path] = version, SiteRecord(**table)
                yield self._known[path][1]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(
                    "a site's record is damaged", where=str(path), fix="approve the site again"
                ) from None


__all__ = ["NAME", "ServerFolder", "ServerSettings", "SiteRecord"]
