from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from umbel.client.folder import SiteFolder
from umbel.deploy import findings, provisioning
from umbel.deploy.certificates import make_server_files
from umbel.deploy.doctor import examine_server, examine_site
from umbel.deploy.findings import Finding
from umbel.deploy.loopback import free_ports
from umbel.deploy.server_folder import ServerFolder


@pytest.fixture
def server(tmp_path: Path) -> tuple[ServerFolder, str]:
    folder = ServerFolder(tmp_path / "server")
    made = provisioning.init_server(folder, ["127.0.0.1"], free_ports(1)[0])
    return folder, made.fingerprint


@pytest.fixture
def site(tmp_path: Path, server: tuple[ServerFolder, str]) -> SiteFolder:
    folder = SiteFolder(tmp_path / "north")
    provisioning.init_site(folder, "north", tmp_path)
    provisioning.write_request(folder, tmp_path / "r")
    done = provisioning.approve(server[0], tmp_path / "r", lambda *_: 7, lambda *_: None)
    provisioning.join(folder, done.kit, server[1])
    return folder


def told(found: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in found}


def test_a_site_before_it_joins_is_told_how(tmp_path: Path) -> None:
    folder = SiteFolder(tmp_path / "north")
    provisioning.init_site(folder, "north", None)
    found = told(examine_site(folder))
    assert found["membership"].level == "error"
    assert "umbel site join" in found["membership"].fix
    assert found["data"].level == "warning"
    assert findings.worst(list(found.values())) == 1


def test_what_is_broken_at_a_site_is_named_with_its_mending(site: SiteFolder) -> None:
    found = told(examine_site(site))
    assert found["server"].level == "error"  # nobody listens
    assert "is the server running" in found["server"].fix
    healthy = ("private files", "connection key", "identity key", "policy", "data", "audit log")
    assert {found[what].level for what in healthy} == {"ok"}

    site.identity_key.chmod(0o644)
    site.node_key.write_text("-----BEGIN PRIVATE KEY-----\n")
    site.policy_file.write_text("[allow]\ntask = 1\n")
    site.audit_file.write_text('{"event": "forged"}\n')
    settings = site.settings_file.read_text()
    site.settings_file.write_text(settings.partition("data")[0] + 'data = "/nowhere"\n')
    found = told(examine_site(site))
    for what, fix in (
        ("private files", "chmod"),
        ("connection key", "umbel site rotate"),
        ("policy", "did you mean 'tasks'"),
        ("audit log", "evidence"),
        ("data", "site.toml"),
    ):
        assert found[what].level == "error", what
        assert fix in found[what].fix, what


def test_a_server_that_does_not_run_is_a_warning(server: tuple[ServerFolder, str]) -> None:
    folder, _ = server
    found = told(examine_server(folder))
    assert found["process"].level == "warning"
    assert not findings.worst(list(found.values()))
    folder.certificate_key.chmod(0o640)
    assert told(examine_server(folder))["private files"].level == "error"


def test_a_certificate_that_ends_or_has_other_names_is_found(tmp_path: Path) -> None:
    files = make_server_files(tmp_path, ["a.example"], days=3)
    found = told(findings.certificate(files.certificate.read_bytes(), ["b.example"], "renew"))
    assert found["certificate"].level == "warning"
    assert found["certificate's names"].level == "error"
    assert "b.example not among a.example" in found["certificate's names"].found


@contextmanager
def listening(answer: bytes) -> Iterator[int]:
    """A port that answers whoever connects with these bytes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    line, _ = listener.accept()
                except OSError:
                    return
                with line:
                    line.recv(1000)
                    line.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield int(listener.getsockname()[1])


def test_a_port_without_tls_is_told_from_one_that_is_closed(
    server: tuple[ServerFolder, str],
) -> None:
    authority = server[0].authority.read_bytes()
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        found = list(findings.reachable("127.0.0.1", port, authority))
    assert [f.level for f in found] == ["error"]
    assert "does not speak TLS" in found[0].found
    (closed,) = findings.reachable("127.0.0.1", free_ports(1)[0], authority)
    assert "does not answer" in closed.found
    (nowhere,) = findings.reachable("no-such-host.invalid", 1, authority)
    assert "there is no" in nowhere.found or "does not answer" in nowhere.found


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_data_that_cannot_be_read_are_found(site: SiteFolder, tmp_path: Path) -> None:
    closed = tmp_path / "closed.npz"
    closed.write_bytes(b"")
    closed.chmod(0)
    site.settings_file.write_text(f'name = "north"\ndata = "{closed}"\n')
    assert told(examine_site(site))["data"].level == "error"
