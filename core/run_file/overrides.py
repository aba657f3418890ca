"""A run file as tables, before it is checked: read, with single keys set."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umbel.core.errors import InputError


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of the run file at ``path``, with overrides applied, unchecked.

    Raises:
        InputError: no such file, or not TOML.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "check the path of the run file"
        raise InputError(f"cannot read the run file: {reason}", where=str(path), fix=fix) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not TOML: {error}", where=str(path), fix="mend that line") from None
    return overridden(table, overrides)


def overridden(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``table`` with ``section.key=value`` overrides applied, in place.

    Raises:
        InputError: an override is not of that form, or goes below a value that is no table.
    """
    for override in overrides:
        _override(table, override)
    return table


def _override(table: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = [k.strip() for k in path.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        raise InputError(
            f"'{override}' is not section.key=value", where="--set", fix="e.g. --set client.lr=0.1"
        )
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string: --set strategy.name=fedadam
    if value != value:  # no key takes a number that is none; `nan` is the name of an attack
        value = text.strip()
    put(table, keys, value, f"--set {override}")


def put(table: dict[str, Any], keys: Sequence[str], value: Any, where: str) -> None:
    """Sets the key below its tables, in place.

    Raises:
        InputError: it would be below a value that is no table.
    """
    place = table
    for k in keys[:-1]:
        below = place.setdefault(k, {})
        if isinstance(below, str):  # model = "mlp" and --set task.model.hidden=[8]
            below = place[k] = {"name": below}
        if not isinstance(below, dict):
            raise InputError(f"'{k}' is not a table", where=where, fix="drop a level")
        place = below
    place[keys[-1]] = value
