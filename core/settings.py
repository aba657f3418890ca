"""Strict settings: an unknown key, a wrong type or an impossible number is one clear error.

A part's parameters are read off its factory's keyword-only signature, so that they are written down
once: ``def fedprox(*, mu: NonNegative, server_lr: Positive = 1.0)`` is the schema of ``[strategy]``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, TypeAlias, get_type_hints

import pydantic
from annotated_types import Ge, Gt, Le, Lt

from umbel.core.errors import InputError, suggest

Positive: TypeAlias = Annotated[float, Gt(0)]
NonNegative: TypeAlias = Annotated[float, Ge(0)]
Fraction: TypeAlias = Annotated[float, Ge(0), Lt(1)]
Share: TypeAlias = Annotated[float, Gt(0), Le(1)]
Count: TypeAlias = Annotated[int, Ge(1)]
Natural: TypeAlias = Annotated[int, Ge(0)]

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


class Settings(pydantic.BaseModel):
    """A frozen, strict table of settings."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )


def parse(model: type[Settings], table: Mapping[str, Any], where: str) -> Any:
    """``model`` filled from ``table``.

    Raises:
        InputError: naming the first wrong key, its value, what is allowed and the place.
    """
    try:
        return model.model_validate(table)
    except pydantic.ValidationError as error:
        raise _explain(error, model, where) from None


def parameters(
    factory: Callable[..., Any], given: Collection[str] | None = None
) -> dict[str, tuple[Any, Any]]:
    """The parameters of ``factory`` that a user sets: name -> (type, default or ``...``).

    These are the keyword-only ones; for a user's own factory, of which that cannot be asked, all
    that are not in ``given``.
    """
    signature = inspect.signature(factory)
    hints = get_type_hints(
        factory.__init__ if inspect.isclass(factory) else factory, include_extras=True
    )
    kinds = {inspect.Parameter.KEYWORD_ONLY}
    if given is not None:
        kinds.add(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {
        name: (hints.get(name, Any), ... if p.default is p.empty else p.default)
        for name, p in signature.parameters.items()
        if p.kind in kinds and name not in (given or ())
    }


def arguments(
    factory: Callable[..., Any],
    table: Mapping[str, Any],
    where: str,
    owner: str = "",
    given: Collection[str] | None = None,
) -> dict[str, Any]:
    """The keyword arguments that ``table`` gives ``factory``, checked, with defaults filled in.

    Args:
        factory: its keyword-only parameters are the schema.
        table: the settings that the user wrote.
        where: for the error, such as ``[strategy]``.
        owner: whose parameters they are, for the error, such as ``strategy 'fedavg'``.
        given: as in :func:`parameters`.

    Raises:
        InputError: as :func:`parse`.
    """
    fields: Any = parameters(factory, given)
    model = pydantic.create_model(owner or factory.__name__, __base__=Settings, **fields)
    checked = parse(model, table, where)
    return {name: getattr(checked, name) for name in fields}


def _explain(error: pydantic.ValidationError, model: type[Settings], where: str) -> InputError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    table, fields = _table(model, path[:-1])
    place = f"[{'.'.join([where.strip('[]'), *table])}]" if table else where
    key, kind = (path[-1] if path else ""), first["type"]
    if kind == "extra_forbidden":
        owner = f" of {model.__name__}" if " " in model.__name__ else ""
        alias = ALIASES.get(key.replace("_", "-").lower())
        near = f"did you mean '{alias}'?" if alias in fields else _near(key, fields)
        return InputError(f"unknown key '{key}'{owner} in {place}", where=place, fix=near)
    if kind == "missing":
        return InputError(f"'{key}' is missing in {place}", where=place, fix=f"add {key} = …")
    value = first.get("input")
    return InputError(
        f"{key} = {value!r}: {_plain(first['msg'])}", where=place, fix=f"change {key} in {place}"
    )


def _near(key: str, fields: set[str]) -> str:
    # 'learning_rat' is near the alias 'learning-rate', which is called lr here.
    import difflib

    names = {f.replace("_", "-"): f for f in fields} | {
        alias: name for alias, name in ALIASES.items() if name in fields
    }
    close = difflib.get_close_matches(key.replace("_", "-").lower(), names, n=1)
    return f"did you mean '{names[close[0]]}'?" if close else suggest(key, fields)


def _table(model: type[Settings], path: list[str]) -> tuple[list[str], set[str]]:
    """The keys that are known at ``path`` below ``model``."""
    fields: Any = model.model_fields
    tables = []
    for part in path:
        annotation = fields[part].annotation if part in fields else None
        nested = [
            a
            for a in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(a, type) and issubclass(a, pydantic.BaseModel)
        ]
        if not nested:
            break
        tables.append(part)
        fields = nested[0].model_fields
    return tables, set(fields)


def _plain(message: str) -> str:
    return message[0].lower() + message[1:].replace("Input should be", "must be")
