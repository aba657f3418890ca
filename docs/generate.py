"""Writes the reference pages of docs/ from the code that they describe: ``make docs``.

``python docs/generate.py --check`` writes nothing, and ends with 1 where a page is out of date.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pydantic
import typer.main

from umbel.cli import soundness
from umbel.core import registry, settings
from umbel.core.run_file import RunFile

DOCS = Path(__file__).parent
NOTE = (
    "\n<!-- Written by `make docs` from the code. Change the docstrings there, not this page. -->\n"
)
BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}", "pattern": "matching `{}`"}
WORDS = {float: "number", int: "whole number", str: "text", bool: "true or false"}


def run_file_page() -> str:
    """The reference of the run file: its tables, then the named parts and their keys."""
    lines = [
        "# The run file",
        NOTE,
        "TOML, strict: an unknown key, a wrong type or an impossible number is an error that names "
        "the place and the next step. Only `[data] name` and `[task] kind` have no default. "
        "`--set section.key=value` on the command line overrides a key.\n",
        "Wherever a name is taken, `package.module:object` names your own part.\n",
    ]
    for name, field in RunFile.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        lines += _table(f"[{name}]", model, "##")
    for kind, package in registry.KINDS.items():
        if parts := registry.known(kind) if kind != "engines" else {}:
            lines.append(f"## {kind.capitalize()}\n")
            for part in parts:
                lines += _part(part, registry.find(kind, part, package))
    return "\n".join(lines).rstrip() + "\n"


def _table(title: str, model: type[pydantic.BaseModel], level: str) -> Iterator[str]:
    heading = inspect.cleandoc(model.__doc__ or "").partition(":")[2].strip()
    yield f"{level} `{title}`\n"
    if heading:
        yield heading[0].upper() + heading[1:] + "\n"
    docs, hints = _attribute_docs(model), typing.get_type_hints(model, include_extras=True)
    rows, nested = [], []
    for name, field in model.model_fields.items():
        default = (
            "required" if field.is_required() else field.get_default(call_default_factory=True)
        )
        rows.append((name, _type(hints[name], field.metadata), default, docs.get(name, "")))
        for inner in _members(hints[name]):
            place = f"{title[:-1]}.{name}]"
            if typing.get_origin(inner) is dict:
                place, inner = f'{place[:-1]}."section.key"]', typing.get_args(inner)[1]
            if isinstance(inner, type) and issubclass(inner, pydantic.BaseModel):
                nested.append((place, inner))
    yield from _rows(rows)
    for inner_title, inner in nested:
        yield from _table(inner_title, inner, level + "#")


def _part(name: str, factory: Callable[..., Any]) -> Iterator[str]:
    doc = inspect.getdoc(factory) or ""
    text, _, rest = doc.partition("\nArgs:\n")
    meanings = dict(re.findall(r"^    (\w+): ((?:.|\n        )*)", rest, re.MULTILINE))
    yield f"### `{name}`\n\n{_prose(text)}\n"
    yield from _rows(
        [
            (key, _type(hint), "required" if default is ... else default, meanings.get(key, ""))
            for key, (hint, default) in settings.parameters(factory).items()
        ]
    )


def _rows(rows: list[tuple[str, str, Any, str]]) -> Iterator[str]:
    if not rows:
        return
    yield "| key | what | default | meaning |\n|---|---|---|---|"
    for name, kind, default, meaning in rows:
        shown = default if default == "required" else _value(default)
        cells = (f"`{name}`", kind, shown, _prose(meaning))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _attribute_docs(model: type) -> dict[str, str]:
    """The string that follows each attribute of a class, by name."""
    tree = ast.parse(inspect.getsource(model)).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            docs[statement.target.id] = str(ast.literal_eval(following.value))
    return docs


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in _members(part))
    return (hint,)


def _type(hint: Any, bounds: typing.Sequence[Any] = ()) -> str:
    """A type in words, with its bounds."""
    words = []
    for member in _members(hint):
        limits, plain = list(bounds), member
        if typing.get_origin(member) is typing.Annotated:
            plain, *inner = typing.get_args(member)
            limits = inner
        if plain is type(None):
            continue
        if typing.get_origin(plain) is typing.Literal:
            words += [_value(choice) for choice in typing.get_args(plain)]
        elif typing.get_origin(plain) is dict or (
            isinstance(plain, type) and issubclass(plain, pydantic.BaseModel)
        ):
            words.append("table")
        elif plain in WORDS:
            shown = [
                text.format(getattr(limit, key))
                for limit in limits
                for key, text in BOUNDS.items()
                if getattr(limit, key, None) is not None
            ]
            words.append(" ".join([WORDS[plain], " and ".join(shown)]).strip())
        elif plain is Any:
            words.append("anything")
        elif typing.get_origin(plain) in (Mapping, dict):
            words.append(f"table of {_type(typing.get_args(plain)[1])}")
        else:
            inner = [part for part in typing.get_args(plain) if part is not ...]
            words.append(f"list of {_type(inner[0])}" if inner else "list")
    return " or ".join(words)


def _value(value: Any) -> str:
    """A value as TOML writes it; nothing for what TOML has no word for."""
    if value is None or value == {} or isinstance(value, pydantic.BaseModel):
        return ""
    if isinstance(value, tuple | list):
        return f"`{list(value)}`"
    return f"`{str(value).lower()}`" if isinstance(value, bool | int | float) else f'`"{value}"`'


def _prose(text: str) -> str:
    return " ".join(text.replace("``", "`").replace("`None`", "not set").split())


def cli_page() -> str:
    """The reference of the command line: every verb with its arguments and options."""
    from umbel.cli.main import app

    root = typer.main.get_command(app)
    lines = [
        "# The command line",
        NOTE,
        "With `--format json` stdout holds exactly one JSON object and progress goes to stderr. "
        "Exit codes: 0 success, 2 bad input, 3 a privacy budget or a policy refused, 1 any other "
        'failure. Errors are `{"error": {"message", "where", "fix"}}`.\n',
        *_command("umbel", root, click.Context(root, info_name="umbel")),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _command(path: str, command: click.Command, context: click.Context) -> Iterator[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"## `{path}`\n\n{inspect.cleandoc(command.help or '')}\n"
    yield f"```text\n{path} {usage}\n```\n"
    rows = []
    for param in command.params:
        if getattr(param, "hidden", False):
            continue
        name = ", ".join(param.opts)
        if isinstance(param, click.Argument):
            name = param.metavar or param.human_readable_name
        rows.append(f"| `{name}` | {_prose(getattr(param, 'help', None) or '')} |")
    if rows:
        yield "\n".join(["| argument | meaning |", "|---|---|", *rows]) + "\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                inner = click.Context(below, parent=context, info_name=name)
                yield from _command(f"{path} {name}", below, inner)


def soundness_page() -> str:
    """What may be combined, with each reason once."""
    found = soundness.shown(soundness.read())
    lines = [
        "# What may be combined",
        NOTE,
        "A combination works where its task works under the unit of privacy, and its family of "
        "strategies under the unit and secure aggregation; a test runs every one of them for a "
        "round, or is refused. The reasons follow from what tasks, models and strategies declare "
        "and from what a run is measured to do before it starts; they are what `umbel check` "
        "says.\n",
        "## Tasks\n",
        "| task | an example is | example-level privacy | client-level privacy |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{name}` | {' | '.join(row)} |" for name, *row in found.tasks]
    lines += [
        "\n## Strategies\n",
        "*mean*: the combiner is a mean of deltas (`fedavg`, `fedprox`, `fedavgm`, `fedadam` …); "
        "*with uploads*: clients send more than a delta (`scaffold`, `fednova` …); *robust*: every "
        "update is looked at by itself (`median`, `krum` …). With `groups` in "
        "`[secure_aggregation]` robust rules see the sums of random groups.\n",
        "| strategies | privacy | updates in clear | secure aggregation |\n|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in found.families]
    lines.append("\n## Reasons\n")
    lines += [f"{n}. {reason[0].upper()}{reason[1:]}." for n, reason in enumerate(found.reasons, 1)]
    return "\n".join(lines) + "\n"


PAGES = {"run-file.md": run_file_page, "cli.md": cli_page, "soundness.md": soundness_page}


def main(check: bool) -> int:
    """Writes the pages, or says which are out of date."""
    stale = 0
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale += 1
            if check:
                print(f"docs/{name} is out of date; next: make docs", file=sys.stderr)
            else:
                path.write_text(text, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
