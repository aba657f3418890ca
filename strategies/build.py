"""From ``[strategy]`` to a strategy."""

from __future__ import annotations

from umbel.core import registry, run_file, settings
from umbel.core.errors import InputError
from umbel.strategies.parts import Strategy


def build_strategy(section: run_file.Strategy) -> Strategy:
    """The strategy that ``[strategy]`` names, with its parameters.

    Raises:
        InputError: no such strategy, or a parameter that is not its own or out of bounds.
    """
    factory = registry.find("strategies", section.name, "[strategy]")
    given = section.parameters()
    for key in given.keys() - settings.parameters(factory).keys():
        if owners := _owners(key):
            raise InputError(
                f"'{key}' is a parameter of {', '.join(owners)}, not of {section.name}",
                where="[strategy]",
                fix=f"remove {key}, or choose that strategy",
            )
    table = settings.arguments(
        factory,
        given,
        "[strategy]",
        f"strategy '{section.name}'",
        also=run_file.Strategy.model_fields,
    )
    strategy: Strategy = factory(**table)
    return strategy


def _owners(key: str) -> list[str]:
    """The strategies that have a parameter ``key``."""
    names = registry.known("strategies")
    found = {name: registry.find("strategies", name, "[strategy]") for name in names}
    return [name for name, factory in found.items() if key in settings.parameters(factory)]
