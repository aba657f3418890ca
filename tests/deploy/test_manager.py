"""The queue and its manager, with a process in the place of a run that does what a test wants."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from umbel.core import audit_log
from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.deploy import manager as module
from umbel.deploy import provisioning
from umbel.deploy.jobs import OVER, Job, Jobs
from umbel.deploy.manager import Manager
from umbel.deploy.server_folder import ServerFolder

# Reads its settings, counts its starts in a file, and then follows the line of the plan.
PROGRAM = """
import json, os, signal, sys, time
settings = json.loads(sys.stdin.readline())
starts = os.path.join(sys.argv[1], settings["job"])
count = len(open(starts).read()) if os.path.exists(starts) else 0
open(starts, "a").write("x")
def say(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)
def round_(n):
    say("round", round=n, of=9, record={"failures": []})
plan = sys.argv[2].split(";")[min(count, sys.argv[2].count(";"))]
print("a line that a library printed")
for word in plan.split():
    if word.startswith("start"):
        say("started", run_id=settings["resume"] or "run-1", round=int(word[5:] or 0))
    elif word.isdigit():
        round_(int(word))
    elif word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "pause":
        assert sys.stdin.readline().strip() == "pause"
        say("ended", status="paused")
    elif word == "deaf":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif word == "hang":
        time.sleep(600)
    elif word == "later":
        say("ended", status="failed", error="not now", exit_code=1, later=True)
        sys.exit(1)
    elif word.startswith("fail"):
        say("ended", status="failed", error="because", exit_code=int(word[4:]))
        sys.exit(1)
    else:
        say("ended", status=word)
"""


def run_file(name: str = "r") -> RunFile:
    table = {"data": {"name": "npz"}, "task": {"kind": "classification"}, "run": {"name": name}}
    return resolve(table)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerFolder:
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.0,))
    monkeypatch.setattr(module, "TICK", 0.02)
    folder = ServerFolder(tmp_path / "server")
    provisioning.init_server(folder, ["h"], 9000)
    return folder


@contextmanager
def managed(folder: ServerFolder, plan: str) -> Iterator[list[str]]:
    said: list[str] = []
    command = [sys.executable, "-c", PROGRAM, str(folder.path), plan]
    manager = Manager(folder, said.append, lambda table: None, command)
    manager.start()
    try:
        yield said
    finally:
        manager.close()


def until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def over(folder: ServerFolder, job: Job) -> Job:
    jobs = Jobs(folder.jobs_database)
    until(lambda: jobs.get(job.id).state in OVER)
    return jobs.get(job.id)


def starts(folder: ServerFolder, job: Job) -> int:
    return len((folder.path / job.id).read_text())


def test_the_last_words_of_a_run_are_heard_however_late_they_are_read(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen = module._listen

    def slowly(*arguments: Any) -> None:
        time.sleep(1.5)  # by then the process has ended
        listen(*arguments)

    monkeypatch.setattr(module, "_listen", slowly)
    job = Jobs(folder.jobs_database).submit(run_file(), "text", 0)
    with managed(folder, "start 1 finished"):
        assert over(folder, job).state == "finished"
    assert starts(folder, job) == 1


def test_a_run_that_got_further_is_tried_again_at_once(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.0, 3600.0))
    job = Jobs(folder.jobs_database).submit(run_file(), "text", 0)
    with managed(folder, "start 1 die;start 2 finished"):
        assert over(folder, job).state == "finished"
    assert starts(folder, job) == 2


def test_a_round_of_which_a_dying_process_could_not_speak_counts(folder: ServerFolder) -> None:
    job = Jobs(folder.jobs_database).submit(run_file(), "text", 0)
    deaths = "".join(f"start{n} die;" for n in range(1, 8))
    with managed(folder, "start die;" + deaths + "start8 finished"):
        done = over(folder, job)
    assert (done.state, done.round) == ("finished", 8)


def test_runs_are_carried_out_in_their_order(folder: ServerFolder) -> None:
    jobs = Jobs(folder.jobs_database)
    first, second = (jobs.submit(run_file(name), "text", 0) for name in ("one", "two"))
    with managed(folder, "start 1 2 finished") as said:
        done = over(folder, second)
    assert (done.state, done.round, done.run_id) == ("finished", 2, "run-1")
    assert jobs.get(first.id).state == "finished"
    assert [line for line in said if line.endswith("finished")] == [
        f"{first.id} finished",
        f"{second.id} finished",
    ]
    events = [e["event"] for e in audit_log.read(folder.audit_file)]
    assert events == ["server made"] + ["run begins", "run finished"] * 2


@pytest.mark.parametrize(
    ("plan", "state", "begun"),
    [
        ("start 1 die; start 2 die; start 3 finished", "finished", 3),
        ("die", "failed", module.ATTEMPTS),
        ("start fail1", "failed", module.ATTEMPTS),
        ("start 1 fail1; 2 fail1; 3 fail1; 4 fail1; 5 fail1; 6 fail1; finished", "finished", 7),
        ("start fail2", "failed", 1),
        ("start fail3", "failed", 1),
        ("start 1 budget_exhausted", "budget_exhausted", 1),
    ],
)
def test_a_run_is_started_again_while_it_gets_further(
    folder: ServerFolder, plan: str, state: str, begun: int
) -> None:
    job = Jobs(folder.jobs_database).submit(run_file(), "", 0)
    with managed(folder, plan):
        assert over(folder, job).state == state
    assert starts(folder, job) == begun


def test_a_run_is_paused_goes_on_and_is_stopped(folder: ServerFolder) -> None:
    jobs = Jobs(folder.jobs_database)
    job = jobs.submit(run_file(), "", 0)
    with managed(folder, "start 1 pause; start 2 hang"):
        until(lambda: jobs.get(job.id).round == 1)
        jobs.want(jobs.get(job.id), "pause")
        until(lambda: jobs.get(job.id).state == "paused")
        assert starts(folder, job) == 1
        jobs.want(jobs.get(job.id), "resume")
        until(lambda: jobs.get(job.id).round == 2)
        jobs.want(jobs.get(job.id), "stop")
        assert over(folder, job).state == "stopped"
    assert jobs.get(job.id).run_id == "run-1"
    with pytest.raises(InputError, match="is stopped"):
        jobs.want(jobs.get(job.id), "pause")


def test_a_run_waits_for_the_hours_of_its_sites_as_long_as_it_takes(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LATER_SECONDS", 0.0)
    job = Jobs(folder.jobs_database).submit(run_file(), "", 0)
    nights = 2 * module.ATTEMPTS
    with managed(folder, "start 1 later;" + "later;" * nights + "2 finished"):
        assert over(folder, job).state == "finished"
    assert starts(folder, job) == nights + 2


def test_a_run_that_waits_is_paused_at_once_and_tried_at_once_when_it_goes_on(
    folder: ServerFolder,
) -> None:
    jobs = Jobs(folder.jobs_database)
    job = jobs.submit(run_file(), "", 0)
    with managed(folder, "later; start 1 finished"):
        until(lambda: jobs.get(job.id).error == "not now; trying again")
        assert jobs.get(job.id).state == "running"
        jobs.want(jobs.get(job.id), "pause")
        until(lambda: jobs.get(job.id).state == "paused")
        jobs.want(jobs.get(job.id), "resume")
        assert over(folder, job).state == "finished"
    assert starts(folder, job) == 2


def test_a_run_under_way_comes_first_after_a_restart(folder: ServerFolder) -> None:
    jobs = Jobs(folder.jobs_database)
    job = jobs.submit(run_file(), "", 0)
    with managed(folder, "start 1 hang"):
        until(lambda: jobs.get(job.id).round == 1)
    assert jobs.get(job.id).state == "running"
    later = jobs.submit(run_file(), "", 0)
    with managed(folder, "hang; start 2 finished"):
        assert over(folder, job).round == 2
        jobs.want(jobs.get(later.id), "stop")
        assert over(folder, later).state == "stopped"


def test_an_order_while_the_server_is_down_is_obeyed(folder: ServerFolder) -> None:
    jobs = Jobs(folder.jobs_database)
    job = jobs.submit(run_file(), "", 0)
    jobs.change(job.id, state="running")
    jobs.want(jobs.get(job.id), "pause")
    with managed(folder, "finished"):
        until(lambda: jobs.get(job.id).state == "paused")
    assert not (folder.path / job.id).exists()


def test_the_manager_outlives_what_it_stumbles_over(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STUMBLE_SECONDS", 0.0)
    jobs = Jobs(folder.jobs_database)
    job = jobs.submit(run_file(), "", 0)
    settings, left = folder.settings, [OSError(28, "No space left on device")] * 3

    def broken() -> object:
        if left:
            raise left.pop()
        return settings()

    monkeypatch.setattr(folder, "settings", broken)
    with managed(folder, "start 1 finished") as said:
        assert over(folder, job).state == "finished"
    assert sum("stumbled" in line for line in said) == 3


def test_a_run_is_found_by_the_beginning_of_its_name(folder: ServerFolder) -> None:
    jobs = Jobs(folder.jobs_database)
    one, two = (jobs.submit(run_file(name), "", 0) for name in ("abc", "abd"))
    assert jobs.get("abd").id == two.id
    assert jobs.get(one.id).text == ""
    for name in ("ab", "", "x"):
        with pytest.raises(InputError, match="run"):
            jobs.get(name)


def test_a_run_that_does_not_hear_the_order_to_stop_is_ended(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.5)
    jobs = Jobs(folder.jobs_database)
    job = jobs.submit(run_file(), "", 0)
    with managed(folder, "deaf start 1 hang"):
        until(lambda: jobs.get(job.id).round == 1)
        jobs.want(jobs.get(job.id), "stop")
        assert over(folder, job).state == "stopped"
