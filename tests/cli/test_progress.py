"""What a run shows while it goes on, and the option that pins how it computes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from umbel.cli import main
from umbel.cli.progress import Lines, Live, Pace
from umbel.server.records import RoundRecord
from umbel.server.store import RunStore


def record(number: int, seconds: float = 0.25, epsilon: float | None = None) -> RoundRecord:
    return RoundRecord(number, seconds, ["c0", "c1"], metrics={"loss": 0.5}, epsilon=epsilon)


def test_the_time_left_is_that_of_this_process() -> None:
    pace = Pace()
    assert pace(record(11), 14, 100.25) == "8 clients/s  0.8 s left"
    assert pace(record(12), 14, 160.0) == "8 clients/s  1 min 00 s left"
    assert pace(record(14), 14, 161.0) == "8 clients/s"


def test_lines_tell_speed_time_left_and_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines() as display:
        display.on_round(record(1, epsilon=0.5), 3)
    line = capsys.readouterr().err
    assert "ε 0.500" in line
    assert "8 clients/s" in line
    assert "0.5 s left" in line


def test_the_live_line_tells_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with Live() as display:
        display.on_round(record(7), 9)
        display.on_round(record(8, epsilon=1.25), 9)
    assert "ε 1.250" in screen.getvalue()
    assert "8 clients/s" in screen.getvalue()


def test_a_plan_on_the_command_line_is_the_plan_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((40, 6)).astype(np.float32), draw.integers(0, 3, 40)
    np.savez("data.npz", x=x, y=y, client=np.repeat(np.arange(4), 10))
    Path("run.toml").write_text(
        """
[run]
rounds = 1
[data]
name = "npz"
path = "data.npz"
split = { kind = "natural" }
[task]
kind = "classification"
model = { name = "logistic" }
[evaluate]
every = 0
"""
    )
    command = ["simulate", "run.toml", "--format=json"]
    assert main.run([*command, "--engine-plan", "stacked:chunk=3"]) == 0
    run_id = json.loads(capsys.readouterr().out)["run_id"]
    entry = RunStore("runs").get(run_id)
    assert (entry.engine_plan["plan"], entry.engine_plan["source"]) == ("stacked:chunk=3", "pinned")

    assert main.run([*command, "--engine-plan", "stacked:chunk=0"]) == 2
    assert "chunk=N" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert main.run([*command, "--engine-plan", "lean", "--engine", "sequential"]) == 2
    assert "has no plan" in json.loads(capsys.readouterr().out)["error"]["message"]
