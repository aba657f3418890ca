from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.trees import Tree
from umbel.privacy.clipping import Clip, FlatClip, LayerClip, even_layers, unit_norms
from umbel.privacy.mechanisms import Relation

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAMES = ["a", "b"]


def exact_norm(tree: Tree, row: int | None = None) -> float:
    """The L2 norm by compensated summation, of one row or of a whole tree."""
    values = [t if row is None else t[row] for t in tree.values()]
    return math.hypot(*[v for t in values for v in t.double().flatten().tolist()])


def units(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Eight contributions, each nasty in its own way."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(8, 40, generator=generator).to(dtype)
    b = torch.randn(8, 2, 3, generator=generator).to(dtype)
    info = torch.finfo(dtype)
    a[0], b[0] = 0, 0
    a[1, 7] = math.nan
    b[2, 0, 0] = -math.inf
    a[3] = info.max / 16
    a[4], b[4] = info.tiny, 0
    a[5] = info.smallest_normal * info.eps
    a[6], b[6] = a[6] * 1e-3, 0
    return {"a": a, "b": b}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 7.3])
@pytest.mark.parametrize("layers", [False, True])
def test_no_unit_is_longer_than_declared(
    dtype: torch.dtype, clip_norm: float, layers: bool
) -> None:
    clip: Clip = FlatClip(clip_norm, "zero")
    if layers:
        clip = even_layers(clip_norm, NAMES, "zero")
    contributions = units(dtype)
    clipped = clip(contributions, stacked=True)
    whole = dict(clipped.tree)
    assert {n: (t.shape, t.dtype) for n, t in whole.items()} == {
        n: (t.shape, t.dtype) for n, t in contributions.items()
    }
    for row in range(8):
        assert exact_norm(whole, row) <= clip_norm, row
    assert clipped.finite.tolist() == [True, False, False, True, True, True, True, True]
    assert exact_norm(whole, 1) == exact_norm(whole, 2) == 0
    assert clipped.norms.isinf().tolist() == [False, True, True, *[False] * 5]
    assert exact_norm(whole, 3) > 0.9 * clip_norm / math.sqrt(2 if layers else 1)


@pytest.mark.parametrize("relation", ["add-or-remove-one", "zero-out", "replace-one"])
@pytest.mark.parametrize("layers", [False, True])
def test_measured_influence_is_within_the_declared_sensitivity(
    relation: Relation, layers: bool
) -> None:
    clip: Clip = even_layers(1.5, NAMES, "zero") if layers else FlatClip(1.5, "zero")
    contributions = units()
    contributions["a"][7] = -contributions["a"][3]  # against unit 3: the worst replacement

    def total(rows: list[int]) -> Tensor:
        tree = clip({n: t[rows] for n, t in contributions.items()}, stacked=True).tree
        return torch.cat([t.double().flatten(1) for t in tree.values()], 1).sum(0)

    everyone = total(list(range(8)))
    worst = 0.0
    for row in range(8):
        others = [r for r in range(8) if r != row]
        swaps = range(8) if relation == "replace-one" else [None]
        for other in swaps:
            neighbour = total(others if other is None else [*others, other])
            worst = max(worst, float((everyone - neighbour).norm()))
    assert worst <= clip.sensitivity(relation) * (1 + 1e-12)
    assert worst > 0.6 * clip.sensitivity(relation)


def test_short_contributions_pass_bit_by_bit_and_zero_stays_zero() -> None:
    tree = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2, 2)}
    clipped = FlatClip(5.1)(tree)
    assert all(torch.equal(clipped.tree[n], tree[n]) for n in tree)
    assert float(clipped.norms) == pytest.approx(5.0, abs=1e-12)
    zero = FlatClip(1e-300)({"a": torch.zeros(3)})
    assert torch.equal(zero.tree["a"], torch.zeros(3))
    assert float(zero.norms) == 0
    assert bool(zero.finite)


def test_direction_is_kept_and_nothing_is_changed_in_place() -> None:
    tree = {"a": torch.randn(100), "b": torch.randn(10, 10)}
    copies = {n: t.clone() for n, t in tree.items()}
    clipped = FlatClip(0.5)(tree).tree
    assert all(torch.equal(tree[n], copies[n]) for n in tree)
    scale = 0.5 / exact_norm(tree)
    for name in tree:
        torch.testing.assert_close(clipped[name], tree[name] * scale, rtol=1e-6, atol=0)
    assert exact_norm(clipped) > 0.5 * (1 - 1e-5)


def test_stacked_equals_one_by_one() -> None:
    contributions = units()
    clip = FlatClip(0.7, "zero")
    together = clip(contributions, stacked=True)
    for row in range(8):
        alone = clip({n: t[row] for n, t in contributions.items()})
        assert torch.equal(alone.norms, together.norms[row])
        for name in NAMES:
            assert torch.equal(alone.tree[name], together.tree[name][row])
    assert torch.equal(unit_norms(contributions, stacked=True), together.norms)


@settings(max_examples=200)
@given(
    st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=20),
    st.floats(1e-30, 1e30),
    st.sampled_from(DTYPES),
)
def test_any_values(values: list[float], clip_norm: float, dtype: torch.dtype) -> None:
    tree = {"a": torch.tensor(values).to(dtype)}
    clipped = FlatClip(clip_norm, "zero")(tree)
    assert exact_norm(clipped.tree) <= clip_norm
    assert bool(clipped.finite) == bool(tree["a"].isfinite().all())


def test_doubles_whose_squares_overflow_or_vanish() -> None:
    huge = FlatClip(1.0)({"a": torch.tensor([3e200, 4e200], dtype=torch.float64)})
    assert float(huge.norms) == pytest.approx(5e200)
    torch.testing.assert_close(huge.tree["a"], torch.tensor([0.6, 0.8], dtype=torch.float64))
    small = FlatClip(1e-201)({"a": torch.tensor([3e-200, 4e-200], dtype=torch.float64)})
    assert 0.99e-201 < exact_norm(small.tree) <= 1e-201


def test_what_cannot_be_clipped_is_named() -> None:
    clip = FlatClip(1.0)
    with pytest.raises(InputError, match=r"'b' has 2 value\(s\) NaN or infinite"):
        clip({"a": torch.zeros(2), "b": torch.tensor([1.0, math.nan, math.inf])})
    with pytest.raises(InputError, match="beyond float64"):
        clip({"a": torch.full((9,), 1.7e308, dtype=torch.float64)})
    for wrong in (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(InputError, match="not floating point"):
            clip({"a": wrong})
    with pytest.raises(InputError, match="begin with"):
        clip({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}, stacked=True)
    with pytest.raises(InputError, match="begin with"):
        clip({"a": torch.zeros(())}, stacked=True)
    with pytest.raises(InputError, match="'b' has a tensor or a bound"):
        LayerClip({"a": 1.0})({"a": torch.zeros(2), "b": torch.zeros(2)})
    for norm in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="clip_norm"):
            FlatClip(norm)
        with pytest.raises(InputError, match="clip_norm"):
            LayerClip({"a": norm})


def test_empty_trees_stacks_and_tensors() -> None:
    clip = FlatClip(1.0)
    assert clip({}).tree == {}
    empty = clip({"a": torch.zeros(0, 3)}, stacked=True)
    assert empty.norms.shape == (0,)
    assert clip({"a": torch.zeros(0), "b": torch.full((4,), 9.0)}).tree["a"].shape == (0,)


def test_layers_share_the_norm() -> None:
    clip = even_layers(2.0, ["a", "b", "c", "d"])
    assert clip.clip_norm == pytest.approx(2.0, abs=1e-12)
    assert clip.sensitivity("replace-one") == pytest.approx(4.0, abs=1e-12)
    clipped = clip({name: torch.full((10,), 5.0) for name in "abcd"})
    assert all(float(t.norm()) == pytest.approx(1.0, rel=1e-5) for t in clipped.tree.values())
