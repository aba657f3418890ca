"""From the runs that a run file names to the files on this machine."""

from __future__ import annotations

from pathlib import Path

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.server.store import RunStore


def located(run: RunFile) -> RunFile:
    """``run`` with the paths of the models that ``[task] init_from`` names.

    A name stands for the newest run of that name in the store.

    Raises:
        InputError: neither a file, nor a folder with a model, nor a run of the store that has one.
    """
    given = run.task.init_from
    if given is None:
        return run
    names = [given] if isinstance(given, str) else given
    found = tuple(str(_model(name, run.run.store)) for name in names)
    return run.model_copy(update={"task": run.task.model_copy(update={"init_from": found})})


def _model(name: str, store: str) -> Path:
    path = Path(name)
    if path.is_dir():
        path = path / "model.safetensors"
    elif not path.exists():
        runs = RunStore(store)
        named = [entry.run_id for entry in runs.list() if entry.name == name]
        path = runs.model_path(named[0] if named else name)
    if not path.is_file():
        raise InputError(
            f"'{name}' has no model: {path} is missing",
            where="[task] init_from",
            fix="name a run that has ended, its folder, or a .safetensors file",
        )
    return path.resolve()
