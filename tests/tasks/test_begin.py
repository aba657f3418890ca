"""Where a model begins: a run of the store, its folder, a file, several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from umbel.core.errors import InputError
from umbel.core.run_file import resolve
from umbel.datasets.federated import Info
from umbel.tasks.begin import base_hash
from umbel.tasks.build import build_task, initial_module, model_of

INFO = Info("table", (4,), classes=3)


def section(**table: Any) -> Any:
    model = {"name": "mlp", "hidden": [5]}
    base = {"kind": "classification", "model": model, **table}
    return resolve({"data": {"name": "digits"}, "task": base}).task


def module(seed: int = 0, **table: Any) -> torch.nn.Module:
    return initial_module(build_task(section(**table), INFO), seed)


@pytest.fixture
def base(tmp_path: Path) -> str:
    file = tmp_path / "base.safetensors"
    save_file(dict(model_of(module(7)).params), file)
    return str(file)


def test_a_task_begins_where_a_file_ends(base: str) -> None:
    found, expected = model_of(module(0, init_from=base)).params, model_of(module(7)).params
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_a_base_model_and_then_its_adapter(base: str, tmp_path: Path) -> None:
    adapted = module(1, init_from=base, adapter="lora")
    trained = {n: torch.randn(p.shape) for n, p in model_of(adapted).params.items()}
    save_file(trained, tmp_path / "adapter.safetensors")
    again = module(
        2, init_from=[base, str(tmp_path / "adapter.safetensors")], adapter={"kind": "lora"}
    )
    assert (
        base_hash(again)
        == base_hash(adapted)
        == base_hash(module(3, init_from=base, adapter="lora"))
    )
    assert all(torch.equal(p, trained[n]) for n, p in model_of(again).params.items())


def test_another_head_is_left_as_it_began(base: str) -> None:
    other = build_task(section(init_from=base), Info("table", (4,), classes=3))
    assert base_hash(initial_module(other, 0)) is None
    wider = build_task(section(init_from=base), Info("table", (4,), classes=5))
    with pytest.raises(InputError, match=r"'3.weight' has shape \(3, 5\) .*expected \(5, 5\)"):
        initial_module(wider, 0)


def test_what_does_not_fit_is_one_clear_error(base: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        module(init_from=str(tmp_path / "none.safetensors"))
    strange, part = tmp_path / "strange.safetensors", tmp_path / "part.safetensors"
    save_file({"else": torch.zeros(2)}, strange)
    with pytest.raises(InputError, match=r"no tensor of .* has a name of the model's"):
        module(init_from=str(strange))
    save_file({"1.weight": torch.zeros(5, 4)}, part)
    with pytest.raises(InputError, match="the adapter would freeze them as they are: random"):
        module(init_from=str(part), adapter="lora")


def test_files_are_named_so_that_a_site_can_refuse_them() -> None:
    table = {
        "data": {"name": "text", "tokenizer": "/a"},
        "task": {
            "kind": "language-model",
            "model": {"name": "transformers", "path": "/b"},
            "init_from": ["/c", "d"],
        },
    }
    assert set(resolve(table).files()) == {"/a", "/b", "/c", "d"}
    plain = {"data": {"name": "text", "tokenizer": "bytes"}, "task": {"kind": "language-model"}}
    assert resolve(plain).files() == []
