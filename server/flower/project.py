"""A Flower app as it lies in its folder: components, run config and size of the federation."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from flwr.common.config import flatten_dict, fuse_dicts, get_project_config, parse_config_args

from umbel.core.errors import InputError, suggest

SUPERNODES = 10
"""How many nodes a simulation has where the app does not say."""


class Project(NamedTuple):
    """A Flower app.

    Args:
        folder: absolute; goes to the front of ``sys.path``, as Flower does it.
        name: of the project.
        serverapp: ``module:attribute``.
        clientapp: ``module:attribute``.
        run_config: flat keys; the app's values under those of ``--run-config``.
        supernodes: how many nodes its default federation has.
    """

    folder: Path
    name: str
    serverapp: str
    clientapp: str
    run_config: dict[str, bool | int | float | str]
    supernodes: int


def read_project(folder: str | Path, run_config: Sequence[str] = ()) -> Project:
    """Reads an app's ``pyproject.toml`` by Flower's own rules.

    Args:
        folder: the app's.
        run_config: as for ``flwr run``: texts of ``key=value`` pairs, or one TOML file.

    Raises:
        InputError: no such file, not valid, a missing component, an unknown key.
    """
    path = Path(folder).absolute()
    file = path / "pyproject.toml"
    if not file.is_file():
        fix = "name the folder of a Flower app: the one that `flwr new` made"
        raise InputError("no pyproject.toml", where=str(folder), fix=fix)
    try:
        config = get_project_config(path)
        app = config["tool"]["flwr"]["app"]
        defaults = flatten_dict(app.get("config", {}))
    except (ValueError, tomllib.TOMLDecodeError) as error:
        problems = " ".join(line.strip() for line in str(error).splitlines())
        raise InputError(problems, where=str(file), fix="`flwr build` must accept it too") from None
    references = {}
    for part in ("serverapp", "clientapp"):
        reference = app["components"].get(part)
        if not isinstance(reference, str) or not all(reference.partition(":")):
            raise InputError(
                f"{part} = {reference!r} is not of the form 'module:attribute'",
                where=f"{file}: [tool.flwr.app.components]",
                fix=f"set it, e.g. {part} = 'my_app.{part.removesuffix('app')}_app:app'",
            )
        references[part] = reference
    overridden = _override(defaults, run_config)
    nodes = _supernodes(config["tool"]["flwr"].get("federations", {}), str(file))
    return Project(
        path, config["project"]["name"], **references, run_config=overridden, supernodes=nodes
    )


def _override(defaults: dict[str, Any], run_config: Sequence[str]) -> dict[str, Any]:
    where = "--run-config"
    try:
        overrides = parse_config_args([text for text in run_config if text.strip()])
    except (click.ClickException, ValueError, OSError) as error:
        raise InputError(str(error), where=where, fix="key1=123 key2=false key3='text'") from None
    if any(text.strip() for text in run_config) and not overrides:
        text = " ".join(run_config)
        raise InputError(f"no key=value in {text!r}", where=where, fix="key1=123 key2='text'")
    for key in overrides:
        if key not in defaults:
            raise InputError(
                f"unknown key '{key}': not in [tool.flwr.app.config]",
                where=where,
                fix=suggest(key, defaults),
            )
    return fuse_dicts(defaults, overrides)


def _supernodes(federations: dict[str, Any], where: str) -> int:
    tables = {name: table for name, table in federations.items() if isinstance(table, dict)}
    name = federations.get("default", next(iter(tables)) if len(tables) == 1 else None)
    options = tables.get(str(name), {}).get("options", {})
    nodes = options.get("num-supernodes", SUPERNODES)
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        place = f"{where}: [tool.flwr.federations.{name}]"
        raise InputError(
            f"options.num-supernodes = {nodes!r} is not ≥ 1", where=place, fix="set it"
        )
    return nodes
