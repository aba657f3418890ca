"""The last step: secrets rebuilt from shares, checked, and their masks taken off the sum."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from umbel.privacy.secure_aggregation import shamir
from umbel.privacy.secure_aggregation.agreement import RoundKeys
from umbel.privacy.secure_aggregation.boxes import TAG_BYTES
from umbel.privacy.secure_aggregation.edges import Bytes, Edges, Flags
from umbel.privacy.secure_aggregation.keystream import Words, add_streams
from umbel.privacy.secure_aggregation.statements import root_digest, seed_digest


class Cannot(Exception):
    """The round cannot go on; the text says what is missing."""


def unmask(
    total: Words,
    edges: Edges,
    *,
    opened: Bytes,
    given: Flags,
    live: Flags,
    survivors: tuple[int, ...],
    dead: tuple[int, ...],
    threshold: int,
    digests: Mapping[int, tuple[bytes, bytes]],
    seals: Bytes,
    graph_digest: bytes,
    keys: RoundKeys,
) -> None:
    """Takes the self-masks of survivors and the masks shared with the dead off ``total``.

    Args:
        total: shape (size,), the sum of the masked vectors; changed in place, only at the end.
        edges: the graph; the holder at place i of a row has the share at point i + 1.
        opened: by holder, the share of each neighbour's secret, shape (n, k, 33).
        given: by whose secret it is, which holders answered, shape (n, k).
        live: the edges with a mask that lead to a survivor, shape (n, k).
        threshold: shares that open a secret.
        digests: of each member's seed and root, as it dealt them.
        seals: by sender, for each neighbour a tag and its half of the mask key, wrapped.
    Raises:
        Cannot: the shares of some member do not give the secret that it committed to.
    """
    # The first holders of each, and how many there are.
    first = np.argsort(~given, axis=1, kind="stable")[:, :threshold]
    counts = given.sum(axis=1)
    shares = opened.reshape(-1, opened.shape[-1])[np.take_along_axis(edges.back, first, axis=1)]

    def rebuilt(member: int) -> bytes:
        row = edges.row[member]
        if counts[row] < threshold:
            raise Cannot(f"{counts[row]} shares of member {member}, need {threshold}")
        held, width = shares[row].tobytes(), shares.shape[-1]
        points = [place + 1 for place in first[row].tolist()]
        parts = [held[at : at + width] for at in range(0, len(held), width)]
        try:
            return shamir.combine(dict(zip(points, parts, strict=True)))
        except shamir.InconsistentSharesError:
            raise Cannot(f"the shares of member {member} do not belong together") from None

    remove: list[bytes] = []
    restore: list[bytes] = []
    for member in survivors:
        seed = rebuilt(member)
        if seed_digest(graph_digest, member, seed) != digests[member][0]:
            raise Cannot(f"the shares of member {member}'s seed are not those that it dealt")
        remove.append(keys.self_mask(seed, member))
    for member in dead:
        row = edges.row[member]
        places = np.flatnonzero(live[row])
        if not len(places):
            continue
        root = rebuilt(member)
        if root_digest(graph_digest, member, root) != digests[member][1]:
            raise Cannot(f"the shares of member {member}'s root are not those that it dealt")
        sealed = seals.reshape(-1, seals.shape[-1])[edges.back[row, places], TAG_BYTES:]
        for v, wrapped in zip(edges.numbers[row, places].tolist(), sealed, strict=True):
            half = keys.half(root, member, v)
            mask = keys.mask((half, keys.wrap(wrapped.tobytes(), half, v, member)), member, v)
            # v added the mask with a higher number and took off the one with a lower.
            (remove if member > v else restore).append(mask)
    add_streams(total, restore, remove)
