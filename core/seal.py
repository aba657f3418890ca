"""The seal on a message between a server and a site: who wrote it, to whom, when, and what.

A site obeys no message without its server's seal. The seal covers every value of the message, so
that whoever stands between, or breaks into the machine that passes messages on, can neither change
one nor send it twice.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any, TypeAlias

import pydantic
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.core import signing
from umbel.core.settings import Natural, Settings

SEAL = "seal"
"""The record of a message that holds its seal, under the same name."""

REQUEST, REPLY = "request", "reply"
CLOCK_SKEW = 300.0
"""Seconds that the clocks of a server and a site may differ by."""

Records: TypeAlias = Mapping[str, Mapping[str, Any]]
"""What a message holds: record -> key -> text, bytes, number or a list of those."""


class Seal(Settings):
    """What is sealed.

    Args:
        kind: the type of the message, such as ``train``.
        job: the run, as the server's queue calls it.
        group: the round, as text.
        site: whom a request is for, whom a reply is from.
        asked: how many sites are asked at the same time.
        digest: of the message's records.
        answers: the nonce of the request that a reply answers; empty in a request.
        issued: seconds since 1970, UTC.
        expires: the same; a request is not obeyed later.
        nonce: no two seals have one.
    """

    kind: str
    job: str
    group: str
    site: str
    asked: Natural
    digest: str
    answers: str
    issued: float
    expires: float
    nonce: str = pydantic.Field(min_length=32, max_length=64)


class BrokenSealError(Exception):
    """A seal that does not hold, with the reason."""


def seal(
    key: Ed25519PrivateKey,
    records: Records,
    *,
    kind: str,
    job: str,
    group: str,
    site: str,
    asked: int,
    seconds: float,
    answers: str = "",
) -> str:
    """The seal of ``records``, by the owner of ``key``, for ``seconds`` from now."""
    now = time.time()
    sealed = Seal(
        kind=kind,
        job=job,
        group=group,
        site=site,
        asked=asked,
        digest=digest(records),
        answers=answers,
        issued=now,
        expires=now + seconds,
        nonce=secrets.token_hex(16),
    )
    text = _json(sealed.model_dump())
    signature = signing.sign(key, REPLY if answers else REQUEST, text.encode())
    return _json({"seal": text, "signature": signature})


def open_seal(
    text: object,
    public_key: bytes,
    records: Records,
    *,
    kind: str,
    site: str,
    answers: str = "",
    now: float | None = None,
) -> Seal:
    """The seal, if it is the owner's of ``public_key``, for these records, this site and this time.

    Raises:
        BrokenSealError: it is not; nothing in the message is to be believed.
    """
    try:
        outer = json.loads(text) if isinstance(text, str) else {}
        inner, signature = outer["seal"], outer["signature"]
        valid = signing.verify(public_key, REPLY if answers else REQUEST, inner.encode(), signature)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BrokenSealError("it has no seal") from None
    if not valid:
        raise BrokenSealError("its signature is not the pinned key's")
    try:
        found = Seal.model_validate_json(inner)
    except pydantic.ValidationError:
        raise BrokenSealError("its seal is of another version") from None
    clock = time.time() if now is None else now
    if found.digest != digest(records):
        raise BrokenSealError("its content was changed")
    if (found.kind, found.site) != (kind, site):
        raise BrokenSealError(f"it was sealed as '{found.kind}' for '{found.site}'")
    if found.answers != answers:
        raise BrokenSealError("it answers another message")
    if not found.issued - CLOCK_SKEW <= clock <= found.expires + CLOCK_SKEW:
        raise BrokenSealError(f"it was sealed {clock - found.issued:.0f} s ago, or has expired")
    return found


def digest(records: Records) -> str:
    """SHA-256 over all records but the seal's own; types count, the order does not."""
    total = hashlib.sha256()
    for name in sorted(records):
        if name == SEAL:
            continue
        for key in sorted(records[name]):
            value = records[name][key]
            if isinstance(value, bytes):
                shown: Any = hashlib.sha256(value).hexdigest()
            else:
                shown = value if not isinstance(value, list) else [_plain(v) for v in value]
            line = _json([name, key, type(value).__name__, shown])
            total.update(len(line.encode()).to_bytes(8, "big") + line.encode())
    return total.hexdigest()


def _plain(value: Any) -> Any:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=True)
