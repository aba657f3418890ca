"""No defence: what all others are measured by."""

from __future__ import annotations

from umbel.strategies.parts.defence import Defence


def naive() -> Defence:
    """Nothing is done: each experience is trained on as it comes."""
    return Defence()
