"""Finds the named parts of Umbel, and a user's own, without importing what is not used.

A kind of part (strategies, models, …) is a package in which every module holds one part: a function
of the module's own name, whose first docstring line describes it. So a new part is one new file.
``"my_package.module:object"`` names a user's own part wherever a name is taken.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from umbel.core.errors import InputError, suggest

# What `umbel list` shows, and the package that holds it.
KINDS = {
    "strategies": "umbel.strategies",
    "tasks": "umbel.tasks.kinds",
    "models": "umbel.tasks.models",
    "adapters": "umbel.tasks.adapters",
    "methods": "umbel.tasks.self_supervised.methods",
    "datasets": "umbel.datasets.readers",
    "splits": "umbel.datasets.splits",
    "engines": "umbel.simulations.engines",
    "attacks": "umbel.simulations.attacks",
    "defences": "umbel.strategies.defences",
}


SINGULAR = {"strategies": "strategy", "datasets": "data set"}


@functools.cache
def known(kind: str) -> Mapping[str, str]:
    """The parts of a kind: name -> first line of its docstring. Reads files, imports nothing."""
    spec = importlib.util.find_spec(KINDS[kind])
    if spec is None or not spec.submodule_search_locations:
        return MappingProxyType({})
    found = {}
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).glob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and node.name == path.stem:
                    doc = ast.get_docstring(node) or ""
                    name = path.stem.lstrip("_").replace("_", "-")
                    found[name] = doc.splitlines()[0] if doc else ""
    return MappingProxyType(found)


def find(kind: str, name: str, where: str) -> Callable[..., Any]:
    """The factory of the part ``name``, or the object that ``module:object`` names.

    Raises:
        InputError: no such part; the nearest name is suggested.
    """
    if ":" in name:
        return _own(name, where)
    name = name.replace("_", "-")
    if name not in (parts := known(kind)):
        raise InputError(
            f"unknown {SINGULAR.get(kind, kind.removesuffix('s'))} '{name}'",
            where=where,
            fix=f"{suggest(name, parts)}; or 'package.module:object' for your own",
        )
    stem = name.replace("-", "_")
    stem = f"_{stem}" if stem[0].isdigit() else stem  # the part 2nn is the module _2nn
    module = importlib.import_module(f"{KINDS[kind]}.{stem}")
    factory: Callable[..., Any] = getattr(module, stem)
    return factory


def _own(name: str, where: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, SyntaxError, ValueError, TypeError) as error:  # ":b" and "..a:b", too
        raise InputError(
            f"cannot import '{module_name}': {error}",
            where=where,
            fix="is it installed, or its folder on PYTHONPATH?",
        ) from None
    except AttributeError:
        raise InputError(
            f"module '{module_name}' has no '{attribute}'", where=where, fix="check the spelling"
        ) from None
    if not callable(found):
        raise InputError(f"'{name}' is not callable", where=where, fix="name a function or class")
    return found
