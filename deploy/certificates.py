"""Keys and certificates of a federation: an authority, a server's certificate, keys of nodes.

Private keys are written for their owner's eyes alone (0600), and never over a file that is there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from umbel.core.signing import fingerprint, write_new

CLOCK_SKEW = timedelta(hours=1)


class ServerFiles(NamedTuple):
    """What a server shows and what its clients check it with, all PEM."""

    authority: Path
    certificate: Path
    key: Path


def make_server_files(folder: Path, hosts: Sequence[str], days: int) -> ServerFiles:
    """Makes an authority and a certificate for ``hosts`` in ``folder``.

    The authority's key is forgotten at once: it signs this one certificate and can be stolen from
    nobody.

    Args:
        folder: must exist.
        hosts: DNS names and IP addresses that clients will connect to.
        days: how long both are valid.
    Raises:
        FileExistsError: a file is there already.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    authority = _authority(key, days)
    write_new(folder / "authority.pem", authority.public_bytes(Encoding.PEM), 0o644)
    return _issue(folder, authority, key, hosts, days)


def make_authority(folder: Path, days: int) -> Path:
    """Makes an authority that is kept: ``authority.key`` (0600) and ``authority.pem``, returned.

    Raises:
        FileExistsError: a file is there already.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_new(folder / "authority.key", _private_pem(key), 0o600)
    write_new(folder / "authority.pem", _authority(key, days).public_bytes(Encoding.PEM), 0o644)
    return folder / "authority.pem"


def issue_server_files(folder: Path, hosts: Sequence[str], days: int) -> ServerFiles:
    """Makes a certificate for ``hosts`` by the authority that is kept in ``folder``.

    Raises:
        FileExistsError: there is a certificate already.
    """
    authority = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    key = load_pem_private_key((folder / "authority.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return _issue(folder, authority, key, hosts, days)


def authority_fingerprint(pem: bytes) -> str:
    """What whoever joins must be told by another way than the file itself.

    Raises:
        ValueError: not a certificate.
    """
    return fingerprint(x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER))


def sign_as_authority(folder: Path, message: bytes) -> bytes:
    """ECDSA over SHA-384 by the authority that is kept in ``folder``."""
    key = load_pem_private_key((folder / "authority.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.sign(message, ec.ECDSA(hashes.SHA384()))


def signed_by_authority(pem: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the authority of this certificate signed ``message``."""
    try:
        key = x509.load_pem_x509_certificate(pem).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(signature, message, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError, AssertionError):
        return False
    return True


def make_node_key(path: Path) -> Path:
    """Makes the key by which a node is known: ``path``, and ``path``.pub beside it, returned.

    EC P-384 in OpenSSH's format: Flower 1.41 takes no other.

    Raises:
        FileExistsError: a file is there already.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), 0o600)
    public = path.with_name(f"{path.name}.pub")
    write_new(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH), 0o644)
    return public


def _authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    name = _name("Umbel federation authority")
    return (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _issue(
    folder: Path,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    days: int,
) -> ServerFiles:
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _builder(_name(hosts[0][:64]), authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA384())
    )
    files = ServerFiles(folder / "authority.pem", folder / "server.pem", folder / "server.key")
    write_new(files.certificate, certificate.public_bytes(Encoding.PEM), 0o644)
    write_new(files.key, _private_pem(key), 0o600)
    return files


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
