"""The command line as its callers see it: JSON on stdout, exit codes, one clear error."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from umbel import __version__
from umbel.cli import main, output
from umbel.cli.progress import Lines, Live, describe
from umbel.core.payloads import Failure
from umbel.server.records import RoundRecord
from umbel.server.store import RunStore
from umbel.simulations import simulate as simulation

RUN = """
[run]
name = "tiny"
rounds = 3
[data]
name = "digits"
split = { kind = "iid", clients = 3 }
[task]
kind = "classification"
model = "logistic"
[client]
local_steps = 1
batch_size = 8
[strategy]
cohort = 2
"""

KEYS = {"run_id", "status", "rounds", "seconds", "metrics", "per_client", "privacy", "model"}
KEYS |= {"history"}

Json = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file, and a store that holds two finished runs of it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cli")
    (folder / "run.toml").write_text(RUN)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main.run(["simulate", "run.toml"]) == 0
        command = ["simulate", "run.toml", "--set", "client.lr=0.5", "run.name=fast"]
        assert main.run([*command, "--engine", "sequential"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def at(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def ask(at: Path, capsys: pytest.CaptureFixture[str]) -> Json:
    """Runs a verb with ``--format json``: the exit code, and the one object on stdout."""

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main.run([*arguments, "--format", "json"])
        text = capsys.readouterr().out

        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        found: dict[str, Any] = json.loads(text, parse_constant=refuse)
        return code, found

    return run


@pytest.fixture
def say(at: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a verb: the exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.run(arguments)
        return code, *capsys.readouterr()

    return run


Say = Callable[..., tuple[int, str, str]]

HEAVY = "torch flwr sklearn matplotlib pandas numpy sqlalchemy pydantic"


@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from umbel.cli.main import run\n"
        f"code = run({arguments!r})\n"
        f"print([m for m in {HEAVY!r}.split() if m in sys.modules], code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "[] 0"
    assert done.stdout


def test_version(ask: Json, say: Say) -> None:
    assert say("--version") == (0, f"umbel {__version__}\n", "")
    code, found = ask("version")
    assert (code, found["umbel"], found["torch"]) == (0, __version__, torch.__version__)
    assert __version__ in say("version")[1]


def test_simulate_keeps_the_contract(ask: Json, at: Path) -> None:
    code, found = ask("simulate", "run.toml", "--store", "other", "--set", "run.rounds=2")
    assert code == 0
    assert set(found) == KEYS
    assert (found["status"], found["rounds"], found["privacy"]) == ("finished", 2, None)
    assert [r["round"] for r in found["history"]] == [1, 2]
    assert {"round", "seconds", "participants", "failures", "metrics"} <= set(found["history"][0])
    assert found["metrics"] == found["history"][-1]["metrics"]
    assert set(safetensors.torch.load_file(found["model"])) == {"1.weight", "1.bias"}
    assert (at / "other" / found["run_id"] / "run.toml").read_text() == RUN


def test_simulate_in_text_shows_rounds_then_a_table(say: Say) -> None:
    code, out, err = say("simulate", "run.toml", "--store", "other")
    assert code == 0
    assert "round 3/3" in err
    assert "finished: 3 rounds" in out
    assert "accuracy" in out
    assert "model: other" in out


def test_resume_goes_on_without_the_run_file(ask: Json) -> None:
    _, first = ask("simulate", "run.toml", "--store", "grow")
    arguments = ["--resume", first["run_id"][:20], "--store", "grow", "--set", "run.rounds=5"]
    code, grown = ask("simulate", *arguments)
    assert code == 0
    assert (grown["run_id"], grown["rounds"]) == (first["run_id"], 5)
    assert grown["history"][:3] == first["history"]
    _, straight = ask("simulate", "run.toml", "--store", "grow", "--set", "run.rounds=5")
    assert Path(grown["model"]).read_bytes() == Path(straight["model"]).read_bytes()
    _, listed = ask("runs", "--store", "grow")
    resumed = next(r for r in listed["runs"] if r["run_id"] == grown["run_id"])
    assert (resumed["rounds"], resumed["rounds_planned"]) == (5, 5)


def test_an_interrupted_run_says_how_to_go_on(
    ask: Json, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunStore.commit

    def interrupted(self: RunStore, run_id: str, result: Any, *, checkpoint: bool) -> None:
        real(self, run_id, result, checkpoint=checkpoint)
        if result.record.round == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunStore, "commit", interrupted)
    code, out, err = say("simulate", "run.toml", "--store", "stopped")
    assert code == 1
    assert "interrupted: 2 rounds" in out
    run_id = RunStore("stopped").list()[0].run_id
    assert f"go on with: umbel simulate --resume {run_id} --store stopped" in err


def test_a_run_that_fails_says_what_is_kept(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    from umbel.core.errors import RunError

    real = RunStore.commit

    def failing(self: RunStore, run_id: str, result: Any, *, checkpoint: bool) -> None:
        if result.record.round == 3:
            raise RunError("the disk is full", where="store", fix="free space, then resume")
        real(self, run_id, result, checkpoint=checkpoint)

    monkeypatch.setattr(RunStore, "commit", failing)
    sets = ["--set", "run.checkpoint_seconds=0"]
    code, _, err = say("simulate", "run.toml", "--store", "full", *sets)
    assert code == 1
    assert "error: store: the disk is full; free space, then resume" in err
    assert "committed rounds are kept; go on with: umbel simulate --resume" in err
    entry = RunStore("full").list()[0]
    assert (entry.status, entry.rounds_done) == ("failed", 2)


def test_check_prints_the_plan(ask: Json, say: Say) -> None:
    code, plan = ask("check", "run.toml")
    assert code == 0
    assert plan["ok"] is True
    assert plan["parameters"] == 64 * 10 + 10
    assert plan["bytes_per_client_round"] == 2 * 4 * 650
    assert plan["memory_bytes"] > 0
    assert plan["privacy"] is None
    code, out, _ = say("check", "run.toml", "--set", "strategy.cohort=3")
    assert code == 0
    assert "650" in out
    assert "5.2 kB" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "none.toml"], "cannot read the run file"),
        (["simulate"], "no run file"),
        (["simulate", "run.toml", "run.toml"], "one run file is wanted, not 2"),
        (["check"], "no run file"),
        (["simulate", "run.toml", "--set", "client.lrr=1"], "unknown key 'lrr' in [client]"),
        (["simulate", "run.toml", "--set", "strategy.cohort=4"], "4"),
        (["simulate", "run.toml", "--engine", "sequental"], "unknown engine 'sequental'"),
        (
            ["simulate", "run.toml", "--store", "mysql://x/y"],
            "a store at 'mysql://' is not supported",
        ),
        (["simulate", "--resume", "x"], "no run 'x'"),
        (["show", "x"], "no run 'x'"),
        (["show", "2"], "2 runs begin with '2'"),
        (["compare", "latest", "latest"], "two runs or more are wanted"),
        (["export", "latest", "model.pt"], "cannot write a '.pt' file"),
        (["export", "latest", "nowhere/model.safetensors"], "cannot write the model"),
        (["plot", "latest", "a.jpg"], "cannot draw a '.jpg' file"),
        (["plot", "latest", "a.png", "--metric", "acuracy"], "unknown metric 'acuracy'"),
        (["plot", "latest", "nowhere/a.png"], "cannot write the picture: No such file"),
        (["plot", "a.png"], "no run is named"),
        (["plot", "--split", "run.toml", "run.toml/a.png"], "Not a directory"),
        (["pause", "x"], "there is no such file"),
        (["site", "audit-log", "verify"], "no audit log"),
        (["server", "audit-log", "show"], "no audit log"),
        (["server", "init", "--host", "https://x", "--folder", "s"], "neither a DNS name nor"),
        (["server", "init", "--host", "", "--folder", "s"], "neither a DNS name nor"),
        (["list", "strategy"], "unknown kind 'strategy'"),
        (["simulate", "run.toml", "--nope"], "no such option"),
        (["simulte"], "no such command 'simulte'"),
        (["show"], "missing argument"),
        (["show", "latest", "--store"], "requires an argument"),
    ],
)
def test_bad_input_is_exit_2_and_one_error(
    ask: Json, say: Say, arguments: list[str], message: str
) -> None:
    runs = len(RunStore("runs").list())
    code, out, err = say(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message.lower() in err.lower()
    assert err.count("\n") == 1
    code, found = ask(*arguments)
    if arguments[-1] != "--store":  # which would take --format for its value
        assert code == 2
        assert list(found) == ["error"]
        assert list(found["error"]) == ["message", "where", "fix"]
        assert message.lower() in found["error"]["message"].lower()
        assert found["error"]["fix"]
    assert len(RunStore("runs").list()) == runs  # nothing was begun


def test_refusals_are_exit_3_and_defects_keep_their_traceback(
    ask: Json, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    from umbel.core.errors import RefusedError

    def refuse(run: object) -> None:
        raise RefusedError("epsilon 9 is over the budget of 8", where="[privacy]", fix="less")

    monkeypatch.setattr(simulation, "check", refuse)
    code, found = ask("check", "run.toml")
    assert (code, found["error"]["where"]) == (3, "[privacy]")

    def break_down(run: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(simulation, "check", break_down)
    code, _, err = say("check", "run.toml")
    assert code == 1
    assert "Traceback" in err
    code, found = ask("check", "run.toml")
    assert (code, found["error"]["message"]) == (1, "ZeroDivisionError: oh")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("strategies", "fedavg"),
        ("tasks", "classification"),
        ("models", "logistic"),
        ("datasets", "digits"),
        ("splits", "iid"),
        ("engines", "vectorised"),
    ],
)
def test_list_names_what_a_run_file_can_name(ask: Json, say: Say, kind: str, name: str) -> None:
    code, found = ask("list", kind)
    assert code == 0
    assert list(found) == ([kind, "soundness"] if kind == "tasks" else [kind])
    assert name in {part["name"] for part in found[kind]}
    assert all(part["summary"] for part in found[kind])
    assert name in say("list", kind)[1]


def test_attacks_are_listed(ask: Json, say: Say) -> None:
    listed = [part["name"] for part in ask("list", "attacks")[1]["attacks"]]
    assert {"label-flip", "sign-flip", "alie", "ipm", "min-max", "mimic"} <= set(listed)
    assert {"gaussian", "nan", "backdoor"} <= set(listed)


def test_runs_and_show(ask: Json, say: Say) -> None:
    code, found = ask("runs")
    assert code == 0
    assert sorted(r["name"] for r in found["runs"]) == ["fast", "tiny"]
    assert {"run_id", "name", "status", "rounds", "started"} <= set(found["runs"][0])
    fast = next(r for r in found["runs"] if r["name"] == "fast")
    assert (fast["status"], fast["rounds"], fast["engine"]) == ("finished", 3, "sequential")
    code, shown = ask("show", fast["run_id"])
    assert code == 0
    assert shown["configuration"]["client"]["lr"] == 0.5
    assert shown["versions"]["umbel"] == __version__
    assert len(shown["history"]) == 3
    assert Path(shown["model"]).is_file()
    _, out, _ = say("show", fast["run_id"])
    assert "client.lr" in out
    assert fast["run_id"] in say("runs")[1]
    assert ask("runs", "--store", "nothing") == (0, {"runs": []})
    assert say("runs", "--store", "nothing")[1] == "no runs in nothing\n"


def test_compare_shows_metrics_and_differences(ask: Json, say: Say) -> None:
    ids = [r["run_id"] for r in ask("runs")[1]["runs"]]
    code, found = ask("compare", *ids)
    assert code == 0
    assert [r["run_id"] for r in found["runs"]] == ids
    assert set(found["differences"]) == {"run.name", "client.lr"}
    assert sorted(found["differences"]["client.lr"].values()) == [0.1, 0.5]
    assert found["runs"][0]["best"]["accuracy"]["value"] >= found["runs"][0]["metrics"]["accuracy"]
    _, out, _ = say("compare", *ids)
    assert "client.lr" in out


def test_export_is_the_model_of_the_run(ask: Json, say: Say, at: Path) -> None:
    code, found = ask("export", "latest", "model.safetensors")
    assert (code, found["round"]) == (0, 3)
    assert found["bytes"] == (at / "model.safetensors").stat().st_size
    model = ask("show", "latest")[1]["model"]
    assert (at / "model.safetensors").read_bytes() == Path(model).read_bytes()
    assert "model after round 3" in say("export", "latest", "model.safetensors")[1]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_plot_draws_runs(ask: Json, at: Path, suffix: str) -> None:
    ids = [r["run_id"] for r in ask("runs")[1]["runs"]]
    code, found = ask("plot", *ids, f"both.{suffix}")
    assert (code, found["runs"], found["metrics"]) == (0, ids, ["accuracy", "loss"])
    heads = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert (at / found["file"]).read_bytes().startswith(heads[suffix])


def test_plot_has_a_default_file_and_draws_splits(ask: Json, at: Path) -> None:
    code, found = ask("plot", "latest", "--metric", "loss")
    assert (code, found["metrics"]) == (0, ["loss"])
    assert (at / found["file"]).is_file()
    code, found = ask("plot", "--split", "run.toml", "split.png")
    assert (code, found["file"], found["clients"]) == (0, "split.png", 3)
    assert (at / "split.png").read_bytes().startswith(b"\x89PNG")
    code, found = ask("plot", "--split", "run.toml")
    assert (code, found["file"]) == (0, "tiny-split.png")


def test_a_diverged_run_is_null_in_json_and_survives_every_verb(ask: Json, say: Say) -> None:
    arguments = ["run.toml", "--store", "diverged", "--set", "client.lr=1e30", "run.rounds=2"]
    ask("simulate", *arguments)  # whatever it ends with, it is JSON without NaN
    for entry in ask("runs", "--store", "diverged")[1]["runs"]:
        assert ask("show", entry["run_id"], "--store", "diverged")[0] == 0
        assert say("show", entry["run_id"], "--store", "diverged")[0] == 0


def test_not_a_number_is_null_at_any_depth() -> None:
    nan, inf = float("nan"), float("inf")
    table = {"a": [1.5, nan, {"b": (inf, "nan")}], "c": -inf, "d": True}
    assert output.finite(table) == {"a": [1.5, None, {"b": [None, "nan"]}], "c": None, "d": True}


def record(number: int, **more: Any) -> RoundRecord:
    return RoundRecord(number, 0.25, ["c0"], metrics={"loss": 0.5, "accuracy": 0.75}, **more)


def test_a_round_in_one_line() -> None:
    failures = [Failure("c7", "update is not finite"), Failure("c8", "late")]
    line = describe(record(7, failures=failures, note="quorum missed", epsilon=1.25), 100)
    assert line == (
        "round   7/100  accuracy 0.7500  loss 0.5000  1 client  0.25 s  ε 1.250  "
        "failed: c7 (update is not finite) and 1 more  quorum missed"
    )


def test_fast_rounds_share_lines_but_the_last_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines() as display:
        display.announce("falls back")
        for number in range(1, 99):
            display.on_round(record(number), 100)  # stopped two rounds early
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "note: falls back"
    assert lines[1].startswith("round   1/100")
    assert lines[-1].startswith("round  98/100")
    assert len(lines) < 50


def test_the_live_line_shows_the_last_round(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with Live() as display:
        display.announce("falls back [really]")
        display.on_round(record(1), 2)
        display.on_round(record(2, failures=[Failure("c7", "late")]), 2)
    text = screen.getvalue()
    assert "note: falls back [really]" in text
    assert "round 2 of 2" in text
    assert "accuracy 0.7500" in text
    assert "c7 (late)" in text


def test_the_installed_command(at: Path) -> None:
    command = [sys.executable, "-c", "from umbel.cli.main import main; main()", "show", "nobody"]
    done = subprocess.run([*command, "--format=json"], capture_output=True, text=True)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["message"] == "no run 'nobody'"
    assert done.stderr == ""
