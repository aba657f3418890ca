"""Umbel: federated and private learning.

The folders of the repository are the packages of this one namespace: ``umbel.server`` is the
folder ``server/``, and so on. Importing ``umbel`` itself imports none of them, so that it costs
nothing.
"""

__version__ = "0.1.0"
