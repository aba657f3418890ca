"""Takes an adapter out of a run: as a folder that PEFT loads, or merged into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from umbel.client.training import load
from umbel.core.errors import InputError
from umbel.core.run_file import Part, RunFile
from umbel.server.store import RunStore
from umbel.simulations.located import located
from umbel.simulations.prepare import prepare
from umbel.tasks.adapters import frame, lora
from umbel.tasks.begin import base_hash


def export_adapter(store: RunStore, run_id: str, folder: Path, *, merged: bool) -> int:
    """Writes a run's last committed model to ``folder``; the round that it is of.

    ``PeftModel.from_pretrained(base, folder)`` reads it. A base model that was not loaded from a
    folder of its own stands in ``folder/base``.

    Args:
        store: holds the run.
        run_id: the run.
        folder: made where it is missing; nothing in it but what is written here is touched.
        merged: whether the base model is written with the adapter merged into its weights, and
            nothing else.

    Raises:
        InputError: the run has no adapter, none of PEFT's, or no committed round; its base model is
            not the one that it was trained on; its adapter cannot be merged, or not but merged.
    """
    entry = store.get(run_id)
    run = located(entry.run)
    last = store.latest(entry.run_id)
    if last is None:
        raise _refused(run_id, "no round was committed", f"umbel simulate --resume {run_id}")
    module = prepare(run).module
    if base_hash(module) != entry.versions.get("base_model"):
        raise _refused(
            run_id,
            "its base model is not the one that it was trained on",
            "restore the files that [task] init_from and model.path name",
        )
    load(module, last.model)
    module.eval()
    model = frame.peft_of(module)
    if model is None:
        raise _refused(run_id, "it has no adapter of PEFT's", "write its tensors: FILE.safetensors")
    residual = fold_residuals(module)
    folder.mkdir(parents=True, exist_ok=True)
    if merged:
        if not hasattr(model, "merge_and_unload"):
            raise _refused(run_id, "a learned prompt has no weights to merge", "leave --merged out")
        _save(model.merge_and_unload(), folder)
        return last.round
    if residual:
        raise _refused(
            run_id, "part of what it learned is in the base model's residuals", "add --merged"
        )
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if not _from_folder(run):
        _save(model.unload() if hasattr(model, "unload") else model.base_model, folder / "base")
    return last.round


def fold_residuals(module: nn.Module) -> bool:
    """Adds what low-rank layers have as a residual to their weights; whether there was any."""
    found = False
    with torch.no_grad():
        for layer in lora.layers(module):
            part = getattr(layer, lora.RESIDUAL, None)
            if part is None or not part.full.any():
                continue
            found, residual = True, part.full
            weight = layer.get_base_layer().weight
            step = layer.scaling["default"] * residual
            weight += (step.T if layer.fan_in_fan_out else step).to(weight.dtype)
            residual.zero_()
    return found


def _from_folder(run: RunFile) -> bool:
    model = run.task.model
    return isinstance(model, Part) and "path" in model.parameters() and not run.task.init_from


def _save(model: Any, folder: Path) -> None:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(str(folder))
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.contiguous() for n, t in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def _refused(run_id: str, why: str, fix: str) -> InputError:
    return InputError(f"cannot export: {why}", where=f"run {run_id}", fix=fix)
