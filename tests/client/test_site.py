"""A site's life without a network: what a hostile server makes it open, and what a crash leaves."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import get_object_tree

from umbel.client.flower import site as site_module
from umbel.client.flower import site_worker
from umbel.client.flower.fleet import Delivery, GoneError, LostError
from umbel.client.flower.site import Site, plain
from umbel.client.folder import Kit, SiteFolder
from umbel.core import audit_log, messages, seal, signing
from umbel.core.messages import HELLO, MANIFEST, MODEL
from umbel.core.run_file import resolve

opened: list[str] = []
"""Every file that this process opens."""


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        opened.append(str(arguments[0]))


sys.addaudithook(watch)


class Here:
    """The worker's own code, in this process."""

    def __init__(self, folder: SiteFolder, data: Path) -> None:
        settings = {"name": "north", "data": str(data), "folder": str(folder.path)}
        self._settings = settings
        self._answer: Callable[[bytes], bytes] = site_worker.make(settings)
        self.asked = 0

    def tell_hardware(self) -> None:
        self._answer = site_worker.make({**self._settings, "hardware": True})

    def warm(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def answer(self, document: bytes, seconds: float | None) -> bytes:
        self.asked += 1
        return self._answer(document)


class Server:
    """What a site's connection leads to: the test."""

    def __init__(self) -> None:
        self.replies: list[Message] = []
        self.fetches = 0
        self.away = 0

    def fetch(self, delivery: Delivery, largest: int) -> Message:
        self.fetches += 1
        return delivery.message

    def confirm(self, delivery: Delivery) -> None:
        pass

    def send(self, reply: Message, seconds: float) -> None:
        if self.away:
            self.away -= 1
            raise LostError("away")
        self.replies.append(reply)


class Place(Site):
    """A site with its worker in this process."""

    server: Server
    here: Here
    key: Any


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[[], Place]]:
    folder = SiteFolder(tmp_path / "north")
    folder.make()
    data = tmp_path / "patients.npz"
    x = np.zeros((8, 3), np.float32)
    np.savez(data, x=x, y=np.arange(8) % 2, client=np.repeat(["north"], 8))
    folder.settings_file.write_text(f'name = "north"\ndata = "{data}"\n')
    folder.policy_file.write_text('[allow]\nstrategies = ["fedavg"]\n')
    signing.make_key(folder.identity_key)
    key = signing.make_key(tmp_path / "manifest.pem")
    kit = Kit("h:1", b"", signing.public_bytes(key), 5, {})
    made: list[Place] = []

    def make() -> Place:
        patch = pytest.MonkeyPatch()
        patch.setattr(SiteFolder, "kit", lambda self: kit)
        site = Place(folder, lambda line: None)
        patch.undo()
        site.server, site.here, site.key = Server(), Here(folder, data), key
        site._worker = site.here  # type: ignore[assignment]
        made.append(site)
        return site

    yield make
    for site in made:
        assert site._lock is not None
        site._lock.close()


def ask(site: Place, *, strategy: str = "fedavg", **changes: Any) -> Message:
    """A greeting, sealed by the server unless ``key`` says otherwise."""
    run = resolve(
        {
            "data": {"name": "npz", "classes": 2},
            "task": {"kind": "classification", "model": "logistic"},
            "strategy": {"name": strategy, **({"mu": 0.1} if strategy == "fedprox" else {})},
        }
    )
    text = messages.write_request(messages.write_run(run), 0, "")
    records: dict[str, dict[str, Any]] = {MANIFEST: {MANIFEST: text}, MODEL: {MODEL: b""}}
    sealed = seal.seal(
        changes.get("key", site.key),
        records,
        kind=HELLO,
        job="j",
        group="0",
        site="north",
        asked=1,
        seconds=60.0,
    )
    records[seal.SEAL] = {seal.SEAL: sealed}
    records |= changes.get("more", {})
    content = RecordDict({name: ConfigRecord(values) for name, values in records.items()})
    metadata = Metadata(9, "", 1, 5, "", "0", time.time(), 60.0, HELLO)
    message = make_message(metadata, content)
    message.metadata.__dict__["_message_id"] = "ab" * 32
    return message


def receive(site: Place, message: Message) -> Message:
    delivery = Delivery(message, get_object_tree(message), {})
    site._receive(site.server, delivery, 10**6)  # type: ignore[arg-type]
    return site.server.replies[-1]


def said(reply: Message) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(str(reply.content[MANIFEST][MANIFEST]))
    return table


def test_the_worker_is_told_what_the_policy_leaves_to_a_run(place: Callable[[], Place]) -> None:
    site = place()
    limits = "[limits]\nthreads = 1\nmemory_mb = 100000\ngpu_share = 0.5\n"
    site._folder.policy_file.write_text(limits)
    asked: list[bytes] = []
    answer = site.here.answer

    def heard(document: bytes, seconds: float | None) -> bytes:
        asked.append(document)
        return answer(document, seconds)

    site.here.answer = heard  # type: ignore[method-assign]
    receive(site, ask(site))
    size = int.from_bytes(asked[0][:4], "big")
    assert json.loads(asked[0][4 : 4 + size])["share"] == [1, 100000, 0.5]


def test_a_site_tells_its_hardware_where_its_operator_lets_it(place: Callable[[], Place]) -> None:
    site = place()
    assert said(receive(site, ask(site)))["hardware"] == {}
    site.here.tell_hardware()
    assert "cpu" in said(receive(site, ask(site)))["hardware"]


def test_an_honest_request_opens_the_data_and_is_answered_under_seal(
    place: Callable[[], Place], tmp_path: Path
) -> None:
    site = place()
    opened.clear()
    message = ask(site)
    reply = receive(site, message)
    assert said(reply)["examples"] > 0
    assert str(tmp_path / "patients.npz") in opened
    nonce = next(iter(site._guard._nonces))
    identity = signing.public_bytes(site._identity)
    records = plain(reply.content)
    text = records[seal.SEAL][seal.SEAL]
    opened_ = seal.open_seal(text, identity, records, kind=HELLO, site="north", answers=nonce)
    assert opened_.job == "j"


def test_a_hostile_server_never_makes_a_site_open_its_data(
    place: Callable[[], Place], tmp_path: Path
) -> None:
    site = place()
    stranger = signing.make_key(tmp_path / "stranger.pem")
    code = {"fab": {"content": b"PK", "serverapp": "evil:app"}}
    hostile = [
        (ask(site, key=stranger), "seal"),
        (ask(site, more=code), "seal"),
        (ask(site, strategy="fedprox"), "strategies"),
        (ask(site, strategy="os:system"), "strategies"),
    ]
    again = ask(site)
    receive(site, again)
    hostile.append((again, "seal"))
    site.here.asked = 0
    opened.clear()
    for message, rule in hostile:
        reply = receive(site, message)
        assert said(reply) == {"error": "policy", "exception": rule}
        assert plain(reply.content)[seal.SEAL]
    assert site.here.asked == 0
    assert str(tmp_path / "patients.npz") not in opened
    refused = [e for e in audit_log.read(site._folder.audit_file) if e["event"] == "refused"]
    assert len(refused) == len(hostile)


def test_a_site_that_was_killed_does_the_work_after_all(place: Callable[[], Place]) -> None:
    site = place()
    message = ask(site)
    site._keep(message, 1)
    records = plain(message.content)
    site._guard.decide(HELLO, records)  # and then it was killed
    assert site._lock is not None
    site._lock.close()
    again = place()
    (left,) = again._leftovers()
    again._work(again.server, left, begun=True)  # type: ignore[arg-type]
    assert said(again.server.replies[0])["client"] == "north"
    assert not list((again._folder.state / "inbox").iterdir())


def test_a_message_that_ends_the_site_each_time_is_given_up(place: Callable[[], Place]) -> None:
    site = place()
    site._keep(ask(site), 1)
    for begun in (True, True, False):
        assert site._lock is not None
        site._lock.close()
        site = place()
        assert bool(list(site._leftovers())) is begun


def test_an_answer_waits_for_a_server_that_is_away_and_the_operator_is_told(
    place: Callable[[], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_module, "SLOWEST_RETRY", 0.01)
    site = place()
    reported: list[str] = []
    site._report = reported.append
    site.server.away = 5
    assert said(receive(site, ask(site)))["client"] == "north"
    assert len(site.server.replies) == 1
    assert reported == ["no contact: away; trying again", "the server is back"]


def test_a_policy_that_is_half_edited_stops_work_and_not_the_site(
    place: Callable[[], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = place()
    policy, slept = site._folder.policy_file, 0
    whole = policy.read_text()
    policy.write_text("[allow")
    site._report = lambda line: reported.append(line)
    reported: list[str] = []

    def sleep(seconds: float) -> None:
        nonlocal slept
        slept += 1
        if slept == 2:
            policy.write_text(whole)

    def take(wait: float, have: object, largest: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(site_module.time, "sleep", sleep)
    site.server.take = take  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        site._look(site.server)  # type: ignore[arg-type]
    assert slept == 2
    assert all("no work without a policy" in line for line in reported)


def test_what_nobody_wants_any_more_is_dropped(place: Callable[[], Place]) -> None:
    site = place()

    def gone(reply: Message, seconds: float) -> None:
        raise GoneError("the run is over")

    site.server.send = gone  # type: ignore[method-assign]
    message = ask(site)
    delivery = Delivery(message, get_object_tree(message), {})
    site._receive(site.server, delivery, 10**6)  # type: ignore[arg-type]
    assert not list((site._folder.state / "inbox").iterdir())
