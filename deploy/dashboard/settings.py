"""``dashboard.toml``, beside ``server.toml`` or in a store's folder: where it is, whom it tells."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pydantic

from umbel.client.folder import read_toml
from umbel.core.errors import InputError
from umbel.core.settings import Count, Settings, parse

FILE = "dashboard.toml"


class Mail(Settings):
    """``[alerts.mail]``: alerts by e-mail."""

    host: str
    """The mail server."""
    port: int = pydantic.Field(587, ge=1, le=65535)
    """Its port; STARTTLS is required, on 465 TLS from the beginning."""
    sender: str
    """From whom."""
    to: tuple[str, ...] = pydantic.Field(min_length=1, strict=False)
    """To whom."""
    user: str | None = None
    """Who logs in there; ``None``: nobody."""
    password_file: str | None = None
    """The file that holds the password, for its owner's eyes alone."""


class Alerts(Settings):
    """``[alerts]``: who is told what somebody should look at; the log always is."""

    seconds: Count = 15
    """How often it looks."""
    webhook: str | None = pydantic.Field(None, pattern=r"^https?://")
    """An address that is sent each alert as JSON."""
    mail: Mail | None = None
    """By e-mail."""


class DashboardSettings(Settings):
    """``dashboard.toml``: where the dashboard is."""

    listen: str = "127.0.0.1"
    """The address that it listens on; any but this machine's own needs TLS."""
    port: int = pydantic.Field(8480, ge=0, le=65535)
    """Its port; 0: any that is free."""
    hosts: tuple[str, ...] = pydantic.Field((), strict=False)
    """Names by which browsers call it, besides ``localhost`` and the address."""
    certificate: str | None = None
    """PEM file; with ``key``, TLS."""
    key: str | None = None
    """PEM file of the certificate's key."""
    alerts: Alerts = Alerts()
    """Who is told."""

    @property
    def tls(self) -> bool:
        """Whether it speaks TLS."""
        return self.certificate is not None and self.key is not None

    def names(self) -> list[str]:
        """Every name by which it may be called."""
        return ["localhost", "127.0.0.1", "::1", self.listen, *self.hosts]


def read_settings(folder: Path) -> DashboardSettings:
    """What ``dashboard.toml`` says; without one, the defaults.

    Raises:
        InputError: a key or value is wrong.
    """
    path = folder / FILE
    table = read_toml(path, "umbel dashboard") if path.is_file() else {}
    settings: DashboardSettings = parse(DashboardSettings, table, str(path))
    return settings


def require_safe(settings: DashboardSettings) -> None:
    """Refuses to show anything to a network without TLS.

    Raises:
        InputError: it would.
    """
    if settings.tls or _is_loopback(settings.listen):
        return
    raise InputError(
        f"the dashboard would listen on {settings.listen} without TLS",
        where=FILE,
        fix="set certificate and key, or listen on 127.0.0.1 and use ssh -L",
    )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
