"""The units and compose files that `init` writes, as the programs that read them see them."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from umbel.client.folder import SiteFolder
from umbel.deploy import provisioning
from umbel.deploy.server_folder import ServerFolder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("services")
    provisioning.init_server(ServerFolder(folder / "server"), ["fed.example.org"], 9443)
    data = folder / "patients.npz"
    provisioning.init_site(SiteFolder(folder / "site"), "aarhus", data)
    return folder


@pytest.mark.parametrize("kind", ["server", "site"])
def test_a_unit_may_write_its_folder_and_nothing_else(made: Path, kind: str) -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read(made / kind / "service" / f"umbel-{kind}.service")
    service = unit["Service"]
    assert service["ExecStart"].split()[-4:] == [kind, "start", "--folder", str(made / kind)]
    assert Path(service["ExecStart"].split()[0]).is_file()
    assert service["ReadWritePaths"] == str(made / kind)
    assert (service["ProtectSystem"], service["NoNewPrivileges"]) == ("strict", "yes")
    assert service["CapabilityBoundingSet"] == ""


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
@pytest.mark.parametrize("kind", ["server", "site"])
def test_systemd_takes_the_unit(made: Path, kind: str) -> None:
    unit = made / kind / "service" / f"umbel-{kind}.service"
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert unit.name not in done.stderr, done.stderr


@pytest.mark.parametrize("kind", ["server", "site"])
def test_a_compose_file_gives_a_container_what_it_needs_and_no_more(made: Path, kind: str) -> None:
    folder = made / kind
    compose = yaml.safe_load((folder / "service" / "compose.yaml").read_text())
    [service] = compose["services"].values()
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["healthcheck"]["test"][1:5] == ["umbel", kind, "status", "--check"]
    given = {secret["source"]: Path(secret["target"]) for secret in service["secrets"]}
    assert given.keys() == compose["secrets"].keys()
    for name, target in given.items():
        file = Path(compose["secrets"][name]["file"])
        assert file.is_file()
        assert file == target
    assert folder / "keys" / "authority.key" not in given.values()
    [empty] = [v.partition(":")[0] for v in service["volumes"] if v.endswith(f":{folder / 'keys'}")]
    assert not list(Path(empty).iterdir())
    assert Path(empty).stat().st_mode & 0o777 == 0o700
    if kind == "server":
        assert service["ports"] == ["9443:9443"]
    else:
        assert f"{made / 'patients.npz'}:{made / 'patients.npz'}:ro" in service["volumes"]
