"""docs/deploy.md: its ten commands are tried in their order, and its policy is one."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from umbel.cli.main import run
from umbel.client.policy import Policy, check_run
from umbel.core.run_file import resolve
from umbel.core.settings import parse

PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:server|site) +umbel (.+)$", PAGE, re.MULTILINE)

RUN = """
[data]
name = "npz"
classes = 2
[task]
kind = "classification"
"""


def test_ten_commands_join_a_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(COMMANDS) <= 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN)
    told: dict[str, str] = {}
    for command in COMMANDS:
        if command.endswith(" start"):  # a life of its own: tests/deploy/test_network.py
            continue
        words = shlex.split(command)
        if "--fingerprint" in words:
            words[-1] = told["site"]
        if "--ca-fingerprint" in words:
            words[-1] = told["server"]
            (tmp_path / words[2]).write_bytes((tmp_path / "umbel-server" / words[2]).read_bytes())
        code = run([*words, "--format", "json"])
        answer = json.loads(capsys.readouterr().out)
        if words[1] == "doctor":  # nobody serves in this test; all else is well
            bad = [f["what"] for f in answer["findings"] if f["level"] == "error"]
            assert (code, set(bad) - {"data", "server"}) == (1, set())
            continue
        assert code == 0, answer
        if words[:2] == ["server", "init"]:
            told["server"] = answer["fingerprint"]
        if words[:2] == ["site", "request"]:
            told["site"] = answer["fingerprint"]
        if words[:2] == ["server", "approve"]:
            assert answer["authority"] == told["server"]
    assert [job["state"] for job in answer["jobs"]] == ["queued"]
    assert answer["sites"].keys() == {"hospital-a"}
    assert run(["server", "kit", "hospital-a", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["authority"] == told["server"]


def test_the_pages_policy_is_one() -> None:
    (block,) = re.findall(r"^```text\n(\[allow\].*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    policy: Policy = parse(Policy, tomllib.loads(block), "docs/deploy.md")
    privacy = {"unit": "example", "noise_multiplier": 1.0, "epsilon": 3.0}
    check_run(policy, resolve({**tomllib.loads(RUN), "privacy": privacy}))


@pytest.mark.parametrize("order", ["pause", "resume", "stop"])
def test_orders_for_a_run_that_waits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    order: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN)
    json_ = ["--format", "json"]
    assert run(["server", "init", "--host", "h", *json_]) == 0
    assert run(["submit", "run.toml", *json_]) == 0
    job = json.loads(capsys.readouterr().out.partition("}\n")[2])["id"]
    if order == "resume":
        assert run(["pause", job[:8], *json_]) == 0
        capsys.readouterr()
    assert run([order, job[:8], *json_]) == 0
    state = json.loads(capsys.readouterr().out)["state"]
    assert state == {"pause": "paused", "resume": "queued", "stop": "stopped"}[order]
    assert run([order, "nothing", *json_]) == 2
    if order == "stop":
        capsys.readouterr()
        assert run(["pause", job, *json_]) == 2
        assert "is stopped" in capsys.readouterr().out
