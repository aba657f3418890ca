"""Compiled clients train as others do, or say why they are not compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional

from umbel.client.training import ClientRuntime
from umbel.core.errors import InputError
from umbel.core.run_file import resolve
from umbel.strategies.parts import ClientRule
from umbel.strategies.parts.rule import proximal
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.task import Task


def build() -> nn.Module:
    """What draws, and what counts."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)
    )


def losses(model: Any, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def runtime(compile_: bool, **more: Any) -> ClientRuntime:
    client = {"batch_size": 4, "device": "cpu", "momentum": 0.5, "compile": compile_}
    run = resolve({"data": {"name": "x"}, "task": {"kind": "x"}, "client": client, **more})
    return ClientRuntime(
        run, Task(build, losses, lambda model, batch: {}), ClientRule((proximal(0.3),))
    )


@pytest.mark.slow
def test_it_trains_as_without() -> None:
    draw = np.random.default_rng(0)
    examples = {
        "x": draw.standard_normal((10, 6)).astype(np.float32),
        "y": draw.integers(0, 3, 10),
    }
    plain, compiled = (runtime(c) for c in (False, True))
    model = model_of(initial_module(plain.task, 0))
    before = counters["stats"]["unique_graphs"]
    for number in (1, 2):
        truth, found = (r.train(number, "a", examples, model) for r in (plain, compiled))
        assert int(found.delta["1.num_batches_tracked"]) == 3
        for name, d in truth.delta.items():
            torch.testing.assert_close(found.delta[name], d, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.metrics, truth.metrics)
        # With batches of 4 and of 2; the second round finds what the first compiled.
        assert counters["stats"]["unique_graphs"] == before + 1


def test_gradients_of_single_examples_are_refused() -> None:
    privacy = {"unit": "example", "noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 1e-3}
    with pytest.raises(InputError, match="gradients of single examples are not compiled"):
        runtime(True, privacy=privacy)


@pytest.mark.slow
def test_without_a_compiler_it_is_one_error(tmp_path: Path) -> None:
    table = tmp_path / "run.toml"
    table.write_text(
        f"run = {{ rounds = 1, store = '{tmp_path}/store' }}\n"
        "data = { name = 'digits' }\n"
        "task = { kind = 'classification' }\n"
        "client = { compile = true, device = 'cpu' }\n"
    )
    place = {
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    command = [
        str(Path(sys.executable).parent / "umbel"),
        "simulate",
        str(table),
        "--engine",
        "sequential",
    ]
    done = subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "[client] compile: nothing can be compiled here" in done.stderr
    assert "Traceback" not in done.stderr
