"""A server's folder with runs to look at, made without a network."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from umbel.core import run_file
from umbel.core.payloads import Failure
from umbel.core.run_file import RunFile
from umbel.core.trees import Model
from umbel.deploy import provisioning
from umbel.deploy.jobs import Jobs
from umbel.deploy.server_folder import ServerFolder, SiteRecord
from umbel.server.index import Dispatch
from umbel.server.records import RoundRecord, RoundResult
from umbel.server.store import RunStore

SITES = ("aarhus", "basel", "cork")
MACHINE = {"cpu": "8 × AMD EPYC 7763", "memory": "32 GiB", "gpu": "none", "system": "Linux x86_64"}
NASTY = "<script>alert('basel')</script>"


def run_of(name: str, rounds: int = 8) -> RunFile:
    """A run with a privacy budget."""
    return run_file.resolve(
        {
            "run": {"name": name, "rounds": rounds},
            "data": {"name": "npz", "classes": 2},
            "task": {"kind": "classification", "model": "logistic"},
            "privacy": {"unit": "example", "epsilon": 4.0},
        }
    )


def result(number: int, name: str) -> RoundResult:
    """A round in which one site fails, each time for another reason."""
    reasons = itertools.cycle([NASTY, "update is not finite", "no reply within 60 s"])
    reason = next(itertools.islice(reasons, number, None))
    lost = SITES[number % 3]
    record = RoundRecord(
        number,
        1.5,
        [site for site in SITES if site != lost],
        failures=[Failure(lost, reason)],
        metrics={"accuracy": 0.5 + number / 20, "loss": 1.0 / number},
        epsilon=0.45 * number,
        note="quorum missed: 1 of 2; the model stays" if number == 2 else "",
    )
    value = torch.full((3,), float(len(name) + number))
    return RoundResult(record, Model({"w": value}, {}), {})


class Made:
    """The folder, and what is in it."""

    def __init__(self, path: Path) -> None:
        self.folder = ServerFolder(path)
        made = provisioning.init_server(self.folder, ["localhost"], 9443)
        self.password = made.password
        for place, site in enumerate(SITES):
            record = SiteRecord(site, b"-", bytes(32), place + 1, "2026-11-20T09:00:00+00:00")
            self.folder.save_site(record)
            self.folder.keep_client(site, {"versions": {"umbel": "0.1.0"}, "hardware": MACHINE})
        self.store = RunStore(self.folder.store)
        self.finished = self._run("done", 8)
        self.store.finish(self.finished, "finished")
        self.other = self._run("other", 4)
        self.store.finish(self.other, "failed", error="no valid update in 3 round(s) in a row")
        self.live = self._run("live", 5)
        jobs = Jobs(self.folder.jobs_database)
        self.job = jobs.submit(run_of("live"), "", 0)
        jobs.change(self.job.id, state="running", run_id=self.live, round=5)

    def go_on(self, number: int) -> None:
        """Commits one more round of the live run."""
        self.store.commit(self.live, result(number, "live"), checkpoint=True)

    def _run(self, name: str, rounds: int) -> str:
        run_id = self.store.create(run_of(name), engine="deployment")
        for number in range(1, rounds + 1):
            asked = result(number, name)
            sent = time.time()
            told = [
                Dispatch(number, site, sent, sent + 0.4, 1000, 900)
                for site in asked.record.participants
            ]
            self.store.keep_dispatches(run_id, told)
            self.store.commit(run_id, asked, checkpoint=number == rounds)
        return run_id


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    server = Made(tmp_path_factory.mktemp("dashboard") / "server")
    yield server
    server.store.close()
