"""What a doctor finds: each finding says what is so, and the next step where it is not well."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import httpx
from cryptography import x509

Level: TypeAlias = Literal["ok", "warning", "error"]

SOON = timedelta(days=30)
SKEW_WARNING = 5.0
FREE_BYTES = 2_000_000_000
FREE_MEMORY = 1_000_000_000


class Finding(NamedTuple):
    """One thing that was looked at.

    Args:
        level: ``error`` where it will not work, or is not safe.
        what: that was looked at.
        found: how it is.
        fix: the next step; empty where all is well.
    """

    level: Level
    what: str
    found: str
    fix: str = ""


def worst(findings: Sequence[Finding]) -> int:
    """The exit code: 1 where there is an error, else 0."""
    return int(any(finding.level == "error" for finding in findings))


def private(loose: Sequence[Path], folder: Path) -> Finding:
    """Whether there are private files that others may read or write."""
    if loose:
        names = ", ".join(f.name for f in loose)
        return Finding(
            "error", "private files", f"others may read {names}", f"chmod -R go-rwx {folder}"
        )
    return Finding("ok", "private files", "their owner's alone")


def certificate(pem: bytes, hosts: Sequence[str], renew: str) -> Iterator[Finding]:
    """Whether a certificate is valid now and for some time, and for these hosts."""
    loaded = x509.load_pem_x509_certificate(pem)
    now, ends = datetime.now(UTC), loaded.not_valid_after_utc
    if not loaded.not_valid_before_utc <= now <= ends:
        yield Finding("error", "certificate", f"not valid now; it ends {ends:%Y-%m-%d}", renew)
    elif ends - now < SOON:
        yield Finding("warning", "certificate", f"ends {ends:%Y-%m-%d}", renew)
    else:
        yield Finding("ok", "certificate", f"valid until {ends:%Y-%m-%d}")
    names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = {str(name.value) for name in names}
    if missing := [host for host in hosts if host not in known]:
        yield Finding(
            "error",
            "certificate's names",
            f"{', '.join(missing)} not among {', '.join(sorted(known))}",
            renew,
        )
    else:
        yield Finding("ok", "certificate's names", ", ".join(sorted(known)))


def reachable(host: str, port: int, authority: bytes) -> Iterator[Finding]:
    """Whether the server answers under this authority, how its clock goes, what else is open."""
    where = f"{host}:{port}"
    try:
        socket.create_connection((host, port), timeout=5).close()
    except socket.gaierror:
        yield Finding("error", "server", f"there is no '{host}'", "check its name, and DNS")
        return
    except OSError as error:
        fix = "is the server running? does a firewall let this machine out to that port?"
        yield Finding("error", "server", f"{where} does not answer: {error.strerror or error}", fix)
        return
    context = ssl.create_default_context(cadata=authority.decode("ascii"))
    try:
        with httpx.Client(verify=context, trust_env=False, timeout=10) as client:
            sent = time.time()
            answer = client.get(f"https://{where}/health")
            heard = time.time()
            yield Finding("ok", "server", f"{where} answers over TLS")
            yield from _clock(answer.headers.get("date", ""), sent, heard)
            yield from _closed(client, where)
    except httpx.HTTPError as error:
        text = str(error)
        if "WRONG_VERSION_NUMBER" in text or "record layer" in text:
            found, fix = "it does not speak TLS", "is it Umbel's port, or a proxy's plain one?"
        elif "hostname" in text.lower() or "IP address mismatch" in text:
            found, fix = "its certificate is for other names", "ask for a kit with the right name"
        elif "CERTIFICATE_VERIFY_FAILED" in text:
            found = "its certificate is not by the authority that this site pinned"
            fix = "a proxy that opens TLS stands between, or it is another server: ask"
        else:
            found, fix = type(error).__name__, "try again; see the server's log"
        yield Finding("error", "server", f"{where}: {found}", fix)


def _clock(date: str, sent: float, heard: float) -> Iterator[Finding]:
    with contextlib.suppress(TypeError, ValueError):
        theirs = parsedate_to_datetime(date).timestamp() + 0.5  # whole seconds
        off = theirs - (sent + heard) / 2
        if abs(off) > SKEW_WARNING:
            found = f"{abs(off):.0f} s {'behind' if off > 0 else 'ahead of'} the server's"
            fix = "switch time synchronisation on (timedatectl set-ntp true)"
            yield Finding("error" if abs(off) > 240 else "warning", "clock", found, fix)
        else:
            yield Finding("ok", "clock", "agrees with the server's")


def _closed(client: httpx.Client, where: str) -> Iterator[Finding]:
    """Whether what must face nobody does face nobody."""
    open_ = [
        path
        for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task")
        if client.post(f"https://{where}{path}").status_code != 404
    ]
    if open_:
        yield Finding(
            "error",
            "gate",
            f"{', '.join(open_)} can be reached: whoever can, runs code at every site",
            "stop the server; serve with `umbel server start`, never flower-superlink alone",
        )
    else:
        yield Finding("ok", "gate", "Control and Runtime cannot be reached")


def room(folder: Path) -> Iterator[Finding]:
    """Disk and memory."""
    free = shutil.disk_usage(folder).free
    level: Level = "ok" if free > FREE_BYTES else "warning"
    fix = "" if level == "ok" else "free some: models and records are written here"
    yield Finding(level, "disk", f"{free / 1e9:.1f} GB free", fix)
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        memory = int(line.split()[1]) * 1024
        level = "ok" if memory > FREE_MEMORY else "warning"
        fix = "" if level == "ok" else "close other programs, or take a larger machine"
        yield Finding(level, "memory", f"{memory / 1e9:.1f} GB available", fix)
