"""What a failed validation means to whoever wrote the table: key, value, bound, next step."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from umbel.core.errors import InputError, suggest

# Names that people know from elsewhere, and what they are called here.
ALIASES = {
    "learning-rate": "lr",
    "eta": "lr",
    "client-lr": "lr",
    "server-learning-rate": "server_lr",
    "epochs": "local_epochs",
    "steps": "local_steps",
    "bs": "batch_size",
    "batch": "batch_size",
    "clients-per-round": "cohort",
    "fraction-fit": "cohort",
    "num-rounds": "rounds",
    "num-clients": "clients",
    "clip": "max_grad_norm",
    "proximal-mu": "mu",
    "path-to-data": "path",
}

BOUNDS = ((Gt, "gt", "above"), (Ge, "ge", "at least"), (Lt, "lt", "below"), (Le, "le", "at most"))
WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}


class Place(NamedTuple):
    """Where in the tables an error is.

    Args:
        tables: from the outermost, below the one that was parsed.
        key: the offending key, ``metrics[1]`` for an element; empty for a table as a whole.
        field: its schema, or ``None`` where the key is unknown.
        fields: the keys that the table knows.
    """

    tables: tuple[str, ...]
    key: str
    field: FieldInfo | None
    fields: Collection[str]


def explain(
    error: pydantic.ValidationError,
    model: type[pydantic.BaseModel],
    table: Mapping[str, Any],
    where: str,
    also: Collection[str] = (),
) -> InputError:
    """The first error as one that a user can act on.

    Args:
        error: from ``model.model_validate(table)``.
        model: named ``kind 'name'`` where the keys are the parameters of a named part.
        table: what the user wrote.
        where: the table, such as ``[client]``, or the file.
        also: further keys that belong into the table, for the suggestion.
    """
    # A key that is unknown explains one that is missing: it is the same one, misspelt.
    everything = sorted(error.errors(), key=lambda e: e["type"] == "missing")
    first = everything[0]
    place = _place(model, first)
    # Every member of a union complains; one that looked inside a table knows more than the others.
    for other in everything[1:]:
        inner = _place(model, other)
        if inner.tables[: len(place.tables) + 1] == (*place.tables, place.key):
            first, place = other, inner
    kind, key = first["type"], place.key
    section = f"[{'.'.join([where.strip('[]'), *place.tables])}]" if place.tables else where
    if kind == "extra_forbidden":
        owner = f" of {model.__name__}" if " " in model.__name__ else ""
        near = _near(key, place.fields, () if place.tables else also)
        return InputError(f"unknown key '{key}'{owner} in {section}", where=section, fix=near)
    if kind == "missing":
        written = _inside(table, place.tables)
        typos = difflib.get_close_matches(key, [k for k in written if k not in place.fields], n=1)
        fix = f"did you mean '{key}' by '{typos[0]}'?" if typos else f"add {key} = …"
        return InputError(f"'{key}' is missing in {section}", where=section, fix=fix)
    if kind == "value_error":  # raised by a validator of ours: "what is wrong; the next step"
        message, _, fix = str(first["ctx"]["error"]).partition("; ")
        return InputError(message, where=section, fix=fix or f"change {section}")
    value = first["input"]
    wanted = _plain(first["msg"])
    if place.field is not None:
        words = _wanted(_element(place), place.field.metadata)
        wanted = f"must be {words}" if words else wanted
        if kind == "finite_number":
            wanted = wanted.replace("a number", "a finite number")
        if isinstance(place.field.default, str | bool) and words == shown(place.field.default):
            wanted += " in this version"  # a choice of one
    fix = _next_step(place, value) or f"change {key}"
    return InputError(f"{key} = {shown(value)}: {wanted}", where=section, fix=fix)


def shown(value: Any) -> str:
    """A value as TOML writes it, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _place(model: type[pydantic.BaseModel], error: Mapping[str, Any]) -> Place:
    # A location holds the names of union members, too: only keys of the tables count.
    location: Sequence[int | str] = error["loc"]
    unknown = len(location) - 1 if error["type"] == "extra_forbidden" else None
    fields: Mapping[str, FieldInfo] = model.model_fields
    tables: list[str] = []
    key, field, below = "", None, fields
    for depth, part in enumerate(location):
        if isinstance(part, int):
            key += f"[{part}]"
        elif part in below or depth == unknown:
            tables += [key] if key else []
            fields, key, field = below, part, below.get(part)
            nested = _tables(field.annotation) if field else []
            below = nested[0].model_fields if nested else {}
    return Place(tuple(tables), key, field, fields)


def _element(place: Place) -> Any:
    """The type of the key, or of the element of a list that it is."""
    annotation = place.field.annotation if place.field else Any
    for _ in range(place.key.count("[")):
        members = [m for m in _members(annotation) if typing.get_args(m)]
        annotation = typing.get_args(members[0])[0] if members else Any
    return annotation


def _tables(annotation: Any) -> list[type[pydantic.BaseModel]]:
    return [
        m for m in _members(annotation) if isinstance(m, type) and issubclass(m, pydantic.BaseModel)
    ]


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _wanted(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """What a key takes, in words; empty where the annotation says nothing simple."""
    if typing.get_origin(annotation) is Annotated:
        inner, *more = typing.get_args(annotation)
        return _wanted(inner, [*bounds, *more])
    members = [m for m in _members(annotation) if m is not type(None)]
    if len(members) > 1:
        words = [_wanted(member, bounds) for member in members]
        return ", or ".join(words) if all(words) else ""
    member = members[0]
    if typing.get_origin(member) is Annotated:
        return _wanted(member, bounds)
    if typing.get_origin(member) is Literal:
        choices = [shown(choice) for choice in typing.get_args(member)]
        return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    if typing.get_origin(member) in (tuple, list, Sequence) or member in (tuple, list):
        inner = [a for a in typing.get_args(member) if a is not Ellipsis]
        of = f" of {_wanted(inner[0])}" if len(inner) == 1 else ""
        return f"a list{of}"
    if isinstance(member, type) and issubclass(member, pydantic.BaseModel):
        return "a table"
    if member not in WORDS:
        return ""
    limits = [
        f"{word} {getattr(bound, attribute):g}"
        for kind, attribute, word in BOUNDS
        for bound in bounds
        if isinstance(bound, kind)
    ]
    pattern = next((p for b in bounds if (p := getattr(b, "pattern", None))), None)
    limits += [f"matching {pattern}"] if pattern else []
    return " ".join([WORDS[member], " and ".join(limits)]).strip()


def _next_step(place: Place, value: Any) -> str:
    if place.field is None:
        return ""
    members = _members(place.field.annotation)
    choices = [c for m in members if typing.get_origin(m) is Literal for c in typing.get_args(m)]
    if isinstance(value, str):
        words = [c for c in choices if isinstance(c, str)]
        if near := difflib.get_close_matches(value, words, n=1):
            return f"did you mean '{near[0]}'?"
        for table in _tables(place.field.annotation):
            required = [n for n, f in table.model_fields.items() if f.is_required()]
            if len(required) == 1:
                return f'{place.key} = {{ {required[0]} = "{value}" }}'
        if value.replace(".", "", 1).replace("-", "", 1).isdigit():
            return f"write {place.key} = {value} without quotes"
    wanted = _wanted(_element(place))
    if wanted.startswith("a list of") and not isinstance(value, list | tuple):
        return f"write {place.key} = [{shown(value)}]"
    if wanted == "text" and isinstance(value, int | float):
        return f'write {place.key} = "{shown(value)}"'
    if isinstance(value, float) and value.is_integer() and "whole number" in wanted:
        return f"write {place.key} = {int(value)}"
    default = place.field.default
    if isinstance(default, bool | int | float | str):
        return f"the default is {shown(default)}"
    return ""


def _inside(table: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    for part in path:
        below = table.get(part)
        if not isinstance(below, Mapping):
            return {}
        table = below
    return table


def _near(key: str, fields: Collection[str], also: Collection[str]) -> str:
    # 'learning_rat' is near the alias 'learning-rate', which is called lr here.
    names = {f.replace("_", "-"): f for f in (*also, *fields)} | {
        alias: name for alias, name in ALIASES.items() if name in fields
    }
    close = difflib.get_close_matches(key.replace("_", "-").lower(), names, n=1)
    return f"did you mean '{names[close[0]]}'?" if close else suggest(key, fields)


def _plain(message: str) -> str:
    return message.replace("Input should be", "must be")
