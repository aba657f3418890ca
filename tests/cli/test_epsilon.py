from __future__ import annotations

import json

import pytest

from umbel.cli.main import run


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, float]]:
    code = run(["epsilon", *arguments, "--format", "json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "pld", "rdp"),
    [
        ("--noise 1.1 --rate 0.01 --steps 10000", 5.193, 5.632),
        (
            "--noise 1 --rate .01 --steps 500 --noise 1.3 --rate .02 --steps 300 "
            "--noise .8 --rate .005 --steps 200",
            1.969,
            2.402,
        ),
        ("--noise 10 --steps 100", 4.377, 4.728),
    ],
)
def test_goldens_of_dp_accounting(
    capsys: pytest.CaptureFixture[str], arguments: str, pld: float, rdp: float
) -> None:
    code, found = ask(capsys, *arguments.split())
    assert code == 0
    assert found["pld"] == found["epsilon"] == pytest.approx(pld, abs=6e-4)
    assert found["rdp"] == pytest.approx(rdp, abs=6e-4)


def test_the_noise_that_a_budget_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = ask(capsys, "--target", "3", "--rate", "0.0625", "--steps", "1600")
    assert code == 0
    assert found["noise_multiplier"] == pytest.approx(3.582, abs=6e-4)
    assert 2.999 < found["epsilon"] <= 3.0


@pytest.mark.parametrize(
    "arguments",
    [
        "--noise 1",
        "--noise 1 --steps 3 --steps 4",
        "--target 3 --noise 1 --steps 3",
        "--noise -1 --steps 3",
        "--noise 1 --rate 2 --steps 3",
        "--noise 1 --rate .1 --steps 3 --replace-one",
    ],
)
def test_what_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    code, found = ask(capsys, *arguments.split())
    assert code == 2
    assert "error" in found
