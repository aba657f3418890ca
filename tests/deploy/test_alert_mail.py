"""Alerts by e-mail, to a real mail server on this machine: TLS, a name and a password."""

from __future__ import annotations

import email
import email.policy
import ssl
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope

from umbel.deploy.certificates import make_server_files
from umbel.deploy.dashboard.settings import Mail
from umbel.deploy.dashboard.source import Alert
from umbel.deploy.dashboard.watch import to_mail
from umbel.deploy.loopback import free_ports

ALERTS = [
    Alert("client offline", "aarhus", "aarhus is offline since 08:14"),
    Alert("budget", "run-1", "ε = 3.3 of 4.0 is spent"),
]


class Post:
    """A mail server that keeps what it is given."""

    def __init__(self, folder: Path) -> None:
        files = make_server_files(folder, ["localhost", "127.0.0.1"], 30)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.certificate, files.key)
        self.authority = files.authority
        self.kept: list[Envelope] = []
        self.port = free_ports(1)[0]
        self.controller = Controller(
            self,
            hostname="127.0.0.1",
            port=self.port,
            tls_context=context,
            require_starttls=True,
            auth_required=True,
            authenticator=self._may,
        )

    def _may(self, server: Any, session: Any, envelope: Any, kind: str, data: Any) -> AuthResult:
        known = (data.login, data.password) == (b"umbel", b"four words that fit")
        return AuthResult(success=known, handled=False)

    async def handle_DATA(self, server: Any, session: Any, envelope: Envelope) -> str:
        self.kept.append(envelope)
        return "250 kept"


@pytest.fixture
def post(tmp_path: Path) -> Iterator[Post]:
    made = Post(tmp_path)
    made.controller.start()
    yield made
    made.controller.stop()


def settings(post: Post, tmp_path: Path, password: str) -> Mail:
    secret = tmp_path / "password"
    secret.write_text(f"{password}\n")
    return Mail(
        host="localhost",
        port=post.port,
        sender="umbel@localhost",
        to=("federation@localhost", "night@localhost"),
        user="umbel",
        password_file=str(secret),
    )


def test_one_letter_tells_all(post: Post, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(post.authority))
    to_mail(settings(post, tmp_path, "four words that fit"))(ALERTS)
    [envelope] = post.kept
    assert envelope.rcpt_tos == ["federation@localhost", "night@localhost"]
    content = envelope.content
    assert isinstance(content, bytes)
    letter = email.message_from_bytes(content, policy=email.policy.default)
    assert isinstance(letter, EmailMessage)
    assert letter["Subject"] == "Umbel: client offline and 1 more"
    assert "ε = 3.3 of 4.0 is spent" in letter.get_content()


def test_no_letter_leaves_without_trust(
    post: Post, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ssl.SSLError):
        to_mail(settings(post, tmp_path, "four words that fit"))(ALERTS)
    monkeypatch.setenv("SSL_CERT_FILE", str(post.authority))
    with pytest.raises(OSError, match="535"):
        to_mail(settings(post, tmp_path, "another"))(ALERTS)
    assert post.kept == []
