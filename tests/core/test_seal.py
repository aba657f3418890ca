from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from umbel.core import audit_log, seal, signing
from umbel.core.audit_log import AuditLog
from umbel.core.errors import InputError, RunError
from umbel.core.seal import BrokenSealError

RECORDS = {"manifest": {"manifest": "text"}, "model": {"model": b"\0\1", "n": [1, 2]}}


def sealed(tmp_path: Path, **changes: Any) -> tuple[str, bytes]:
    path = tmp_path / "key.pem"
    key = signing.read_key(path) if path.exists() else signing.make_key(path)
    facts = {"kind": "train", "job": "j", "group": "3", "site": "a", "asked": 3, "seconds": 60.0}
    return seal.seal(key, RECORDS, **{**facts, **changes}), signing.public_bytes(key)


def test_a_seal_says_what_was_sealed(tmp_path: Path) -> None:
    text, key = sealed(tmp_path)
    opened = seal.open_seal(text, key, RECORDS, kind="train", site="a")
    assert (opened.job, opened.group, opened.asked) == ("j", "3", 3)
    assert opened.nonce != seal.open_seal(sealed(tmp_path)[0], key, RECORDS, kind="train", site="a")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"records": {**RECORDS, "model": {"model": b"\0\2", "n": [1, 2]}}}, "changed"),
        ({"records": {**RECORDS, "more": {"x": 1}}}, "changed"),
        ({"records": {**RECORDS, "model": {"model": "\0\1", "n": [1, 2]}}}, "changed"),
        ({"kind": "evaluate"}, "sealed as 'train'"),
        ({"site": "b"}, "sealed as 'train' for 'a'"),
        ({"answers": "n" * 32}, "not the pinned key's"),
        ({"now": 0.0}, "ago"),
        ({"now": 1e11}, "expired"),
        ({"text": None}, "no seal"),
        ({"text": "{}"}, "no seal"),
        ({"text": json.dumps({"seal": "{}", "signature": "AA=="})}, "not the pinned key's"),
    ],
)
def test_a_seal_holds_for_one_message_one_site_and_one_time(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    text, key = sealed(tmp_path)
    table: dict[str, Any] = {"text": text, "records": RECORDS, "kind": "train", "site": "a"}
    table |= change
    with pytest.raises(BrokenSealError, match=reason):
        seal.open_seal(table.pop("text"), key, table.pop("records"), **table)


def test_another_keys_seal_is_none(tmp_path: Path) -> None:
    text, _ = sealed(tmp_path)
    other = signing.public_bytes(signing.make_key(tmp_path / "other.pem"))
    with pytest.raises(BrokenSealError, match="not the pinned key's"):
        seal.open_seal(text, other, RECORDS, kind="train", site="a")


def test_keys_are_their_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    key = signing.make_key(tmp_path / "k.pem")
    assert (tmp_path / "k.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        signing.make_key(tmp_path / "k.pem")
    assert signing.public_bytes(signing.read_key(tmp_path / "k.pem")) == signing.public_bytes(key)
    (tmp_path / "x.pem").write_text("nothing")
    with pytest.raises(InputError, match="cannot read the key"):
        signing.read_key(tmp_path / "x.pem")


def test_a_signature_is_for_one_purpose(tmp_path: Path) -> None:
    key = signing.make_key(tmp_path / "k.pem")
    signature = signing.sign(key, "one", b"m")
    public = signing.public_bytes(key)
    assert signing.verify(public, "one", b"m", signature)
    assert not signing.verify(public, "two", b"m", signature)
    assert not signing.verify(public, "one", b"n", signature)
    assert not signing.verify(public, "one", b"m", "not base64")


def test_fingerprints_are_compared_as_people_type_them() -> None:
    one = signing.fingerprint(b"x")
    assert signing.same_fingerprint(one, one.upper().replace(":", " "))
    assert not signing.same_fingerprint(one, signing.fingerprint(b"y"))
    assert not signing.same_fingerprint("", "")


def write(path: Path, count: int = 4) -> list[str]:
    log = AuditLog(path)
    return [log.add("accepted", round=i) for i in range(count)]


def test_the_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    hashes = write(tmp_path / "log") + write(tmp_path / "log")
    entries = list(audit_log.read(tmp_path / "log"))
    assert [e["hash"] for e in entries] == hashes
    assert [e["number"] for e in entries] == list(range(1, 9))


def test_two_writers_make_one_chain(tmp_path: Path) -> None:
    one, two = AuditLog(tmp_path / "log"), AuditLog(tmp_path / "log")
    for i in range(5):
        (one if i % 2 else two).add("event", i=i)
    assert [e["i"] for e in audit_log.read(tmp_path / "log")] == list(range(5))


@pytest.mark.parametrize("change", ["edit", "remove", "swap", "add"])
def test_a_changed_log_is_found_out(tmp_path: Path, change: str) -> None:
    path = tmp_path / "log"
    write(path)
    lines = path.read_text().splitlines()
    if change == "edit":
        lines[1] = lines[1].replace('"round":1', '"round":7')
    elif change == "remove":
        del lines[1]
    elif change == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        lines.insert(2, lines[1])
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match="is not what was written"):
        list(audit_log.read(path))
    with pytest.raises(RunError, match="is not what was written"):
        AuditLog(path)


def test_a_line_that_a_power_cut_left_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path)
    with path.open("ab") as file:
        file.write(b'{"number": 5, "ev')
    assert len(list(audit_log.read(path))) == 4
    AuditLog(path).add("after")
    assert [e["event"] for e in audit_log.read(path)] == ["accepted"] * 4 + ["after"]
    assert path.with_name("log.torn").read_bytes() == b'{"number": 5, "ev'
