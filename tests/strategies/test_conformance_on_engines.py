"""Every strategy on both engines: clients trained together end where one after another does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.conformance import TABLE
from sklearn.datasets import load_breast_cancer

from umbel.core.payloads import Federation
from umbel.core.run_file import resolve
from umbel.core.trees import Model
from umbel.server.asynchronous import asynchronous
from umbel.server.records import Scores
from umbel.server.rounds import Start, rounds
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.engines.vectorised import vectorised
from umbel.simulations.prepare import Prepared, prepare

PARAMETERS = {row.name: row.parameters for row in TABLE}
MLP = {"name": "mlp", "hidden": [6]}
NORMED = """
from torch import nn

def normed():
    return nn.Sequential(nn.Linear(30, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
"""


def adapted(**adapter: Any) -> dict[str, Any]:
    lora = {"kind": "lora", "rank": 2, **adapter}
    return {"kind": "classification", "model": MLP, "adapter": lora}


DIAGNOSES = {"name": "breast-cancer"}
PLAIN = {"kind": "classification", "model": MLP}
PARTS = {"kind": "multi-task", "parts": [2, 0], "model": MLP, "embedding": 4}
TASKS: dict[str, dict[str, Any]] = {
    "fedbn": {"kind": "classification", "model": "normed_model:normed"},
    "kmeans": {"kind": "kmeans", "groups": 3},
    "gradnorm": PARTS,
    "pcgrad": PARTS,
    "fedit": adapted(),
    "fedsa-lora": adapted(),
    "flexlora": adapted(),
    "rolora": adapted(),
    "ffa-lora": adapted(freeze_a=True),
    "fedex-lora": adapted(residual=True),
    "flora": adapted(residual=True),
}
"""Of strategies that are for another task than the plain one."""

NAMED: dict[str, dict[str, Any]] = {
    "fedper": {"head": 1},
    "fedrep": {"head": 1},
    "fedu": {"predictor": "3.*", "threshold": 1e-3},
    "lgfedavg": {"head": 1},
}
"""Parameters that name tensors of the model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two targets an example: the diagnosis, and the radius."""
    made = tmp_path_factory.mktemp("engines")
    (made / "normed_model.py").write_text(NORMED)
    x, y = load_breast_cancer(return_X_y=True)
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    np.savez(made / "two.npz", x=x[:, 1:], y=np.column_stack([y, x[:, 0]]).astype(np.float32))
    return made


def prepared(folder: Path, name: str) -> Prepared:
    task = TASKS.get(name, PLAIN)
    data = {"name": "npz", "path": str(folder / "two.npz")} if task is PARTS else DIAGNOSES
    return prepare(
        resolve(
            {
                "run": {"rounds": 2, "seed": 3, "store": "unused"},
                "data": {**data, "split": {"kind": "quantity", "clients": 4, "minimum": 20}},
                "task": task,
                "client": {"lr": 0.1, "local_steps": 2, "batch_size": 16, "device": "cpu"},
                "strategy": {"name": name, **PARAMETERS[name], **NAMED.get(name, {})},
            }
        )
    )


def trained(made: Prepared, federation: Federation) -> Model:
    model, strategy = made.model(), made.strategy
    start = Start(0, model, strategy.init(strategy.travelling(model).params))
    loop = rounds if strategy.asynchronous is None else asynchronous
    try:
        found = list(loop(made.run, strategy, federation, start, lambda r, m: Scores({}, {})))
    finally:
        federation.close()
    assert not any(result.record.failures for result in found)
    return found[-1].model


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_vectorised_equals_sequential(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    made, said = prepared(folder, name), list[str]()
    inputs = made.run, made.data, made.task, made.strategy.client
    alone = trained(made, sequential(*inputs)).tensors()
    # BatchNorm's count of batches is changed in place, which vmap does not know.
    plan = "stacked" if name == "fedbn" else "vmap"
    together = trained(made, vectorised(*inputs, said.append, plan=plan, processes=0)).tensors()
    assert not said
    assert together.keys() == alone.keys()
    for tensor, value in alone.items():
        torch.testing.assert_close(together[tensor], value, rtol=1e-4, atol=1e-5, msg=tensor)
    assert any(not torch.equal(alone[n], t) for n, t in made.model().tensors().items())
