"""From ``[strategy]`` to a strategy."""

from __future__ import annotations

from umbel.core import registry, run_file, settings
from umbel.strategies.parts import Strategy


def build_strategy(section: run_file.Strategy) -> Strategy:
    """The strategy that ``[strategy]`` names, with its parameters.

    Raises:
        InputError: no such strategy, or a parameter that is not its own or out of bounds.
    """
    factory = registry.find("strategies", section.name, "[strategy]")
    table = settings.arguments(
        factory,
        section.parameters(),
        "[strategy]",
        f"strategy '{section.name}'",
        also=run_file.Strategy.model_fields,
    )
    strategy: Strategy = factory(**table)
    return strategy
