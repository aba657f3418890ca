"""What a round is bound to besides its terms: what its members were told to do, and to what."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from umbel.core.payloads import canonical_json


def context_of(
    tables: Mapping[str, Any], purpose: str, round_number: int, model_digest: bytes
) -> bytes:
    """The ``context`` of :class:`~umbel.privacy.secure_aggregation.terms.Terms`, 32 bytes.

    Args:
        tables: the run file's, as the members were sent them.
        purpose: ``train`` or ``evaluate``: no message of one fits the other.
        round_number: 1 … rounds.
        model_digest: hash of the base model.
    """
    manifest = canonical_json({"run": tables, "purpose": purpose, "round": round_number})
    return hashlib.sha256(manifest.encode() + b"\0" + model_digest).digest()
