"""What can be seen of a model that makes images."""

from __future__ import annotations

from pathlib import Path

import torch

from umbel.client.training import load
from umbel.core.errors import InputError
from umbel.core.extras import extra
from umbel.core.run_file import RunFile
from umbel.core.trees import Model
from umbel.server.database import translated
from umbel.simulations.prepare import prepare
from umbel.tasks.evaluate import tensor_of

COLUMNS = 10
"""Test examples that are shown, or samples in a row."""


def draw_samples(run: RunFile, model: Model, path: Path) -> tuple[int, int]:
    """Draws what the run's task shows of ``model`` to ``path`` (png, pdf or svg).

    A column is a test example where the task shows one; samples are the same each time.

    Returns:
        rows and columns of the grid.
    Raises:
        InputError: the task shows nothing, the data are no images, or ``path`` cannot be written.
    """
    prepared = prepare(run)
    task, data = prepared.task, prepared.data
    examples = data.client_test if data.test is None else data.test
    if task.pictures is None or len(data.info.input_shape) != 3 or examples is None:
        raise InputError(
            f"nothing can be seen of a run of task '{run.task.kind}' on '{data.info.name}'",
            where="umbel plot --samples",
            fix="name a run of kind vae, gan, autoencoder or method mae, on images",
        )
    load(prepared.module, model)
    batch = {name: tensor_of(column[:COLUMNS]) for name, column in examples.items()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shown = task.pictures(prepared.module.eval(), batch)
    rows, columns, depth, height = shown.shape[:4]
    with extra("plots", str(path)):
        from matplotlib.image import imsave  # takes seconds to load

    gap = max(1, height // 8)
    tiles = torch.nn.functional.pad(shown, (0, gap, 0, gap), value=1.0)
    whole = tiles.permute(0, 3, 1, 4, 2).reshape(rows * (height + gap), -1, depth)[:-gap, :-gap]
    whole = whole.clamp(0, 1).repeat_interleave(4, 0).repeat_interleave(4, 1)
    pixels = whole.expand(-1, -1, 3) if depth != 3 else whole
    with translated(path, "picture"):
        imsave(path, pixels.contiguous().numpy(), metadata=None)
    return rows, columns
