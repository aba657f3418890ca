"""The run file: TOML, strict, frozen. One file says what a run is, wherever it runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umbel.core.errors import InputError, suggest
from umbel.core.run_file.overrides import overridden, put, read
from umbel.core.run_file.protection import Privacy, SecureAggregation
from umbel.core.run_file.studies import Attack, Continual, Sought, Tune
from umbel.core.run_file.tables import (
    Adapter,
    Client,
    Curriculum,
    Data,
    EarlyStopping,
    Evaluate,
    Open,
    Part,
    Run,
    Schedule,
    Split,
    Strategy,
    Task,
)
from umbel.core.settings import Settings, parse

__all__ = [
    "TOKENIZERS",
    "Adapter",
    "Attack",
    "Client",
    "Continual",
    "Curriculum",
    "Data",
    "EarlyStopping",
    "Evaluate",
    "Open",
    "Part",
    "Privacy",
    "Run",
    "RunFile",
    "Schedule",
    "SecureAggregation",
    "Sought",
    "Split",
    "Strategy",
    "Task",
    "Tune",
    "load",
    "overridden",
    "put",
    "read",
    "resolve",
]


class RunFile(Settings):
    """A whole run file."""

    run: Run = Run()
    data: Data
    task: Task
    client: Client = Client()
    strategy: Strategy = Strategy()
    continual: Continual = Continual()
    privacy: Privacy = Privacy()
    secure_aggregation: SecureAggregation = SecureAggregation()
    attack: Attack = Attack()
    evaluate: Evaluate = Evaluate()
    tune: Tune = Tune()

    def own_parts(self) -> list[str]:
        """The parts that are the user's own code, ``module:object``, not Umbel's."""
        model = self.task.model
        split = self.data.split
        adapter = self.task.adapter
        names = [self.data.name, self.task.kind, self.strategy.name]
        names += [adapter.kind if isinstance(adapter, Adapter) else adapter or ""]
        names += [] if split is None else [split.kind]
        defence = self.continual.defence
        names += [defence if isinstance(defence, str) else defence.name]
        names += [] if model is None else [model if isinstance(model, str) else model.name]
        # A part may name another: a reward, the network inside an encoder.
        names += _named(self.task.parameters())
        names += _named(model.parameters()) if isinstance(model, Part) else []
        return [name for name in names if ":" in name]

    def files(self) -> list[str]:
        """What is read from this machine besides the data: a model, a tokenizer, earlier runs."""
        model, given = self.task.model, self.task.init_from or ()
        paths: list[Any] = [given] if isinstance(given, str) else list(given)
        paths += [model.parameters().get("path", "")] if isinstance(model, Part) else []
        more = self.task.parameters()
        judge = more.get("judge")
        paths += [more.get("judge_from"), judge.get("path") if isinstance(judge, Mapping) else None]
        paths += [self.data.parameters().get("tokenizer", "")]
        return [str(path) for path in paths if path not in ("", None, *TOKENIZERS)]

    @property
    def round_length(self) -> tuple[int | None, int | None]:
        """(local_epochs, local_steps), one of them set; one epoch where neither is."""
        c = self.client
        return (c.local_epochs or 1, None) if c.local_steps is None else (None, c.local_steps)


def _named(value: Any) -> list[str]:
    """Every text inside ``value``: what has a colon, the registry would import."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, Mapping) else value
    return [name for v in inside for name in _named(v)] if isinstance(inside, Iterable) else []


TOKENIZERS = ("bytes", "characters")
"""Those that need no file."""


def resolve(table: Mapping[str, Any], where: str = "run file") -> RunFile:
    """A run file from its tables.

    Raises:
        InputError: an unknown table or key, a wrong type, a number out of bounds, a missing key.
    """
    for name, value in table.items():
        if name not in RunFile.model_fields and not isinstance(value, Mapping):
            owners = [t for t, f in RunFile.model_fields.items() if name in _keys(f.annotation)]
            fix = f"write it below [{owners[0]}]" if owners else "write it below its [table]"
            raise InputError(f"key '{name}' stands outside any table", where=where, fix=fix)
        if name not in RunFile.model_fields:
            fix = suggest(name, RunFile.model_fields)
            raise InputError(f"unknown table [{name}]", where=where, fix=fix)
        if not isinstance(value, Mapping):
            raise InputError(
                f"{name} = {value!r} is not a table", where=where, fix=f"write [{name}]"
            )
        field = RunFile.model_fields[name].annotation
        assert isinstance(field, type)
        parse(field, value, f"[{name}]")  # by table first, so that the place is exact
    for name in ("data", "task"):
        if name not in table:
            raise InputError(f"table [{name}] is missing", where=where, fix=f"add [{name}]")
    checked: RunFile = parse(RunFile, _equal_clients(table), where)
    return checked


def _equal_clients(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where clients are hidden, they weigh the same unless the run file says otherwise."""
    strategy = table.get("strategy", {})
    if table.get("privacy", {}).get("unit") != "client" or strategy.keys() & {
        "weights",
        "max_weight",
    }:
        return table
    return {**table, "strategy": {**strategy, "weights": "uniform"}}


def _keys(section: Any) -> Collection[str]:
    fields: Collection[str] = section.model_fields
    return fields


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """The run file at ``path`` with ``--set`` overrides (``client.lr=0.1``) applied.

    Raises:
        InputError: no such file, not TOML, or as :func:`resolve`.
    """
    return resolve(read(path, overrides), str(path))
