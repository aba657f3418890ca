from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbel.cli.main import run as umbel
from umbel.core.errors import InputError, RunError
from umbel.simulations.flower_apps import run_flower_app

APPS = Path(__file__).parent / "flower_apps"
EXAMPLE = Path(__file__).parents[2] / "examples" / "flower_app"

PYPROJECT = """
[project]
name = "little"
version = "1.0.0"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "little:server"
clientapp = "little_client:client"
[tool.flwr.app.config]
size = 3
name.inner = "a"
"""

CLIENT = """
import os, sys, time
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
client = ClientApp()

def reply(message, **values):
    return Message(RecordDict({"r": ConfigRecord(values)}), reply_to=message)

"""

SERVER = """
import json, os, sys, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
server = ServerApp()

def ask(grid, kind="query", nodes=None, timeout=None, ttl=None, **values):
    content = RecordDict({"c": ConfigRecord(values)})
    nodes = list(grid.get_node_ids()) if nodes is None else nodes
    messages = [Message(content, node, kind, ttl=ttl) for node in nodes]
    return list(grid.send_and_receive(messages, timeout=timeout))

def values(reply):
    return [reply.error.code, reply.error.reason] if reply.has_error() else dict(reply.content["r"])

@server.main()
def main(grid, context):
"""


def little(folder: Path, client: str, server: str) -> Path:
    """An app whose ServerApp has ``server`` for a body, of which ``found`` is printed as JSON."""
    body = "".join(f"    {line}\n" for line in server.strip().splitlines())
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "little.py").write_text(f"{SERVER}{body}    print(json.dumps(found))\n")
    (folder / "little_client.py").write_text(CLIENT + client)
    return folder


def found(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def results(out: Path) -> tuple[dict[str, np.ndarray], Any]:
    """The final model, and the metrics of each round."""
    with np.load(out / "model.npz") as arrays:
        return dict(arrays), json.loads((out / "metrics.json").read_text())


def run_app(name: str, out: Path, **options: Any) -> tuple[dict[str, np.ndarray], Any]:
    out.mkdir()
    random.seed(0)  # from which Flower's strategies sample
    done = run_flower_app(APPS / name, run_config=[f"out='{out}'"], **options)
    assert done.status == "finished"
    assert (done.messages, done.errors, done.supernodes) == (24, 0, 4)
    return results(out)


def agree(left: Any, right: Any) -> None:
    for name, value in left[0].items():
        np.testing.assert_allclose(value, right[0][name], rtol=1e-4, atol=1e-5)
    for kind, rounds in left[1].items():
        for number, metrics in rounds.items():
            assert metrics == pytest.approx(right[1][kind][number], rel=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param("pytorch", marks=pytest.mark.slow), "sklearn", "numpy"]
)
def test_an_app_learns_whatever_the_number_of_processes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer processes have more threads each, and torch's sums depend on how many there are.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one, three = (run_app(name, tmp_path / str(k), processes=k) for k in (1, 3))
    agree(one, three)
    first, last = one[1]["evaluate"]["1"], one[1]["evaluate"]["3"]
    assert all(last[k] < first[k] for k in first if "loss" in k or "rmse" in k)
    assert all(last[k] > first[k] for k in first if "acc" in k)
    if name != "numpy":  # the server of older apps sums in the order of its own threads
        for key, value in one[0].items():
            np.testing.assert_array_equal(value, three[0][key])
    if name == "pytorch":  # counted in the nodes' states
        assert [one[1]["train"][r]["trips"] for r in "123"] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.parametrize("name", ["pytorch", "sklearn", "numpy"])
def test_it_agrees_with_flowers_own_simulation(name: str, tmp_path: Path) -> None:
    ours = run_app(name, tmp_path / "ours")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    module = "umbel.server.flower.ray_simulation"
    command = [sys.executable, "-m", module, str(APPS / name), "--run-config", f"out='{theirs}'"]
    subprocess.run(command, check=True, timeout=900, stdin=subprocess.DEVNULL)
    agree(ours, results(theirs))


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_flower_app(EXAMPLE, supernodes=4, run_config=["num-server-rounds=6"])
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("accuracy after round 6: ")
    assert float(line.split()[-1]) > 0.5


def test_a_node_sees_what_flower_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = """
def mod(message, context, call):
    out = call(message, context)
    out.content["r"]["mod"] = True
    return out

@client.lifespan()
def life(context):
    context.born = True
    yield

@client.query("who", mods=[mod])
def who(message, context):
    from flwr.supercore.task_identity import TaskIdentity
    m = message.metadata
    assert context.born and m.delivered_at and m.message_id
    assert TaskIdentity.node_id == context.node_id == m.dst_node_id
    config, node = context.run_config, context.node_config
    return reply(message, part=node["partition-id"], parts=node["num-partitions"],
        size=config["size"], inner=config["name.inner"], cwd=os.getcwd(), path=sys.path[0],
        sent=message.content["c"]["x"], node=str(context.node_id))
"""
    server = """
nodes = list(grid.get_node_ids())
replies = ask(grid, "query.who", nodes=nodes[::-1], x=7)
assert [r.metadata.src_node_id for r in replies] == nodes[::-1]
assert len(set(nodes)) == 5 and min(nodes) > 1000
assert context.run_config["size"] == 8
found = [values(r) for r in replies], [str(n) for n in nodes]
"""
    app = little(tmp_path, client, server)
    done = run_flower_app(app, supernodes=5, run_config=["size=8 name.inner='b'"], processes=2)
    replies, nodes = found(capsys)
    assert [r["part"] for r in replies] == [4, 3, 2, 1, 0]
    assert [r["node"] for r in replies] == nodes[::-1]
    for r in replies:
        assert (r["parts"], r["size"], r["inner"], r["sent"], r["mod"]) == (5, 8, "b", 7, True)
        assert (r["cwd"], r["path"]) == (os.getcwd(), str(tmp_path))
    assert done.messages_by_type == {"query.who": 5}
    assert (done.app, done.run_config) == ("little", {"size": 8, "name.inner": "b"})


def test_what_goes_wrong_at_a_node_is_its_reply(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client = """
@client.query()
def q(message, context):
    what, part = message.content["c"]["what"], context.node_config["partition-id"]
    trips = context.state["t"]["n"] + 1 if "t" in context.state else 1
    context.state["t"] = MetricRecord({"n": trips})
    if part == 1 and what == "raise":
        raise KeyError("a secret of this node")
    if part == 1 and what == "exit":
        sys.exit(3)
    if part == 1 and what == "die":
        os.kill(os.getpid(), 9)
    if part == 1 and what == "none":
        return None
    if part == 1 and what == "config":
        context.run_config["size"] = 0
    return reply(message, trips=trips)
"""
    server = """
kinds = ["fine", "raise", "die", "exit", "none", "config", "die", "fine"]
found = [[values(r) for r in ask(grid, what=k)] for k in kinds]
found.append(values(ask(grid, "train", nodes=list(grid.get_node_ids())[:1])[0]))
"""
    done = run_flower_app(little(tmp_path, client, server), supernodes=4, processes=2)
    out, errors = capfd.readouterr()
    replies = json.loads(out.splitlines()[-1])
    for number, row in enumerate(replies[:-1], 1):
        assert [row[i] for i in (0, 2, 3)] == [{"trips": number}] * 3
    fine, raised, died, left, none, config, again, last = (row[1] for row in replies[:-1])
    assert fine == {"trips": 1}
    assert last == {"trips": 2}, "a state is what the last message left that was answered"
    assert raised[0] == left[0] == 2
    assert "a secret of this node" in raised[1]
    assert died[0] == again[0] == 8
    assert "SIGKILL" in died[1]
    assert none[0] == config[0] == 0
    assert "run_config" in config[1]
    assert replies[-1][0] == 2
    assert "No train function registered" in replies[-1][1]
    assert done.errors == 7
    assert "KeyError: 'a secret of this node'" in errors
    assert 'little_client.py", line' in errors


def test_messages_expire_and_waits_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = """
@client.query()
def q(message, context):
    if context.node_config["partition-id"] == 0:
        time.sleep(600)
    return reply(message, ok=True)
"""
    server = """
nodes = list(grid.get_node_ids())
expired = ask(grid, ttl=2.0)
late = ask(grid, nodes=nodes[:2], timeout=2.0)
ids = list(grid.push_messages([Message(RecordDict(), nodes[2], "query")]))
pulled = []
while not pulled:
    pulled = list(grid.pull_messages(ids))
    time.sleep(0.01)
again = list(grid.pull_messages(ids))
nobody = list(grid.push_messages([Message(RecordDict(), 5, "query")]))
source = expired[0].metadata.src_node_id == nodes[0]
replies = [values(r) for r in [*expired, *late, *pulled, *again]]
found = replies, source, nobody, ask(grid, timeout=0)
"""
    run_flower_app(little(tmp_path, client, server), supernodes=3, processes=2)
    replies, source, nobody, none = found(capsys)
    assert [r[0] if isinstance(r, list) else r["ok"] for r in replies] == [
        3,
        True,
        True,
        True,
        True,
        3,
    ]
    assert source, "an expired message is its node's"
    assert nobody == none == []


def test_a_server_that_changes_what_it_sent_reaches_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = """
@client.query()
def q(message, context):
    time.sleep(0.2)
    message.content["c"]["x"] += 1  # its own copy
    return reply(message, x=message.content["c"]["x"])
"""
    server = """
content = RecordDict({"c": ConfigRecord({"x": 1})})
ids = list(grid.push_messages([Message(content, n, "query") for n in grid.get_node_ids()]))
content["c"]["x"] = 100
pulled = {}
while len(pulled) < len(ids):
    pulled |= {r.metadata.reply_to_message_id: values(r)["x"] for r in grid.pull_messages(ids)
               if not r.has_error()}
    time.sleep(0.05)
found = sorted(pulled.values())
"""
    run_flower_app(little(tmp_path, client, server), supernodes=4, processes=1)
    assert found(capsys) == [2, 2, 2, 2]


def test_nodes_work_at_the_same_time_and_one_node_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = """
@client.query()
def q(message, context):
    part, folder = context.node_config["partition-id"], message.content["c"]["folder"]
    open(f"{folder}/{part}", "w").close()
    while not os.path.exists(f"{folder}/{1 - part}"):  # until the other one works too
        time.sleep(0.01)
    trips = context.state["t"]["n"] + 1 if "t" in context.state else 1
    context.state["t"] = MetricRecord({"n": trips})
    return reply(message, trips=trips)
"""
    server = f"""
nodes = list(grid.get_node_ids())
replies = ask(grid, nodes=[*nodes, *nodes, *nodes], folder={str(tmp_path)!r})
found = [values(r)["trips"] for r in replies]
"""
    run_flower_app(little(tmp_path, client, server), supernodes=2, processes=2)
    assert found(capsys) == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "on_import",
    [
        "",
        "import threading\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n",
    ],
    ids=["split off", "started afresh"],
)
def test_workers_have_random_numbers_of_their_own(
    on_import: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = f"""
import random
import numpy as np
random.seed(3)
{on_import}
@client.query()
def q(message, context):
    part, folder = context.node_config["partition-id"], message.content["c"]["folder"]
    open(f"{{folder}}/{{part}}", "w").close()
    while not os.path.exists(f"{{folder}}/{{1 - part}}"):
        time.sleep(0.01)
    return reply(message, seeded=random.random(), free=np.random.rand())
"""
    server = f"found = [values(r) for r in ask(grid, folder={str(tmp_path)!r})]"
    run_flower_app(little(tmp_path, client, server), supernodes=2, processes=2)
    one, two = found(capsys)
    assert one["seeded"] == two["seeded"], "as in two processes that import the app"
    assert one["free"] != two["free"]


@pytest.mark.parametrize(
    ("file", "old", "new", "where", "says"),
    [
        ("pyproject.toml", 'serverapp = "little:server"', "", "pyproject.toml", "serverapp"),
        ("pyproject.toml", "little:server", "little", "components", "module:attribute"),
        ("pyproject.toml", "[project]", "[project", "pyproject.toml", "line"),
        ("pyproject.toml", "little:server", "little:main", "little:main", "not a ServerApp"),
        ("pyproject.toml", "little_client:client", "nowhere:client", "nowhere:client", "nowhere"),
        ("little.py", "import json", "import no_such_package", "little.py:2", "no_such_package"),
        ("little.py", "import json", "import json json", "little.py:2", "SyntaxError"),
        ("little_client.py", "client = ", "1 / 0\nclient = ", "little_client.py:5", "ZeroDivision"),
        (
            "little_client.py",
            "client = ClientApp()",
            "client = 3",
            "little_client",
            "not a ClientApp",
        ),
    ],
)
def test_an_app_that_cannot_be_loaded_is_one_clear_error(
    file: str, old: str, new: str, where: str, says: str, tmp_path: Path
) -> None:
    app = little(tmp_path, "", "found = 0")
    text = (app / file).read_text()
    assert old in text
    (app / file).write_text(text.replace(old, new))
    with pytest.raises(InputError) as raised:
        run_flower_app(app)
    assert where in raised.value.where
    assert says in raised.value.message
    assert raised.value.fix


def test_options_are_checked(tmp_path: Path) -> None:
    app = little(tmp_path, "", "found = 0")
    with pytest.raises(InputError, match=r"unknown key 'siz'.*did you mean 'size'"):
        run_flower_app(app, run_config=["siz=1"])
    with pytest.raises(InputError, match="no key=value"):
        run_flower_app(app, run_config=["size"])
    with pytest.raises(InputError, match="supernodes = 0"):
        run_flower_app(app, supernodes=0)
    with pytest.raises(InputError, match=r"no pyproject\.toml"):
        run_flower_app(tmp_path / "nowhere")


def test_what_the_server_app_raises_has_a_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match="ValueError: ouch") as raised:
        run_flower_app(little(tmp_path, "", "raise ValueError('ouch')"))
    assert raised.value.where.startswith("little.py:")
    assert "Traceback" in capsys.readouterr().err
    assert "little" not in sys.modules
    assert str(tmp_path) not in sys.path


def test_json_has_stdout_for_itself(tmp_path: Path) -> None:
    client = """
@client.query()
def q(message, context):
    print("a client's line")
    return reply(message)
"""
    app = little(tmp_path, client, "found = len(ask(grid))")
    command = "from umbel.cli.main import main; main()"
    arguments = ["flower", str(app), "--format", "json", "--supernodes", "3", "--processes", "1"]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["status"] == "finished"
    assert (told["app"], told["supernodes"], told["processes"], told["messages"]) == (
        "little",
        3,
        1,
        3,
    )
    assert done.stderr.count("a client's line") == 3


def test_the_verb_fails_by_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert umbel(["flower", str(tmp_path), "--format", "json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["where"] == str(tmp_path)
    app = little(tmp_path, "", "sys.exit('no')")
    assert umbel(["flower", str(app), "--format", "json"]) == 1
    assert "no" in json.loads(capsys.readouterr().out)["error"]["message"]


BUSY = """
@client.query()
def q(message, context):
    open(message.content["c"]["folder"] + f"/{os.getpid()}.pid", "w").close()
    open(message.content["c"]["folder"] + f"/{os.getppid()}.pid", "w").close()
    while True:
        pass
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(number: signal.Signals, tmp_path: Path) -> None:
    app = little(tmp_path, BUSY, f"found = ask(grid, folder={str(tmp_path)!r})")
    command = "from umbel.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "flower", str(app), "--processes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while len(pids := list(tmp_path.glob("*.pid"))) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(pids) == 3, "two workers and what they were split off from"
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (-9 if number == signal.SIGKILL else 1)
    if number != signal.SIGKILL:
        assert errors.count("Traceback") == 0, errors
        assert "interrupted" in errors
    while not all(gone(int(p.stem)) for p in pids) and time.monotonic() < end + 30:
        time.sleep(0.05)
    assert all(gone(int(p.stem)) for p in pids)
