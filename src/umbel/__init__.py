"""Umbel: federated and private learning.

The folders of the repository are the packages of this one namespace: ``umbel.server`` is the
folder ``server/``, and so on. Importing ``umbel`` itself imports none of them, so that it costs
nothing.
"""

import os

TYPE_CHECKING = False  # type checkers know the name; importing typing would cost time
if TYPE_CHECKING:
    from umbel.server.flower.strategy import as_flower, from_arrays, to_arrays

__version__ = "0.1.0"

__all__ = ["__version__", "as_flower", "from_arrays", "to_arrays"]

# Flower and Ray report their use, and Flower looks for updates, unless they are told not to before
# they are imported. Whoever wants that says so in the environment.
for _switch, _off in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_switch, _off)


def __getattr__(name: str) -> object:
    """Loads what is borrowed by other programs only when they ask for it."""
    if name in ("as_flower", "from_arrays", "to_arrays"):
        from umbel.server.flower import strategy

        found: object = getattr(strategy, name)
        return found
    raise AttributeError(f"module 'umbel' has no attribute {name!r}")
