"""From ``[strategy]`` to a strategy, and from ``[continual]`` to a defence."""

from __future__ import annotations

from umbel.core import registry, run_file, settings
from umbel.core.errors import InputError
from umbel.core.messages import Question
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.defence import Classes, Defence, defended, measuring
from umbel.strategies.parts.prototypes import class_sums


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


def build_defence(section: run_file.Continual) -> Defence:
    """The defence that ``[continual]`` names.

    Raises:
        InputError: no such defence, or a parameter that is not its own or out of bounds.
    """
    named = section.defence
    name, table = (named, {}) if isinstance(named, str) else (named.name, named.parameters())
    where = "[continual] defence"
    factory = registry.find("defences", name, where)
    given = settings.arguments(factory, table, where, f"defence '{name}'")
    defence: Defence = factory(**given)
    return defence


def asking(
    question: Question, strategy: Strategy, defence: Defence, classes: Classes, width: int
) -> Strategy:
    """What a round is made by in which clients are asked ``question``.

    Args:
        question: as of a :class:`~umbel.core.messages.Stage`.
        strategy: what the run names.
        defence: the same.
        classes: what the defence knows of the experiences.
        width: of the model's features, for prototypes.
    """
    if question == "train":
        return defended(strategy, defence, classes)
    if question == "prototypes":
        return class_sums(classes.groups.shape[1], width)
    if question == "importance" and defence.measure is not None:
        return measuring(defence.measure)
    return strategy


def _owners(key: str) -> list[str]:
    """The strategies that have a parameter ``key``."""
    names = registry.known("strategies")
    found = {name: registry.find("strategies", name, "[strategy]") for name in names}
    return [name for name, factory in found.items() if key in settings.parameters(factory)]
