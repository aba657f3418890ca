"""The last step: secrets rebuilt from shares, checked, and their masks taken off the sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from umbel.privacy.secure_aggregation import shamir
from umbel.privacy.secure_aggregation.agreement import RoundKeys
from umbel.privacy.secure_aggregation.boxes import TAG_BYTES
from umbel.privacy.secure_aggregation.keystream import Words, add_streams
from umbel.privacy.secure_aggregation.messages import Shares, Unmask
from umbel.privacy.secure_aggregation.statements import root_digest, seed_digest


class Cannot(Exception):
    """The round cannot go on; the text says what is missing."""


def unmask(
    total: Words,
    *,
    opened: Iterable[Unmask],
    neighbours: Mapping[int, tuple[int, ...]],
    partners: Mapping[int, tuple[int, ...]],
    survivors: tuple[int, ...],
    dead: tuple[int, ...],
    threshold: int,
    dealt: Mapping[int, Shares],
    seals: Mapping[int, Mapping[int, bytes]],
    graph_digest: bytes,
    keys: RoundKeys,
) -> None:
    """Takes the self-masks of survivors and the masks shared with the dead off ``total``.

    Args:
        total: shape (size,), the sum of the masked vectors; changed in place, only at the end.
        opened: what the members gave.
        neighbours: of each member, ascending; the i-th holds the share at point i + 1.
        partners: of each dead member, those with whom it shares a mask.
        threshold: shares that open a secret.
        dealt: what each member dealt, with the digests of its secrets.
        seals: of each survivor, by neighbour: a tag, and its half of the mask key, wrapped.
    Raises:
        Cannot: the shares of some member do not give the secret that it committed to.
    """
    shares: dict[int, dict[int, bytes]] = {m: {} for m in (*survivors, *dead)}
    place = {m: {v: i for i, v in enumerate(listed, 1)} for m, listed in neighbours.items()}
    for message in opened:
        holder = message.member
        for member, share in (*message.seeds, *message.roots):
            shares[member][place[member][holder]] = share
    alive = set(survivors)
    remove: list[bytes] = []
    restore: list[bytes] = []
    for member in survivors:
        seed = _rebuild(member, shares[member], threshold)
        if seed_digest(graph_digest, member, seed) != dealt[member].seed_digest:
            raise Cannot(f"the shares of member {member}'s seed are not those that it dealt")
        remove.append(keys.self_mask(seed, member))
    for member in dead:
        live = [v for v in partners[member] if v in alive]
        if not live:
            continue
        root = _rebuild(member, shares[member], threshold)
        if root_digest(graph_digest, member, root) != dealt[member].root_digest:
            raise Cannot(f"the shares of member {member}'s root are not those that it dealt")
        for v in live:
            half = keys.half(root, member, v)
            other = keys.wrap(seals[v][member][TAG_BYTES:], half, v, member)
            mask = keys.mask((half, other), member, v)
            # v added the mask with a higher number and took off the one with a lower.
            (remove if member > v else restore).append(mask)
    add_streams(total, restore, remove)


def _rebuild(member: int, shares: Mapping[int, bytes], threshold: int) -> bytes:
    used = dict(sorted(shares.items())[:threshold])
    if len(used) < threshold:
        raise Cannot(f"{len(used)} shares of member {member}, need {threshold}")
    try:
        return shamir.combine(used)
    except shamir.InconsistentSharesError:
        raise Cannot(f"the shares of member {member} do not belong together") from None
