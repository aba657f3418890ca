"""DP-SGD's bound, measured: what replacing one record does to a sum of clipped gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

from umbel.core.errors import InputError
from umbel.core.run_file import resolve
from umbel.simulations.prepare import prepare
from umbel.tasks.self_supervised.losses import cosine, simclr

RECORDS, CLIP = 64, 1e-3


def clipped_sum(losses: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """Row by row, as DP-SGD would: gradient, clip, add."""
    weight = torch.eye(2, dtype=torch.float64)
    total = torch.zeros_like(weight)
    for row in range(len(x)):
        g = grad(lambda w, row=row: losses(x @ w.T, x @ w.T)[row])(weight)
        total += g * (CLIP / g.norm()).clamp(max=1)
    return total


def moved(losses: Callable[[Tensor, Tensor], Tensor]) -> float:
    """By how much, in units of 2 · CLIP, when the last record goes from one side to the other."""
    others = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(RECORDS - 1, 2)
    ends = [torch.tensor([[0.0, s]], dtype=torch.float64) for s in (1.0, -1.0)]
    left, right = (clipped_sum(losses, torch.cat([others, end])) for end in ends)
    return float((left - right).norm()) / (2 * CLIP)


def test_one_record_moves_all_terms_of_info_nce() -> None:
    assert moved(lambda a, b: simclr(a, b, 1.0)) > RECORDS / 2


def test_one_record_moves_one_term_of_a_loss_of_its_own() -> None:
    assert moved(lambda a, b: cosine(a, b.detach() + 0.1)) <= 1 + 1e-9


def private(method: Any, model: Any) -> Any:
    return resolve(
        {
            "data": {"name": "digits", "split": {"kind": "iid", "clients": 3}},
            "task": {"kind": "self-supervised", "method": method, "model": model, "embedding": 8},
            "client": {"local_steps": 1, "batch_size": 8},
            "privacy": {"unit": "example", "clip_norm": 1.0, "noise_multiplier": 1.0},
        }
    )


VIT = {"name": "vit", "patch": 4, "layers": 1, "width": 8, "heads": 2}


@pytest.mark.parametrize("method", ["simclr", "moco", "barlow-twins", "dino", "byol", "simsiam"])
def test_methods_that_couple_records_are_refused(method: str) -> None:
    with pytest.raises(InputError, match="not a mean over its examples"):
        prepare(private(method, "logistic"))


@pytest.mark.parametrize(
    ("method", "model"),
    [
        ({"name": "byol", "norm": "layer"}, "logistic"),
        ({"name": "simsiam", "norm": "layer"}, "logistic"),
        ("mae", VIT),
        ("i-jepa", VIT),
    ],
)
def test_methods_of_one_record_are_taken(method: Any, model: Any) -> None:
    assert prepare(private(method, model)).task.decomposable


def test_batch_statistics_make_byol_couple_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_encoder.py").write_text(
        "from torch import nn\n\n\ndef encoder(info, outputs):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs), nn.BatchNorm1d(outputs))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="mixes the examples"):
        prepare(private({"name": "byol", "norm": "layer"}, "own_encoder:encoder"))
