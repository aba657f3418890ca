"""A hostile server at a site's door: what it sends, and what the site opens."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.client.folder import Kit, SiteFolder
from umbel.client.guard import Accepted, Guard, Refusal
from umbel.core import audit_log, messages, seal, signing
from umbel.core.messages import HELLO, MANIFEST, MODEL, STAGES, TRAIN
from umbel.core.run_file import resolve

POLICY = """
[privacy]
unit = "example"
minimum_noise = 1.0
[limits]
minimum_cohort = 3
maximum_bytes = 20000
repeats = 2
"""


class Site:
    """A site whose server is the test."""

    def __init__(self, tmp_path: Path, policy: str = POLICY) -> None:
        self.folder = SiteFolder(tmp_path / "north")
        self.folder.make()
        self.folder.settings_file.write_text('name = "north"\n')
        self.folder.policy_file.write_text(policy)
        self.key = signing.make_key(self.folder.keys / "of-the-server.pem")
        self.guard = self.restarted()

    def restarted(self) -> Guard:
        kit = Kit("h:1", b"", signing.public_bytes(self.key), 1, {})
        noon = datetime(2026, 1, 1, 12)
        self.guard = Guard(self.folder, kit, local_time=lambda: noon)
        return self.guard

    def message(self, key: Ed25519PrivateKey | None = None, **changes: Any) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "noise": 1.0,
            "round": 1,
            "asked": 3,
            "kind": TRAIN,
            "model": b"m",
            "site": "north",
            "job": "job-1",
            **changes,
        }
        run = resolve(
            {
                "data": {"name": "npz", "classes": 2},
                "task": {"kind": "classification", "model": facts.get("of", "logistic")},
                "privacy": {"unit": "example", "noise_multiplier": facts["noise"]},
            }
        )
        text = messages.write_request(messages.write_run(run), facts["round"], "north")
        records = {MANIFEST: {MANIFEST: text}, MODEL: {MODEL: facts["model"]}}
        sealed = seal.seal(
            key or self.key,
            records,
            kind=facts["kind"],
            job=facts["job"],
            group=str(facts.get("group", facts["round"])),
            site=facts["site"],
            asked=facts["asked"],
            seconds=facts.get("seconds", 600.0),
        )
        return {**records, seal.SEAL: {seal.SEAL: sealed}}

    def decide(self, kind: str = TRAIN, **changes: Any) -> Accepted | Refusal:
        return self.guard.decide(kind, self.message(**changes))

    def log(self) -> list[dict[str, Any]]:
        return list(audit_log.read(self.folder.audit_file))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_what_the_policy_allows_is_accepted_and_written_down(site: Site) -> None:
    accepted = site.decide()
    assert isinstance(accepted, Accepted)
    (entry,) = site.log()
    assert (entry["event"], entry["job"], entry["round"]) == ("accepted", "job-1", "1")
    assert entry["nonce"] == accepted.seal.nonce


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"noise": 0.9}, "minimum_noise"),
        ({"asked": 2}, "minimum_cohort"),
        ({"model": b"x" * 20001}, "maximum_bytes"),
        ({"of": "os:system"}, "own_parts"),
        ({"site": "south"}, "seal"),
        ({"group": "2"}, "seal"),
        ({"seconds": -1000.0}, "seal"),
        ({"kind": HELLO}, "seal"),
    ],
)
def test_what_it_does_not_allow_is_refused_by_name(
    site: Site, changes: dict[str, Any], rule: str
) -> None:
    refused = site.guard.decide(TRAIN, site.message(**changes))
    assert isinstance(refused, Refusal)
    assert (refused.problem.error, refused.problem.exception) == ("policy", rule)
    (entry,) = site.log()
    assert (entry["event"], entry["rule"]) == ("refused", rule)


def test_a_request_that_the_server_did_not_seal_is_refused(site: Site, tmp_path: Path) -> None:
    stranger = signing.make_key(tmp_path / "stranger.pem")
    honest = site.message()
    forged = [
        site.message(stranger),
        {k: v for k, v in honest.items() if k != seal.SEAL},
        {**honest, MODEL: {MODEL: b"another model"}},
        {**honest, "more": {"code": "import os"}},
        {**honest, seal.SEAL: {seal.SEAL: b"bytes"}},
        {},
    ]
    for records in forged:
        refused = site.guard.decide(TRAIN, records)
        assert isinstance(refused, Refusal)
        assert refused.problem.exception == "seal"
        assert not refused.nonce
    assert [entry["event"] for entry in site.log()] == ["refused"] * len(forged)
    assert isinstance(site.guard.decide(TRAIN, honest), Accepted)


def test_a_request_is_answered_once_also_after_a_restart(site: Site) -> None:
    message = site.message()
    assert isinstance(site.guard.decide(TRAIN, message), Accepted)
    for _ in range(2):
        refused = site.guard.decide(TRAIN, message)
        assert isinstance(refused, Refusal)
        assert site.log()[-1]["reason"] == "it was answered before"
        site.restarted()


def test_work_that_a_crash_cut_off_is_taken_up_again_and_no_other(site: Site) -> None:
    begun, never_seen = site.message(), site.message()
    site.guard.decide(TRAIN, begun)
    guard = site.restarted()
    assert isinstance(guard.known(TRAIN, begun), Accepted)
    assert guard.known(TRAIN, never_seen) is None
    assert guard.known(TRAIN, {**begun, MODEL: {MODEL: b"another"}}) is None


def test_a_round_is_not_asked_for_as_often_as_the_server_likes(site: Site) -> None:
    found = []
    for _ in range(4):
        found.append(isinstance(site.decide(), Accepted))
        site.restarted()
    assert found == [True, True, True, False]
    assert site.log()[-1]["rule"] == "repeats"
    assert isinstance(site.decide(round=2), Accepted)
    assert isinstance(site.decide(job="job-2"), Accepted)


def test_a_run_is_greeted_whenever_it_is_started_again(site: Site) -> None:
    for _ in range(5):
        for kind in (HELLO, STAGES):
            message = site.message(kind=kind, round=0, asked=1)
            assert isinstance(site.guard.decide(kind, message), Accepted)
        site.restarted()
    assert isinstance(site.decide(), Accepted)


def test_the_policy_is_read_anew_for_each_request(site: Site) -> None:
    assert isinstance(site.decide(), Accepted)
    site.folder.policy_file.write_text(POLICY.replace("= 3", "= 4"))
    assert isinstance(site.decide(round=2), Refusal)
    site.folder.policy_file.unlink()
    refused = site.decide(round=3)
    assert isinstance(refused, Refusal)


def test_what_cannot_be_read_is_refused(site: Site) -> None:
    records: dict[str, Any] = {MANIFEST: {MANIFEST: "not json"}}
    text = seal.seal(
        site.key, records, kind=TRAIN, job="j", group="1", site="north", asked=3, seconds=9.0
    )
    refused = site.guard.decide(TRAIN, {**records, seal.SEAL: {seal.SEAL: text}})
    assert isinstance(refused, Refusal)
    assert refused.problem.error == "request"
    assert site.log()[-1]["expires"] > time.time()
