"""Tells people of alerts: each once, when it begins, to the log, a webhook and by e-mail."""

from __future__ import annotations

import json
import logging
import smtplib
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from email.message import EmailMessage
from pathlib import Path
from typing import TypeAlias

from umbel.deploy.dashboard.settings import Alerts, Mail
from umbel.deploy.dashboard.source import Alert, Source, alerts

log = logging.getLogger("umbel.alerts")

TIMEOUT = 10.0

Tell: TypeAlias = Callable[[Sequence[Alert]], None]


def to_log(found: Sequence[Alert]) -> None:
    """A warning for each."""
    for alert in found:
        log.warning("%s: %s", alert.kind, alert.text)


def to_webhook(address: str) -> Tell:
    """A POST of ``{"alerts": [{"kind", "subject", "text"}]}``."""

    def tell(found: Sequence[Alert]) -> None:
        body = json.dumps({"alerts": [alert._asdict() for alert in found]}).encode()
        request = urllib.request.Request(
            address, body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            answer.read(1)

    return tell


def to_mail(settings: Mail) -> Tell:
    """One e-mail for all, over TLS."""

    def tell(found: Sequence[Alert]) -> None:
        message = EmailMessage()
        message["From"], message["To"] = settings.sender, ", ".join(settings.to)
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        message["Subject"] = f"Umbel: {found[0].kind}{more}"
        message.set_content("\n".join(f"{alert.kind}: {alert.text}" for alert in found))
        trusted = ssl.create_default_context()
        if settings.port == 465:
            server: smtplib.SMTP = smtplib.SMTP_SSL(
                settings.host, settings.port, timeout=TIMEOUT, context=trusted
            )
        else:
            server = smtplib.SMTP(settings.host, settings.port, timeout=TIMEOUT)
        with server:
            if settings.port != 465:
                server.starttls(context=trusted)
            if settings.user is not None and settings.password_file is not None:
                secret = Path(settings.password_file).read_text(encoding="utf-8").strip()
                server.login(settings.user, secret)
            server.send_message(message)

    return tell


class Watch:
    """Looks every few seconds, in a thread.

    Args:
        source: what is watched.
        settings: who is told.
    """

    def __init__(self, source: Source, settings: Alerts) -> None:
        self._source = source
        self._seconds = float(settings.seconds)
        self._tell: list[Tell] = [to_log]
        if settings.webhook is not None:
            self._tell.append(to_webhook(settings.webhook))
        if settings.mail is not None:
            self._tell.append(to_mail(settings.mail))
        self._known: set[tuple[str, str]] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    def start(self) -> None:
        """Begins; what is so already is told, too."""
        self._thread.start()

    def close(self) -> None:
        """Ends."""
        self._closing.set()
        self._thread.join(TIMEOUT)

    def look(self) -> Sequence[Alert]:
        """Tells what is new since the last look; what is over may be told again."""
        found = {(alert.kind, alert.subject): alert for alert in alerts(self._source)}
        new = [alert for key, alert in found.items() if key not in self._known]
        self._known = set(found)
        for tell in self._tell if new else ():
            try:
                tell(new)
            except (OSError, smtplib.SMTPException, ValueError) as error:
                log.error("an alert was not delivered: %s", error)
        return new

    def _run(self) -> None:
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                self.look()
            except Exception:  # a locked store, a folder under way: the next look may do
                log.exception("looking for alerts failed")
            self._closing.wait(max(1.0, self._seconds - (time.monotonic() - began)))
