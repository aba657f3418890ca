"""Local privacy: a client clips its own delta and adds the noise before anybody sees it."""

from __future__ import annotations

import torch

from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.run_file import Privacy
from umbel.privacy.clipping import zeroing
from umbel.privacy.sources import Sources


def release(updates: Updates, section: Privacy, buffers: set[str], sources: Sources) -> Updates:
    """What may leave the clients of ``updates``: noised deltas, equal weights, no metrics.

    Buffers are not released: their deltas are zero.

    Raises:
        InputError: a parameter is not floating point, or the noise is not known.

    Source: the Gaussian mechanism at each client; Duchi et al. 2013 for the local model
    (doi:10.1109/FOCS.2013.53).
    """
    if section.noise_multiplier is None:
        raise InputError(
            "the noise multiplier of this run was not calibrated",
            where="[privacy]",
            fix="whoever conducts a run sets noise_multiplier before it starts",
        )
    params = {name: t for name, t in updates.delta.items() if name not in buffers}
    clip = zeroing(section.clip_norm, list(params), section.clipping == "per-layer")
    clipped = clip(params, stacked=True).tree
    std = section.noise_multiplier * section.clip_norm
    rows = [
        sources(updates.round, client).add_gaussian({n: t[row] for n, t in clipped.items()}, std)
        for row, client in enumerate(updates.clients)
    ]
    delta = {name: torch.stack([row[name] for row in rows]) for name in params}
    zeros = {name: torch.zeros_like(updates.delta[name]) for name in buffers}
    ones = torch.ones_like(updates.weights)
    return Updates(updates.round, updates.clients, {**delta, **zeros}, ones, {})
