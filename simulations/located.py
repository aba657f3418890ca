"""From the runs that a run file names to the files on this machine."""

from __future__ import annotations

from pathlib import Path

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.server.store import RunStore


def located(run: RunFile) -> RunFile:
    """``run`` with the paths of the models that ``[task] init_from`` and ``judge_from`` name.

    A name stands for the newest run of that name in the store.

    Raises:
        InputError: neither a file, nor a folder with a model, nor a run of the store that has one.
    """
    given, judge = run.task.init_from, run.task.parameters().get("judge_from")
    found: dict[str, object] = {}
    if given is not None:
        names = [given] if isinstance(given, str) else given
        where = "[task] init_from"
        found["init_from"] = tuple(str(_model(name, run.run.store, where)) for name in names)
    if isinstance(judge, str):
        found["judge_from"] = str(_model(judge, run.run.store, "[task] judge_from"))
    return run.model_copy(update={"task": run.task.model_copy(update=found)}) if found else run


def _model(name: str, store: str, where: str) -> Path:
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
            where=where,
            fix="name a run that has ended, its folder, or a .safetensors file",
        )
    return path.resolve()
