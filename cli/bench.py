"""``umbel bench``: the benchmarks that the documentation's tables come from."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import sys
from importlib.resources import files
from typing import Annotated, Any

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption
from umbel.core.errors import InputError, suggest

PACKAGE = "umbel.simulations.benchmarks"

# What follows the name belongs to the benchmark: its --help, too.
CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": True}


def bench(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="The benchmark; without one they are listed."),
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPTIONS]",
            help="Its own options: umbel bench NAME --help.",
            show_default=False,
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> int:
    """Run a benchmark, or list them."""
    found = benchmarks()
    format, rest = _format(arguments or [], format)
    if name is None:
        if format is Format.json:
            rows = [{"name": n, "summary": text} for n, text in found.items()]
            output.emit({"benchmarks": rows})
        else:
            output.table(["benchmark", ""], list(found.items()), left=2)
        return 0
    wanted = name.replace("-", "_")
    if wanted not in found:
        fix = suggest(wanted, found)
        raise InputError(f"unknown benchmark '{name}'", where="umbel bench", fix=fix)
    module = importlib.import_module(f"{PACKAGE}.{wanted}")
    if hasattr(module, "measure"):
        return _measured(module, rest, format)
    return _printed(module, wanted, rest, format)


def benchmarks() -> dict[str, str]:
    """Name -> its first line; a module of the package with a ``main`` is a benchmark."""
    found = {}
    for file in sorted(files(PACKAGE).iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".py"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(part, ast.FunctionDef) and part.name == "main" for part in tree.body):
            found[file.name[:-3]] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def _measured(module: Any, rest: list[str], format: Format) -> int:
    """A benchmark whose figures are values: ``parser``, ``measure`` and ``show``."""
    options = module.parser().parse_args(rest)
    if format is Format.json:
        with contextlib.redirect_stdout(sys.stderr):
            result = module.measure(options)
        output.emit(result)
    else:
        module.show(module.measure(options))
    return 0


def _printed(module: Any, name: str, rest: list[str], format: Format) -> int:
    """A benchmark that prints, and exits with 1 where a figure to reach was missed."""
    text = io.StringIO()
    before = sys.argv
    sys.argv = [f"umbel bench {name}", *rest]
    code = 0
    try:
        with contextlib.redirect_stdout(text if format is Format.json else sys.stdout):
            module.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv = before
    if code == 2:  # argparse has said on stderr which
        fix = f"see umbel bench {name} --help"
        raise InputError("its options are wrong", where=f"umbel bench {name}", fix=fix)
    if format is Format.json:
        lines = text.getvalue().splitlines()
        output.emit({"benchmark": name, "passed": code == 0, "lines": lines})
    return code


def _format(arguments: list[str], format: Format) -> tuple[Format, list[str]]:
    """``--format`` may stand behind the benchmark's name as well."""
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if word == "--format" and waiting:
            word = f"--format={waiting.pop(0)}"
        if not word.startswith("--format="):
            rest.append(word)
            continue
        value = word.partition("=")[2]
        if value not in list(Format):
            fix = suggest(value, list(Format))
            raise InputError(f"unknown format '{value}'", where="umbel bench", fix=fix)
        format = Format(value)
    return format, rest
