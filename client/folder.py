"""A site's folder: where everything that a site keeps has its place.

::

    site.toml       who the site is, where its data are, whose server it obeys
    policy.toml     what it allows
    keys/           0700: node.key (its connection), identity.pem (its signature)
    kit.json        what joining pinned: the authority, the server's key, the other sites' keys
    state/          messages under way, clients' own state
    ledger/         what privacy was spent
    audit/          every acceptance and refusal, hash-chained
    logs/
    service/        a systemd unit and a compose file for this folder

Private keys are made here and never leave. Nothing below imports Flower or torch.
"""

from __future__ import annotations

import json
import stat
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.core import locks, signing
from umbel.core.errors import InputError
from umbel.core.settings import Count, Positive, Settings, parse

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a site may be called; it becomes a file's name."""


class SiteSettings(Settings):
    """``site.toml``: what the site's operator decides about the machine."""

    name: str = pydantic.Field(pattern=NAME)
    """The site's name, the client's name in runs."""
    data: str | None = None
    """Folder or file that holds its data; ``None``: where the reader looks by itself."""
    idle_seconds: Positive = 5.0
    """The longest pause between two looks for work; short ones while a run is on."""
    threads: Count | None = None
    """Threads that training may use; ``None``: torch's choice."""
    hardware: bool = True
    """Whether the server is told what processor, memory and GPU are here."""


class Kit(NamedTuple):
    """What a site was given when it joined, checked against the authority's fingerprint.

    Args:
        server: ``host:port``.
        authority: the certificate that the server's is checked with, PEM.
        manifest_key: raw Ed25519 key, 32 bytes: whose requests the site obeys.
        node_id: by which the server knows the site's connection.
        peers: site -> raw Ed25519 key, 32 bytes, the site itself included.
    """

    server: str
    authority: bytes
    manifest_key: bytes
    node_id: int
    peers: Mapping[str, bytes]


class SiteFolder:
    """The folder of a site that was initialised."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.keys = self.path / "keys"
        self.state = self.path / "state"
        self.ledger = self.path / "ledger"
        self.audit = self.path / "audit"
        self.logs = self.path / "logs"
        self.node_key = self.keys / "node.key"
        self.identity_key = self.keys / "identity.pem"
        self.settings_file = self.path / "site.toml"
        self.policy_file = self.path / "policy.toml"
        self.kit_file = self.path / "kit.json"
        self.audit_file = self.audit / "site.jsonl"
        self.lock_file = self.state / "lock"
        self.heard_file = self.state / "heard"

    def make(self) -> None:
        """Makes the folders, for the owner's eyes alone."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.keys, self.state, self.ledger, self.audit, self.logs):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o700)

    def up(self) -> tuple[bool, float | None]:
        """Whether a process takes part now, and seconds since the server last answered it."""
        try:
            heard = max(0.0, time.time() - self.heard_file.stat().st_mtime)
        except OSError:
            heard = None
        return locks.is_held(self.lock_file), heard

    def settings(self) -> SiteSettings:
        """What ``site.toml`` says.

        Raises:
            InputError: there is none, or a key or value is wrong.
        """
        settings: SiteSettings = parse(
            SiteSettings, read_toml(self.settings_file, "umbel site init"), str(self.settings_file)
        )
        return settings

    def identity(self) -> Ed25519PrivateKey:
        """The key by which the site signs."""
        return signing.read_key(self.identity_key)

    def joined(self) -> bool:
        """Whether a server has let the site in."""
        return self.kit_file.is_file()

    def kit(self) -> Kit:
        """What joining pinned.

        Raises:
            InputError: the site has not joined, or the file is damaged.
        """
        try:
            table = json.loads(self.kit_file.read_text(encoding="utf-8"))
            return read_kit(table["kit"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                "the site has not joined a server, or its kit is damaged",
                where=str(self.kit_file),
                fix="umbel site join KIT --ca-fingerprint …",
            ) from None

    def loose(self) -> list[Path]:
        """Private files that others than their owner may read or write."""
        files = [*self.keys.glob("*"), self.keys]
        return [
            f
            for f in files
            if not f.name.endswith(".pub") and f.exists() and stat.S_IMODE(f.stat().st_mode) & 0o077
        ]


def read_kit(table: Mapping[str, Any]) -> Kit:
    """A kit's inner table.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    return Kit(
        str(table["server"]),
        str(table["authority"]).encode("ascii"),
        bytes.fromhex(table["manifest_key"]),
        int(table["node_id"]),
        {str(name): bytes.fromhex(key) for name, key in table["peers"].items()},
    )


def read_toml(path: Path, maker: str) -> dict[str, Any]:
    """A settings file; ``maker``: the command that makes it.

    Raises:
        InputError: there is none, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("there is no such file", where=str(path), fix=maker) from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read it: {error}", where=str(path), fix="mend it") from None
