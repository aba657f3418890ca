from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from umbel.client.folder import SiteFolder
from umbel.core import audit_log
from umbel.core.errors import InputError
from umbel.deploy import provisioning
from umbel.deploy.server_folder import ServerFolder
from umbel.server.flower import link


def server(tmp_path: Path) -> tuple[ServerFolder, str]:
    folder = ServerFolder(tmp_path / "server")
    made = provisioning.init_server(folder, ["fed.example", "127.0.0.1"], 9000)
    return folder, made.fingerprint


def site(tmp_path: Path, name: str = "north") -> tuple[SiteFolder, Path]:
    folder = SiteFolder(tmp_path / name)
    provisioning.init_site(folder, name, tmp_path)
    request = tmp_path / f"{name}.request"
    provisioning.write_request(folder, request)
    return folder, request


class Nodes:
    """Stands for the link state where the test is about files: who is registered."""

    def __init__(self) -> None:
        self.keys: dict[int, bytes] = {}

    def register(self, database: Path, key: bytes, name: str) -> int:
        if key in self.keys.values():
            raise ValueError("this key is in use")
        number = 2**63 + len(self.keys)
        self.keys[number] = key
        return number

    def revoke(self, database: Path, number: int) -> None:
        self.keys.pop(number, None)


def approve(folder: ServerFolder, request: Path, nodes: Nodes, **options: Any) -> Path:
    return provisioning.approve(folder, request, nodes.register, nodes.revoke, **options).kit


def modes(folder: Path) -> dict[str, int]:
    return {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir() if p.is_file()}


def test_a_site_joins_a_server_and_no_secret_travels(tmp_path: Path) -> None:
    folder, fingerprint = server(tmp_path)
    north, request = site(tmp_path)
    assert not north.joined()
    kit = approve(folder, request, Nodes())
    assert provisioning.join(north, kit, fingerprint) == "fed.example:9000"
    pinned = north.kit()
    assert pinned.peers.keys() == {"north"}
    assert folder.members()["north"].node_id == pinned.node_id
    assert "PRIVATE" not in request.read_text() + kit.read_text()
    secrets = [p for p in north.keys.iterdir() if p.suffix != ".pub"]
    for secret in secrets:
        assert not stat.S_IMODE(secret.stat().st_mode) & 0o077
        body = secret.read_text().split("-----")[2].strip().replace("\n", "")
        assert body[-40:] not in request.read_text() + kit.read_text()
    assert not north.loose()
    assert {m for n, m in modes(folder.keys).items() if not n.endswith(".pem")} == {0o600}
    assert modes(folder.keys)["manifest.pem"] == 0o600
    events = [entry["event"] for entry in audit_log.read(folder.audit_file)]
    assert events == ["server made", "site approved"]


def test_the_admins_password_is_kept_as_a_hash_alone(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path / "server")
    made = provisioning.init_server(folder, ["h"], 9000)
    text = folder.admin_file.read_text()
    phc = json.loads(text)["password"]
    assert made.password not in text
    assert phc.startswith("$argon2id$")
    assert provisioning.password_fits(made.password, phc)
    assert not provisioning.password_fits(made.password + "x", phc)
    assert not provisioning.password_fits("", "nonsense")
    with pytest.raises(InputError, match="there is a server here already"):
        provisioning.init_server(folder, ["h"], 9000)


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))


def test_changed_files_and_strangers_are_refused(tmp_path: Path) -> None:
    folder, fingerprint = server(tmp_path)
    north, request = site(tmp_path)
    nodes = Nodes()
    with pytest.raises(InputError, match="the request's fingerprint is"):
        approve(folder, request, nodes, fingerprint="00" * 32)
    whole = request.read_text()
    change(request, lambda t: t["request"].update(name="south"))
    with pytest.raises(InputError, match="not a site's request, or it was changed"):
        approve(folder, request, nodes)
    request.write_text("{}")
    with pytest.raises(InputError, match="not a site's request"):
        approve(folder, request, nodes)
    assert not nodes.keys
    request.write_text(whole)
    kit = approve(folder, request, nodes)
    with pytest.raises(InputError, match="by another authority"):
        provisioning.join(north, kit, "ab" * 32)
    other, _ = site(tmp_path, "west")
    with pytest.raises(InputError, match="the kit is for 'north', this is 'west'"):
        provisioning.join(other, kit, fingerprint)
    change(kit, lambda t: t["kit"].update(server="evil.example:1"))
    with pytest.raises(InputError, match="the kit was changed on its way"):
        provisioning.join(north, kit, fingerprint)
    kit.write_text("[]")
    with pytest.raises(InputError, match="not a kit"):
        provisioning.join(north, kit, fingerprint)
    assert not north.joined()


def test_a_name_that_is_taken_needs_the_old_key_or_a_person(tmp_path: Path) -> None:
    folder, _ = server(tmp_path)
    _, request = site(tmp_path)
    nodes = Nodes()
    approve(folder, request, nodes)
    impostor, forged = site(tmp_path / "elsewhere", "north")
    with pytest.raises(InputError, match="its key has not signed this request"):
        approve(folder, forged, nodes)
    assert len(nodes.keys) == 1
    approve(folder, forged, nodes, replace=True)
    assert len(nodes.keys) == 1
    identity = bytes.fromhex(json.loads(forged.read_text())["request"]["identity"])
    assert folder.members()["north"].identity == identity
    assert impostor.settings().name == "north"


def test_keys_are_rotated_without_a_gap(tmp_path: Path) -> None:
    folder, fingerprint = server(tmp_path)
    north, request = site(tmp_path)
    nodes = Nodes()
    provisioning.join(north, approve(folder, request, nodes), fingerprint)
    before = north.node_key.read_bytes(), north.identity_key.read_bytes()
    provisioning.rotate_site(north)
    assert (north.node_key.read_bytes(), north.identity_key.read_bytes()) == before
    provisioning.write_request(north, request)
    kit = approve(folder, request, nodes)
    provisioning.join(north, kit, fingerprint)
    after = north.node_key.read_bytes(), north.identity_key.read_bytes()
    assert not set(after) & set(before)
    assert len(nodes.keys) == 1
    assert north.kit().node_id == folder.members()["north"].node_id
    assert not north.loose()


def test_later_kits_name_all_members_and_none_that_was_shut_out(tmp_path: Path) -> None:
    folder, fingerprint = server(tmp_path)
    nodes = Nodes()
    sites = {}
    for name in ("north", "south", "west"):
        sites[name], request = site(tmp_path, name)
        approve(folder, request, nodes)
    provisioning.join(sites["north"], provisioning.write_kit(folder, "north"), fingerprint)
    assert sites["north"].kit().peers.keys() == sites.keys()
    provisioning.revoke_site(folder, "west", nodes.revoke)
    provisioning.join(sites["north"], provisioning.write_kit(folder, "north"), fingerprint)
    assert sites["north"].kit().peers.keys() == {"north", "south"}
    with pytest.raises(InputError, match="'west' is not a member"):
        provisioning.write_kit(folder, "west")
    with pytest.raises(InputError, match="'west' is not a member"):
        provisioning.revoke_site(folder, "west", nodes.revoke)


def test_a_new_certificate_is_by_the_authority_that_sites_know(tmp_path: Path) -> None:
    folder, fingerprint = server(tmp_path)
    before = folder.certificate.read_bytes()
    provisioning.renew_certificate(folder)
    assert folder.certificate.read_bytes() != before
    assert provisioning.fingerprint_of(folder) == fingerprint
    assert modes(folder.keys)["server.key"] == 0o600


@pytest.mark.parametrize("name", ["", "a/b", "../a", "-a", "a" * 65, "a b"])
def test_a_name_becomes_a_files_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be a site's name"):
        provisioning.init_site(SiteFolder(tmp_path / "x"), name, None)
    assert not (tmp_path / "x").exists()


def test_the_link_state_knows_members_alone(tmp_path: Path) -> None:
    folder, _ = server(tmp_path)
    _, request = site(tmp_path)
    provisioning.approve(folder, request, link.register, link.revoke)
    member = folder.members()["north"]
    state = link.open_factory(folder.link_database).state()
    assert state.get_node_id_by_public_key(member.node_key) == member.node_id
    assert not link.nodes(state)[member.node_id].online
    with pytest.raises(ValueError, match="in use"):
        link.register(folder.link_database, member.node_key, "other")
    provisioning.revoke_site(folder, "north", link.revoke)
    assert state.get_node_id_by_public_key(member.node_key) is None
