from __future__ import annotations

import ipaddress
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from umbel.deploy.certificates import make_node_key, make_server_files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_servers_certificate_names_its_hosts_and_is_signed_by_the_authority(
    tmp_path: Path,
) -> None:
    files = make_server_files(tmp_path, ["hospital.example", "10.0.0.7"], days=3)
    authority = x509.load_pem_x509_certificate(files.authority.read_bytes())
    server = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hospital.example"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.0.0.7")]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    ends = server.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=2, hours=23) < ends <= timedelta(days=3)
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    assert key.public_key() == server.public_key()
    assert mode(files.key) == 0o600


def test_a_nodes_key_is_what_flower_takes_and_its_owners_alone(tmp_path: Path) -> None:
    public = make_node_key(tmp_path / "a.key")
    key = serialization.load_ssh_private_key((tmp_path / "a.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert serialization.load_ssh_public_key(public.read_bytes()) == key.public_key()
    assert mode(tmp_path / "a.key") == 0o600


def test_no_key_is_overwritten(tmp_path: Path) -> None:
    make_node_key(tmp_path / "a.key")
    before = (tmp_path / "a.key").read_bytes()
    with pytest.raises(FileExistsError):
        make_node_key(tmp_path / "a.key")
    assert (tmp_path / "a.key").read_bytes() == before
