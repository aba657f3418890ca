"""The rows beside the records, stores of earlier Umbels, and the same on a real PostgreSQL."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from umbel.core import run_file
from umbel.core.errors import InputError, UmbelError
from umbel.core.payloads import Failure
from umbel.core.trees import Model
from umbel.server import database, index, schema
from umbel.server.database import Database, locate
from umbel.server.index import Dispatch
from umbel.server.records import RoundRecord, RoundResult
from umbel.server.store import RunStore

RUN = run_file.resolve(
    {
        "run": {"name": "tiny", "rounds": 6},
        "data": {"name": "digits", "split": {"kind": "iid", "clients": 2}},
        "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [8]}},
    }
)

OLD = """
CREATE TABLE run (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, engine TEXT NOT NULL,
    started TEXT NOT NULL, finished TEXT, seconds FLOAT NOT NULL, rounds_planned INTEGER NOT NULL,
    rounds_done INTEGER NOT NULL, configuration TEXT NOT NULL, versions TEXT NOT NULL,
    engine_plan TEXT NOT NULL, error TEXT NOT NULL, pid INTEGER NOT NULL, host TEXT NOT NULL
);
CREATE TABLE round (
    run_id TEXT NOT NULL, round INTEGER NOT NULL, record TEXT NOT NULL, checkpoint TEXT,
    sha256 TEXT, PRIMARY KEY (run_id, round), FOREIGN KEY(run_id) REFERENCES run (id)
);
PRAGMA user_version = 1;
"""


def result(number: int) -> RoundResult:
    """What round ``number`` leaves; a function of the number alone."""
    record = RoundRecord(
        number,
        0.5,
        ["c0", "c1"],
        failures=[Failure("c2", "update is not finite")],
        capped=["c1"],
        training={"loss": 1.0 / number},
        metrics={"accuracy": number / 10},
        per_client={"c0": {"accuracy": 0.5}},
        epsilon=0.1 * number,
    )
    value = torch.arange(3, dtype=torch.float32) + number
    return RoundResult(record, Model({"w": value}, {}), {"m": {"w": value}})


def rows(location: str, table: sa.Table) -> list[dict[str, object]]:
    opened = Database(locate(location))
    with opened.read() as connection:
        order = list(table.primary_key)
        found = [dict(r) for r in connection.execute(sa.select(table).order_by(*order)).mappings()]
    opened.close()
    return found


def write_run(location: str) -> tuple[RunStore, str]:
    store = RunStore(location)
    run_id = store.create(RUN, engine="deployment")
    for number in range(1, 4):
        store.keep_dispatches(
            run_id, [Dispatch(number, "c0", 100.0 + number, 101.5 + number, 4000, 3000)]
        )
        store.commit(run_id, result(number), checkpoint=True)
    return store, run_id


def assert_rows(location: str, run_id: str) -> None:
    asked = rows(location, schema.dispatch_table)
    assert [(r["round"], r["client"], r["status"]) for r in asked] == [
        (number, client, status)
        for number in (1, 2, 3)
        for client, status in (("c0", "done"), ("c1", "capped"), ("c2", "failed"))
    ]
    assert (asked[0]["sent"], asked[0]["done"], asked[0]["bytes_up"]) == (101.0, 102.5, 3000)
    assert (asked[2]["reason"], asked[2]["sent"]) == ("update is not finite", None)
    measured = rows(location, schema.metric_table)
    assert {(r["scope"], r["client"], r["name"]) for r in measured} == {
        ("global", "", "accuracy"),
        ("training", "", "loss"),
        ("client", "c0", "accuracy"),
    }
    assert len(measured) == 9
    spent = [r["epsilon"] for r in rows(location, schema.privacy_table)]
    assert spent == pytest.approx([0.1, 0.2, 0.3])
    audit = [(r["event"], r["run_id"]) for r in rows(location, schema.audit_table)]
    assert audit == [("run begins", run_id), ("run finished", run_id)]
    assert [r["round"] for r in rows(location, schema.checkpoint_table)] == [2, 3]


def test_a_runs_rows_follow_from_its_records(tmp_path: Path) -> None:
    location = str(tmp_path / "runs")
    store, run_id = write_run(location)
    store.finish(run_id, "finished")
    store.close()
    assert_rows(location, run_id)


def test_rows_that_a_kill_left_out_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = str(tmp_path / "runs")
    with monkeypatch.context() as patched:
        patched.setattr(index.Index, "wake", lambda self, run_id: None)
        store, run_id = write_run(location)
        store.close()  # as a killed process leaves it: committed, without rows
    assert rows(location, schema.dispatch_table) == []
    again = RunStore(location)
    again.reopen(run_id)
    again.finish(run_id, "finished")
    again.close()
    assert len(rows(location, schema.dispatch_table)) == 9
    assert len(rows(location, schema.metric_table)) == 9


def test_rows_of_rounds_that_are_taken_back_go_too(tmp_path: Path) -> None:
    location = str(tmp_path / "runs")
    store, run_id = write_run(location)
    store.finish(run_id, "interrupted")
    store.close()
    (store.folder / run_id / "checkpoints" / "round-000003.safetensors").write_bytes(b"damaged")
    again = RunStore(location)
    assert "rounds after 2 are dropped" in again.reopen(run_id)
    assert {r["round"] for r in rows(location, schema.dispatch_table)} == {1, 2}
    assert {r["round"] for r in rows(location, schema.metric_table)} == {1, 2}
    again.commit(run_id, result(3), checkpoint=True)
    again.finish(run_id, "finished")
    again.close()
    assert len(rows(location, schema.metric_table)) == 9


def test_beyond_the_most_rows_failures_alone_are_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MOST_ROWS", 4)
    store = RunStore(tmp_path / "runs")
    run_id = store.create(RUN, engine="vectorised")
    for number in range(1, 6):
        store.commit(run_id, result(number), checkpoint=number == 5)
    store.finish(run_id, "finished")
    store.close()
    asked = rows(str(tmp_path / "runs"), schema.dispatch_table)
    assert [r["round"] for r in asked if r["status"] == "failed"] == [1, 2, 3, 4, 5]
    assert len([r for r in asked if r["status"] != "failed"]) == 2


def old_store(folder: Path) -> str:
    """A store as the first form of the tables had it, with two rounds; its run's id."""
    store = RunStore(folder / "now")
    run_id = store.create(RUN, engine="vectorised")
    for number in (1, 2):
        store.commit(run_id, result(number), checkpoint=True)
    store.finish(run_id, "interrupted")
    store.close()
    source = sqlite3.connect(folder / "now" / "umbel.db")
    target = sqlite3.connect(folder / "old.db")
    target.executescript(OLD)
    names = [row[1] for row in target.execute("PRAGMA table_info(run)")]
    marks = ", ".join("?" * len(names))
    found = source.execute(f"SELECT {', '.join(names)} FROM run").fetchall()
    target.executemany(f"INSERT INTO run VALUES ({marks})", found)
    joined = (
        "SELECT r.run_id, r.round, r.record, c.file, c.sha256 FROM round r "
        "LEFT JOIN checkpoint c ON c.run_id = r.run_id AND c.round = r.round"
    )
    target.executemany("INSERT INTO round VALUES (?, ?, ?, ?, ?)", source.execute(joined))
    target.commit()
    target.close()
    source.close()
    for name in ("umbel.db-wal", "umbel.db-shm"):
        (folder / "now" / name).unlink(missing_ok=True)
    shutil.move(folder / "old.db", folder / "now" / "umbel.db")
    return run_id


def test_an_old_store_is_opened_upgraded_and_goes_on(tmp_path: Path) -> None:
    run_id = old_store(tmp_path)
    store = RunStore(tmp_path / "now")
    assert [r.round for r in store.history(run_id)] == [1, 2]
    last = store.latest(run_id)
    assert last is not None
    assert torch.equal(last.model.params["w"], result(2).model.params["w"])
    store.reopen(run_id)
    store.commit(run_id, result(3), checkpoint=True)
    store.finish(run_id, "finished")
    store.close()
    location = str(tmp_path / "now")
    assert len(rows(location, schema.dispatch_table)) == 9
    with sqlite3.connect(tmp_path / "now" / "umbel.db") as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (database.SCHEMA,)
    raw.close()


def test_migrations_end_where_the_tables_stand(tmp_path: Path) -> None:
    old_store(tmp_path)
    opened = Database(locate(str(tmp_path / "now")))
    with opened.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    opened.close()
    scripts = ScriptDirectory(str(Path(database.__file__).parent / "migrations"))
    assert scripts.get_heads() == [schema.VERSION]


def test_a_store_of_a_newer_umbel_is_refused(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.create(RUN, engine="vectorised")
    store.close()
    with sqlite3.connect(tmp_path / "umbel.db") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.close()
    with pytest.raises(InputError, match="schema 9999"):
        RunStore(tmp_path).list()


def test_a_new_store_loads_no_alembic(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from umbel.server.store import RunStore\n"
        f"store = RunStore({str(tmp_path)!r})\n"
        "store._database._connected()\n"
        "assert store.list() == []\n"
        "print('alembic' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() in ("False", ""), done.stderr


def _postgres() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    plain = shutil.which("initdb")
    return None if plain is None else Path(plain).parent


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of this test's own, on a socket; the beginning of its URLs."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    programs = _postgres()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
    # It will not run as root, and cannot pass through a folder that is root's alone.
    root = Path("/tmp") / f"umbel-pg-{os.getpid()}-{time.monotonic_ns()}"
    root.mkdir(mode=0o755)
    as_user: dict[str, object] = {}
    if os.geteuid() == 0:
        try:
            who = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres'")
        os.chown(root, who.pw_uid, who.pw_gid)
        as_user = {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
    data = root / "data"
    made = subprocess.run(
        [programs / "initdb", "-D", data, "-U", "umbel", "-A", "trust", "--no-sync", "-E", "UTF8"],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        **as_user,  # type: ignore[call-overload]
    )
    assert made.returncode == 0, made.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [programs / "postgres", "-D", data, "-k", root, "-p", str(port), "-h", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=root,
        **as_user,  # type: ignore[call-overload]
    )
    try:
        until = time.monotonic() + 120
        url = f"postgresql+psycopg://umbel@127.0.0.1:{port}"
        engine = sa.create_engine(f"{url}/postgres", isolation_level="AUTOCOMMIT")
        while True:
            try:
                with engine.connect() as connection:
                    connection.exec_driver_sql("CREATE DATABASE fresh")
                    connection.exec_driver_sql("CREATE DATABASE old")
                break
            except sa.exc.OperationalError:
                assert server.poll() is None, "PostgreSQL ended"
                assert time.monotonic() < until, "PostgreSQL does not answer"
                time.sleep(0.2)
        engine.dispose()
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # not waiting for connections that a test left open
        server.wait()
        shutil.rmtree(root, ignore_errors=True)


def test_the_same_store_on_postgresql(postgresql: str, tmp_path: Path) -> None:
    location = f"{postgresql}/fresh?folder={tmp_path}"
    store, run_id = write_run(location)
    with pytest.raises(InputError, match="is running already"):
        RunStore(location).reopen(run_id)
    store.finish(run_id, "interrupted")
    entry = RunStore(location).get("latest")
    assert (entry.status, entry.rounds_done) == ("interrupted", 3)
    again = RunStore(location)
    again.reopen(run_id)
    last = again.latest(run_id)
    assert last is not None
    assert torch.equal(last.model.params["w"], result(3).model.params["w"])
    again.commit(run_id, result(4), checkpoint=True)
    again.finish(run_id, "finished")
    assert [r.round for r in again.history(run_id)] == [1, 2, 3, 4]
    assert len(rows(location, schema.dispatch_table)) == 12
    opened = Database(locate(location))
    with opened.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    opened.close()


def test_postgresql_is_migrated_once_by_whoever_comes_first(
    postgresql: str, tmp_path: Path
) -> None:
    url = f"{postgresql}/old"
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in OLD.split(";"):
            if statement.strip() and "PRAGMA" not in statement:
                connection.exec_driver_sql(statement)
    engine.dispose()
    program = (
        "import sys; from umbel.server.store import RunStore; print(RunStore(sys.argv[1]).list())"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, f"{url}?folder={tmp_path}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        out, error = process.communicate(timeout=900)
        assert out.strip() == "[]", error


def test_a_database_that_is_away_is_one_error_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with pytest.raises(UmbelError, match="failed") as caught:
        RunStore(f"postgresql://umbel:secret@127.0.0.1:1/none?folder={tmp_path}").list()
    assert "secret" not in str(caught.value)
    assert caught.value.fix
