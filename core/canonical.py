"""One text for one value, for hashes and signatures."""

from __future__ import annotations

import json
from typing import Any


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN. For hashes and signatures."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
