"""Bounding what one unit may contribute: the clip, and the sensitivity that it carries with it.

Trees hold one unit's contribution, name -> (*shape), or those of C units, name -> (C, *shape).
Norms are taken in float64. A clipped tree is measured again *as it is stored*: rounding to float32
or bfloat16 never leaves it longer than the bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.trees import Tree
from umbel.privacy.mechanisms import Relation, factor

NotFinite: TypeAlias = Literal["error", "zero"]


class Clipped(NamedTuple):
    """What a clip gives back.

    Args:
        tree: the clipped contributions; names, shapes and dtypes unchanged.
        norms: float64, () or (C,): L2 norms before clipping; ``inf`` where not finite, or where
            float64 cannot hold the norm. Private: to publish them, or their count, is a release.
        finite: bool, () or (C,): False where the contribution was zeroed for its norm of ``inf``.
    """

    tree: dict[str, Tensor]
    norms: Tensor
    finite: Tensor


@dataclass(frozen=True)
class FlatClip:
    """Scales a contribution so that its global L2 norm is at most ``clip_norm``.

    Guarantees: the norm of what is returned, taken in float64, is at most clip_norm; direction kept
    to rounding; what is short enough is returned bit by bit; zero stays zero; NaN and infinity
    never pass; names, shapes and dtypes unchanged.

    Args:
        clip_norm: bound on the L2 norm of the concatenated tree, in its units; finite, > 0.
        not_finite: ``error``: raise; ``zero``: that unit contributes nothing. A server that
            must go on takes ``zero``.

    Raises:
        InputError: ``clip_norm`` is not finite or not positive.

    Source: McMahan et al. 2018, FlatClip (arXiv:1710.06963); Abadi et al. 2016 (arXiv:1607.00133).
    """

    clip_norm: float
    not_finite: NotFinite = "error"

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)

    def sensitivity(self, relation: Relation = "add-or-remove-one") -> float:
        """How far one unit can move the sum of clipped contributions, in L2."""
        return factor(relation) * self.clip_norm

    def __call__(self, tree: Tree, stacked: bool = False) -> Clipped:
        """Clips one contribution, or with ``stacked`` each of C.

        Raises:
            InputError: not floating point, of different C, or not finite with ``error``.
        """
        return _clip(tree, stacked, self.not_finite, [(list(tree), self.clip_norm)])


@dataclass(frozen=True)
class LayerClip:
    """Clips each tensor by its own bound; guarantees as :class:`FlatClip`, tensor by tensor.

    Args:
        clip_norms: name -> bound on that tensor's L2 norm; every name of the tree, no other.
        not_finite: as in :class:`FlatClip`; one bad tensor zeroes the whole unit.

    Source: McMahan et al. 2018, PerLayerClip (arXiv:1710.06963).
    """

    clip_norms: Mapping[str, float]
    not_finite: NotFinite = "error"

    def __post_init__(self) -> None:
        for norm in self.clip_norms.values():
            check_clip_norm(norm)

    @property
    def clip_norm(self) -> float:
        """The bound on the whole contribution: the root of the summed squares, rounded up."""
        total = math.sqrt(math.fsum(c * c for c in self.clip_norms.values()))
        return math.nextafter(total, math.inf)

    def sensitivity(self, relation: Relation = "add-or-remove-one") -> float:
        """How far one unit can move the sum of clipped contributions, in L2."""
        return factor(relation) * self.clip_norm

    def __call__(self, tree: Tree, stacked: bool = False) -> Clipped:
        """Clips one contribution, or with ``stacked`` each of C.

        Raises:
            InputError: as :class:`FlatClip`; or the names are not those of the bounds.
        """
        if tree.keys() != self.clip_norms.keys():
            odd = sorted(tree.keys() ^ self.clip_norms.keys())
            raise InputError(
                f"'{odd[0]}' has a tensor or a bound, not both",
                where="clipping",
                fix="give each tensor one bound",
            )
        groups = [([name], norm) for name, norm in self.clip_norms.items()]
        return _clip(tree, stacked, self.not_finite, groups)


Clip: TypeAlias = FlatClip | LayerClip


def even_layers(clip_norm: float, names: list[str], not_finite: NotFinite = "error") -> LayerClip:
    """A per-layer clip whose layers share ``clip_norm`` evenly: clip_norm / sqrt(layers) each."""
    each = clip_norm / math.sqrt(len(names)) if names else clip_norm
    return LayerClip(dict.fromkeys(names, math.nextafter(each, 0.0)), not_finite)


def zeroing(clip_norm: float, names: list[str], per_layer: bool) -> Clip:
    """A clip under which what is not finite contributes nothing: what goes on whatever comes.

    Args:
        clip_norm: bound on the whole.
        names: of the tree.
        per_layer: whether the tensors share the bound evenly.
    """
    return even_layers(clip_norm, names, "zero") if per_layer else FlatClip(clip_norm, "zero")


def check_clip_norm(clip_norm: float) -> None:
    """Raises an InputError unless ``clip_norm`` is finite and positive."""
    if not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise InputError(
            f"clip_norm = {clip_norm} is not a finite positive number",
            where="clipping",
            fix="start from the median norm of contributions, or clip adaptively",
        )


def unit_norms(tree: Tree, stacked: bool = False) -> Tensor:
    """The L2 norm of each unit's contribution: float64, () or (C,); ``inf`` where not finite."""
    rows = _rows(tree, stacked)
    norms = _norms([rows[name] for name in tree])
    return norms if stacked else norms[0]


def _clip(
    tree: Tree, stacked: bool, not_finite: NotFinite, groups: list[tuple[list[str], float]]
) -> Clipped:
    rows = _rows(tree, stacked)
    by_group = [_norms([rows[name] for name in names]) for names, _ in groups]
    total = _joined(by_group)
    finite = torch.stack(by_group).isfinite().all(0)
    if not_finite == "error" and not bool(finite.all()):
        raise _not_finite(rows)
    out: dict[str, Tensor] = {}
    for (names, bound), norms in zip(groups, by_group, strict=True):
        group = {name: rows[name] for name in names}
        out.update(_scaled(group, norms, finite, bound))
    shaped = {name: out[name].view(t.shape) for name, t in tree.items()}
    return Clipped(shaped, total, finite) if stacked else Clipped(shaped, total[0], finite[0])


def _scaled(rows: Tree, norms: Tensor, finite: Tensor, bound: float) -> dict[str, Tensor]:
    """The rows, each at most ``bound`` long as stored."""
    if bool((finite & (norms <= bound)).all()):
        return dict(rows)
    out = {name: torch.where(finite[:, None], t, torch.zeros_like(t)) for name, t in rows.items()}
    now = torch.where(finite, norms, torch.zeros_like(norms))
    for _ in range(4):
        long = now > bound
        if not bool(long.any()):
            return out
        scale = torch.where(long, bound / now, torch.ones_like(now))
        # A hair shorter, by the rounding of this dtype, so that one pass is enough.
        out = {name: _scale(t, torch.where(long, scale, 1.0), long) for name, t in out.items()}
        now = _norms(list(out.values()))
    # Bounds as small as the dtype's least numbers: nothing is always short enough.
    short = (now <= bound)[:, None]
    return {name: torch.where(short, t, torch.zeros_like(t)) for name, t in out.items()}


def _scale(t: Tensor, scale: Tensor, long: Tensor) -> Tensor:
    hair = torch.where(long, scale * (1 - 2 * torch.finfo(t.dtype).eps), scale)
    if t.dtype != torch.float32:
        return (t.double() * hair[:, None]).to(t.dtype)
    out = t * hair.float()[:, None]
    tiny = (hair < 1e-30).nonzero()[:, 0]  # float32 would hold too few digits of these
    if len(tiny):
        out[tiny] = (t[tiny].double() * hair[tiny, None]).float()
    return out


def _norms(rows: list[Tensor]) -> Tensor:
    """(C,) float64 over all tensors (C, n), rounded up; ``inf`` where a value is not finite."""
    if not rows:
        return torch.zeros(1, dtype=torch.float64)
    parts = [torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in rows]
    norms = _joined(parts)
    # Where squares may have over- or underflowed: once more, relative to the largest value.
    odd = (~norms.isfinite() | (norms < 1e-140)).nonzero()[:, 0]
    if len(odd):
        norms[odd] = _joined([_careful(t[odd]) for t in rows])
    # Above what summation in float64, in whatever order, may have rounded off.
    return norms * (1 + (8 + sum(t.shape[1] for t in rows)) * 2.0**-53)


def _careful(t: Tensor) -> Tensor:
    """The norm of each row (C, n), whatever the exponents; ``inf`` where a value is not finite."""
    if not t.shape[1]:
        return torch.zeros(len(t), dtype=torch.float64, device=t.device)
    peak = t.double().abs().amax(1)
    safe = torch.where((peak > 0) & peak.isfinite(), peak, 1.0)
    norms = torch.linalg.vector_norm(t.double() / safe[:, None], dim=1) * safe
    return torch.where(norms.isnan(), math.inf, norms)


def _joined(norms: list[Tensor]) -> Tensor:
    """The norm of a concatenation, of the norms (C,) of its parts, without overflow."""
    return functools.reduce(torch.hypot, norms)


def _rows(tree: Tree, stacked: bool) -> dict[str, Tensor]:
    """Each tensor as (C, n), C = 1 for a single unit."""
    for name, t in tree.items():
        if not t.dtype.is_floating_point:
            raise InputError(
                f"'{name}' is {str(t.dtype).removeprefix('torch.')}, not floating point",
                where="clipping",
                fix="keep integers and complex numbers out of what is clipped",
            )
    sizes = {t.shape[:1] for t in tree.values()} if stacked else set()
    if len(sizes) > 1 or torch.Size([]) in sizes:
        raise InputError(
            f"stacked tensors begin with {sorted(map(tuple, sizes))}",
            where="clipping",
            fix="give every tensor the same first axis, one row a unit",
        )
    return {
        name: t.reshape(t.shape[0], t[0].numel() if t.shape[0] else 0)
        if stacked
        else t.reshape(1, -1)
        for name, t in tree.items()
    }


def _not_finite(rows: Tree) -> InputError:
    bad = {name: int((~t.isfinite()).sum()) for name, t in rows.items()}
    name = max(bad, key=lambda name: bad[name])
    what = f"'{name}' has {bad[name]} value(s) NaN or infinite"
    return InputError(
        what if bad[name] else "the norm of a contribution is beyond float64",
        where="clipping",
        fix="lower the learning rate, or clip with not_finite='zero' to leave that unit out",
    )
