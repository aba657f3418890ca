"""From the name of a method to the method."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from umbel.core import registry, settings
from umbel.core.run_file import Part
from umbel.tasks.self_supervised.method import Method

WHERE = "[task] method"


def method_of(given: str | dict[str, Any], encoder: nn.Module, embedding: int) -> Method:
    """The method that is named.

    A factory is called with ``encoder`` and ``embedding`` where it has parameters of these names.

    Args:
        given: a name, or a table of a name and the method's own keys.
        encoder: one such as is to be trained.
        embedding: numbers that it gives.

    Raises:
        InputError: no such method, a parameter that is not its own, or an encoder it cannot train.
    """
    part = Part(name=given) if isinstance(given, str) else settings.parse(Part, given, WHERE)
    factory = registry.find("methods", part.name, WHERE)
    offered = {"encoder": encoder, "embedding": embedding}
    wanted = inspect.signature(factory).parameters
    owner, own = f"method '{part.name}'", offered if ":" in part.name else None
    table = settings.arguments(factory, part.parameters(), WHERE, owner, own)
    table |= {key: value for key, value in offered.items() if key in wanted}
    found: Method = factory(**table)
    return found
