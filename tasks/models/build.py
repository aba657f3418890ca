"""From a model's name in the run file to a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from umbel.core import registry, settings
from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.datasets.federated import Info

WHERE = "[task.model]"


def builder(
    part: Part | str | None, info: Info, outputs: int, head: str = "class"
) -> Callable[[], nn.Module]:
    """What builds the model that ``part`` names; ``None`` is logistic regression.

    A factory is called with ``info``, ``outputs`` and ``head`` where it has parameters of these
    names, and with the further keys of the table.

    Args:
        part: the model.
        info: of the data.
        outputs: numbers that it gives, for an example or for each of its symbols.
        head: ``class``, an output for each example; ``causal`` or ``masked``, one for each symbol,
            which sees the symbols before it or all.

    Raises:
        InputError: no such model, a parameter that is not its own, or no module built.
    """
    part = part or "logistic"
    name, table = (part, {}) if isinstance(part, str) else (part.name, part.parameters())
    factory = registry.find("models", name, WHERE)
    offered = {"info": info, "outputs": outputs, "head": head}
    given = offered if ":" in name else None
    wanted = inspect.signature(factory).parameters
    kwargs = settings.arguments(factory, table, WHERE, f"model '{name}'", given)
    kwargs |= {key: value for key, value in offered.items() if key in wanted}
    return partial(_build, factory, name, kwargs)


def _build(factory: Callable[..., object], name: str, kwargs: dict[str, object]) -> nn.Module:
    try:
        module = factory(**kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        fix = "check its parameters"
        raise InputError(
            f"model '{name}' cannot be built: {error}", where=WHERE, fix=fix
        ) from error
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        fix = "return a torch.nn.Module"
        raise InputError(f"model '{name}' is a {kind}, not a module", where=WHERE, fix=fix)
    if not any(p.requires_grad for p in module.parameters()):
        fix = "leave at least one parameter trainable"
        raise InputError(f"model '{name}' has nothing to train", where=WHERE, fix=fix)
    return module


def needs(info: Info, model: str, *, images: bool = False, symbols: bool = False) -> None:
    """Refuses data that a model cannot take.

    Raises:
        InputError: ``x`` is not an image (channels, height, width), or not symbols, or is.
    """
    if symbols != (info.vocabulary is not None):
        has, takes = ("symbols", "numbers") if info.vocabulary else ("numbers", "symbols")
        raise InputError(
            f"model '{model}' takes {takes}, and data set '{info.name}' holds {has}",
            where=WHERE,
            fix="choose 'gpt', 'char-lstm' or 'transformers' for text, another model for numbers",
        )
    if images and len(info.input_shape) != 3:
        raise InputError(
            f"model '{model}' takes images (channels, height, width); an x of data set "
            f"'{info.name}' has shape {info.input_shape}",
            where=WHERE,
            fix="choose 'logistic' or 'mlp'",
        )
