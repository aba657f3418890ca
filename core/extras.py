"""Packages that a site and a server do without: an extra of the installation brings each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from umbel.core.errors import InputError


@contextmanager
def extra(name: str, where: str) -> Iterator[None]:
    """Around the imports of what ``pip install 'umbel[name]'`` brings.

    Args:
        name: of the extra, as in pyproject.toml.
        where: what the user asked for.

    Raises:
        InputError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"this needs the package {error.name}, which is not installed",
            where=where,
            fix=f"pip install 'umbel[{name}]'",
        ) from None
