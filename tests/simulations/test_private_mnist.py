"""The bench of private MNIST, without MNIST: its run files are ones, and its picture is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from umbel.core.run_file import resolve
from umbel.simulations.benchmarks import private_mnist as bench


@pytest.mark.parametrize("name", bench.CURVES)
def test_every_point_is_a_run(name: str) -> None:
    curve = bench.CURVES[name]
    run = resolve(bench.table(curve, 3.0, "somewhere", "runs"))
    assert (run.privacy.unit, run.privacy.epsilon) == (curve.privacy["unit"], 3.0)
    assert run.privacy.delta == bench.DELTA < 1 / curve.clients
    if curve.plain is not None:
        open_ = resolve(bench.table(curve, None, "somewhere", "runs"))
        assert open_.privacy.unit == "none"


def test_what_was_kept_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[float | None] = []

    def point(curve: bench.Curve, epsilon: float | None, data: str) -> dict[str, Any]:
        asked.append(epsilon)
        return {"epsilon": epsilon, "accuracy": 0.9, "rounds": curve.rounds, "seconds": 1.0}

    monkeypatch.setattr(bench, "point", point)
    words = ["--data", "x", "--keep", str(tmp_path / "kept"), "--picture", str(tmp_path / "a.png")]
    options = bench.parser().parse_args(words)
    first = bench.measure(options)
    assert len(asked) == 3 * 2 + 2  # two budgets for each curve, and two runs without privacy
    assert bench.measure(options)["points"] == first["points"]
    assert len(asked) == 8
    assert (tmp_path / "a.png").stat().st_size > 10_000
    bench.show(first)
    assert "banded   epsilon 8.00" in capsys.readouterr().out
