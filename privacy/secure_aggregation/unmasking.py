"""The last step: secrets rebuilt from shares, checked, and their masks taken off the sum."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping

from umbel.privacy.secure_aggregation import shamir
from umbel.privacy.secure_aggregation.agreement import KeyPair, Purpose, RoundKeys
from umbel.privacy.secure_aggregation.keystream import Words, add_streams
from umbel.privacy.secure_aggregation.messages import Unmask
from umbel.privacy.secure_aggregation.statements import seed_digest


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
    seed_digests: Mapping[int, bytes],
    mask_keys: Mapping[int, bytes],
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
        seed_digests: of each survivor's seed. mask_keys: the public mask keys.
    Raises:
        Cannot: the shares of some member do not give the secret that it committed to.
    """
    shares: dict[int, dict[int, bytes]] = {m: {} for m in (*survivors, *dead)}
    for message in opened:
        for member, share in (*message.seeds, *message.mask_keys):
            shares[member][bisect_left(neighbours[member], message.member) + 1] = share
    alive = set(survivors)
    remove: list[bytes] = []
    restore: list[bytes] = []
    for member in survivors:
        seed = _rebuild(member, shares[member], threshold)
        if seed_digest(graph_digest, member, seed) != seed_digests[member]:
            raise Cannot(f"the shares of member {member}'s seed are not those that it dealt")
        remove.append(keys.derive(seed, member, member, Purpose.SELF_MASK))
    for member in dead:
        live = [v for v in partners[member] if v in alive]
        if not live:
            continue
        pair = KeyPair(_rebuild(member, shares[member], threshold))
        if pair.public_key != mask_keys[member]:
            raise Cannot(f"the shares of member {member}'s key are not those that it dealt")
        for v in live:
            mask = keys.mask(pair.agree(mask_keys[v], v), member, v)
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
