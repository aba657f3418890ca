"""Real containers: a federation on a bridge network, a site killed, cut off, the server restarted.

They need an engine that speaks Docker's API and the two images:

    docker build -f deploy/containers/Dockerfile --target server -t umbel-server .
    docker build -f deploy/containers/Dockerfile --target site -t umbel-site .
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from umbel.core.errors import RunError
from umbel.deploy.demo import SITES, demo_run, write_digits
from umbel.deploy.docker_hosting import Container, Containers, connected
from umbel.deploy.loopback import Site
from umbel.deploy.network import SERVER, Network
from umbel.server.store import RunStore

pytestmark = [pytest.mark.slow, pytest.mark.flower]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    try:
        hosting = Containers()
    except RunError as missing:
        pytest.skip(f"{missing.message}; {missing.fix}")
    # Containers are another user's; pytest's own folders let nobody else in.
    folder = Path("/tmp") / tmp_path_factory.mktemp("containers").name
    folder = folder.with_name(f"umbel-{folder.name}-{tmp_path_factory.getbasetemp().name}")
    folder.mkdir()
    sites = [Site(name, folder / "data" / f"{name}.npz") for name in SITES]
    write_digits(sites)
    try:
        with Network(folder, sites, hosting=hosting, patience=600) as network:
            yield network
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def inside(network: Network, name: str, *command: str) -> tuple[int, str]:
    """Runs a command in a member's container: its exit code and what it said."""
    member = cast(Container, network.member(name))
    done = connected().containers.get(member.name).exec_run(list(command))
    return done.exit_code, done.output.decode(errors="replace")


def test_three_rounds_and_what_a_container_may_do(network: Network) -> None:
    job = network.finish(network.submit(demo_run(3)), seconds=600)
    assert (job.state, job.round, job.error) == ("finished", 3, "")
    for name in (SERVER, *SITES):
        folder = network.folder / name
        assert inside(network, name, "id", "-u")[1].strip() != "0"
        assert inside(network, name, "touch", "/opt/umbel/x")[0]
        assert not inside(network, name, "touch", str(folder / "may-write"))[0]
        kept = Path("/proc") / str(network.pid(name)) / "status"
        if kept.is_file():
            assert "CapEff:\t0000000000000000" in kept.read_text()
        kind = "server" if name == SERVER else "site"
        assert (
            inside(network, name, "umbel", kind, "status", "--check", "--folder", str(folder))[0]
            == 0
        )
    # A site sees its own data, and neither its neighbour's nor the server's keys.
    assert not inside(network, "basel", "cat", str(network.folder / "data" / "basel.npz"))[0]
    assert inside(network, "basel", "cat", str(network.folder / "data" / "cork.npz"))[0]
    assert inside(network, "basel", "ls", str(network.server.keys))[0]


def test_a_site_is_killed_and_another_cut_off_and_the_run_ends(network: Network) -> None:
    job = network.submit(demo_run(6))
    network.wait_for(lambda: network.job(job).round >= 1, "the first round", 300)
    network.kill("cork")
    network.start("cork")
    hosting = cast(Containers, network.hosting)
    back = hosting.cut(cast(Container, network.member("basel")))
    network.wait_for(lambda: "no contact" in network.log("basel"), "the loss", 300)
    back()
    assert network.finish(job, seconds=900).state == "finished"
    network.wait_for(lambda: "the server is back" in network.log("basel"), "the contact", 300)


def test_the_server_is_restarted_in_the_middle_of_a_run(network: Network) -> None:
    job = network.submit(demo_run(4))
    network.wait_for(lambda: network.job(job).round >= 1, "the first round", 300)
    network.kill(SERVER)
    network.start(SERVER)
    ended = network.finish(job, seconds=900)
    assert (ended.state, ended.round) == ("finished", 4)
    store = RunStore(network.server.store)
    assert [record.round for record in store.history(ended.run_id)] == [1, 2, 3, 4]
    store.close()
