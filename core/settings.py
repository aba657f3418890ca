"""Strict settings: an unknown key, a wrong type or an impossible number is one clear error.

A part's parameters are read off its factory's keyword-only signature, so that they are written
down once: ``def fedprox(*, mu: NonNegative, server_lr: Positive = 1.0)`` is the schema of
``[strategy]``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, TypeAlias, get_type_hints

import pydantic
from annotated_types import Ge, Gt, Le, Lt

from umbel.core.explain import explain

Positive: TypeAlias = Annotated[float, Gt(0)]
NonNegative: TypeAlias = Annotated[float, Ge(0)]
Fraction: TypeAlias = Annotated[float, Ge(0), Lt(1)]
Share: TypeAlias = Annotated[float, Gt(0), Le(1)]
Count: TypeAlias = Annotated[int, Ge(1)]
Natural: TypeAlias = Annotated[int, Ge(0)]


class Settings(pydantic.BaseModel):
    """A frozen, strict table of settings."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )


def parse(
    model: type[Settings], table: Mapping[str, Any], where: str, also: Collection[str] = ()
) -> Any:
    """``model`` filled from ``table``.

    Raises:
        InputError: naming the first wrong key, its value, what is allowed and the place.
    """
    try:
        return model.model_validate(table)
    except pydantic.ValidationError as error:
        raise explain(error, model, table, where, also) from None


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
    named, either = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    kinds = (named,) if given is None else (named, either)
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
    also: Collection[str] = (),
) -> dict[str, Any]:
    """The keyword arguments that ``table`` gives ``factory``, checked, with defaults filled in.

    Args:
        factory: its keyword-only parameters are the schema.
        table: the settings that the user wrote.
        where: for the error, such as ``[strategy]``.
        owner: whose parameters they are, for the error, such as ``strategy 'fedavg'``.
        given: as in :func:`parameters`.
        also: further keys of that table, which a misspelt key may have meant.

    Raises:
        InputError: as :func:`parse`.
    """
    fields: Any = parameters(factory, given)
    model = pydantic.create_model(owner or factory.__name__, __base__=Settings, **fields)
    checked = parse(model, table, where, also)
    return {name: getattr(checked, name) for name in fields}
