from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbel.cli.main import run as command
from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.privacy import sources
from umbel.simulations.audits import membership
from umbel.simulations.audits.inversion import invert
from umbel.simulations.audits.parts import members


def run(**tables: Any) -> RunFile:
    base: dict[str, Any] = {
        "run": {"rounds": 3, "seed": 1, "processes": 0, "engine_plan": "lean"},
        "data": {"name": "digits", "split": {"kind": "iid", "clients": 3}},
        "task": {"kind": "classification"},
        "client": {"lr": 0.5, "batch_size": 32, "local_epochs": 1},
    }
    return resolve({**base, **tables})


def test_a_plain_update_gives_pictures_away_and_private_ones_do_not() -> None:
    found = invert(run(), images=2, clients=12)
    psnr = {c.name: float(np.mean(c.psnr)) for c in found.columns}
    ssim = {c.name: float(np.mean(c.ssim)) for c in found.columns}
    assert found.attack == "linear"
    assert psnr["plain update"] > 40
    assert ssim["plain update"] > 0.99
    # A class and a mean at best; noise at most.
    assert psnr["secure sum of 12"] < 20
    assert psnr["with privacy"] < psnr["floor: data-set mean"]
    assert ssim["with privacy"] < 0.3
    # Every client has noise of its own.
    private = found.columns[2].pictures
    assert not np.array_equal(private[0], private[1])


def test_what_is_read_off_without_privacy_is_read_off_at_no_noise() -> None:
    section = {"unit": "example", "noise_multiplier": 0.0, "clip_norm": 1.0}
    found = invert(run(privacy=section), images=1, clients=3)
    psnr = {c.name: c.psnr[0] for c in found.columns}
    assert psnr["with privacy"] > 40  # clipping alone hides nothing


def test_client_level_noise_is_in_the_sum() -> None:
    section = {"unit": "client", "noise_multiplier": 1.0, "clip_norm": 0.1}
    found = invert(run(privacy=section), images=1, clients=3)
    psnr = {c.name: c.psnr[0] for c in found.columns}
    assert psnr["with privacy"] < psnr["plain update"] - 20


@pytest.mark.parametrize("numbers", [{"images": 4, "clients": 3}, {"images": 1, "clients": 2}])
def test_too_few_clients_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(InputError, match="images"):
        invert(run(), **numbers)


def test_rows_are_no_pictures() -> None:
    table = {"name": "diabetes", "split": {"kind": "iid", "clients": 3}}
    with pytest.raises(InputError, match="shape"):
        invert(run(data=table, task={"kind": "regression"}))


def test_membership_of_a_run_that_learns_by_heart() -> None:
    client = {"optimizer": "adam", "lr": 0.01, "batch_size": "full", "local_steps": 30}
    # 200 examples of digits for a model of 25,000 parameters.
    data = {
        "name": "digits",
        "split": {"kind": "iid", "clients": 2},
        "holdout": 0.85,
    }
    model = {"kind": "classification", "model": {"name": "mlp", "hidden": [256]}}
    found = membership.attack(run(data=data, task=model, client=client), shadows=3)
    loss, rmia = found.curves["loss"], found.curves["rmia"]
    assert loss.roc.members + loss.roc.others == 270
    assert loss.roc.auc > 0.6
    assert rmia.roc.auc > loss.roc.auc
    assert 0 <= rmia.points[1].low <= rmia.points[1].rate <= rmia.points[1].high <= 1
    assert found.theory == float("inf")
    assert not found.violated


def test_halves_are_fair_differ_and_repeat() -> None:
    halves = [members(7, model, 10_000) for model in range(3)]
    for half in halves:
        assert abs(int(half.sum()) - 5000) < 5 * 50
    assert abs(int((halves[0] & halves[1]).sum()) - 2500) < 5 * 44
    assert np.array_equal(halves[0], members(7, 0, 10_000))


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = command(["audit", *arguments, "--format", "json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a.png"
    few = ["--set", "run.rounds=1", "--set", "run.engine_plan=lean", "--set", "run.processes=0"]
    code, payload = told(["canary", *few, "--canaries", "200", "--out", str(picture)], capsys)
    assert (code, payload["violated"], payload["canaries"]) == (0, False, 200)
    assert payload["theory_epsilon"] == pytest.approx(2.0, abs=1e-3)
    assert payload["lower_bound"] < 2.0
    assert picture.read_bytes()[:4] == b"\x89PNG"

    picture = tmp_path / "b.png"
    arguments = ["inversion", "--images", "1", "--clients", "3", "--out", str(picture)]
    code, payload = told(arguments, capsys)
    assert code == 0
    assert payload["columns"]["plain update"]["psnr"] > 40
    assert picture.read_bytes()[:4] == b"\x89PNG"

    picture = tmp_path / "c.png"
    code, payload = told(["membership", *few, "--shadows", "1", "--out", str(picture)], capsys)
    assert (code, payload["violated"]) == (0, False)
    assert set(payload["attacks"]) == {"loss", "rmia"}
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_broken_promise_is_loud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = sources._seeded
    monkeypatch.setattr(sources, "_seeded", lambda tree, std, drawn: add(tree, 0.0, drawn))
    few = ["--set", "run.rounds=1", "--set", "run.engine_plan=lean", "--set", "run.processes=0"]
    code = command(["audit", "canary", *few, "--engine", "sequential"])
    said = capsys.readouterr()
    assert code == 1
    assert "PRIVACY VIOLATION" in said.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["canary", "--canaries", "3"],
        ["canary", "--confidence", "1.5"],
        ["canary", "--set", "privacy.unit=none"],
        ["membership", "--shadows=-1"],
        ["inversion", "--attack", "magic"],
        ["inversion", "--out", "a.bmp"],
        ["inversion", "--out", "no-such-folder/a.png"],
        ["inversion", "no-such-file.toml"],
    ],
)
def test_bad_input_is_one_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, payload = told(arguments, capsys)
    assert code == 2
    assert set(payload["error"]) == {"message", "where", "fix"}
