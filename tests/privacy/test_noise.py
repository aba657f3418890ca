from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from umbel.core.errors import InputError
from umbel.privacy.noise import add_gaussian, normals
from umbel.privacy.streams import U64, Stream, seeded_stream, system_stream

FALSE_ALARM = 1e-6  # of each test on the system's own noise: one in a million runs
N = 200_000


def p_value(draws: torch.Tensor, std: float) -> float:
    """Kolmogorov-Smirnov against N(0, std^2)."""
    return float(stats.kstest(draws.double().numpy(), "norm", args=(0, std)).pvalue)


def test_accepts_sigma_and_rejects_two_thirds_and_three_halves() -> None:
    noisy = add_gaussian({"w": torch.zeros(N)}, 0.7, system_stream())["w"]
    assert p_value(noisy, 0.7) > FALSE_ALARM
    assert p_value(noisy, 0.7 * 2 / 3) < 1e-100
    assert p_value(noisy, 0.7 * 1.5) < 1e-100
    # The std itself, within 5 standard errors of std / sqrt(2 N).
    assert float(noisy.std()) == pytest.approx(0.7, abs=5 * 0.7 / math.sqrt(2 * N))


def test_tails() -> None:
    draws = normals(system_stream(), 20 * N).abs().numpy()
    for limit in (2.0, 3.0, 4.0, 4.5):
        beyond = int((draws > limit).sum())
        p = 2 * stats.norm.sf(limit)
        assert stats.binomtest(beyond, len(draws), p).pvalue > FALSE_ALARM


def test_the_far_tail_is_reached() -> None:
    def words(n: int) -> U64:  # the least radius words, at angle zero
        half = n // 2
        radius = np.arange(half, dtype=np.uint64)
        return np.concatenate([radius, np.zeros(n - half, dtype=np.uint64)])

    draws = normals(Stream("seeded", words), 8)[:4]
    exact = [math.sqrt(2 * (64 * math.log(2) - math.log(k + 0.5))) for k in range(4)]
    assert draws.tolist() == pytest.approx(exact, rel=1e-12)
    assert draws[0] > 9.4


def test_draws_are_independent() -> None:
    draws = normals(system_stream(), 4 * N).numpy()
    halves = (draws[0::2], draws[1::2])
    blocks = (draws[: 2 * N], draws[2 * N :])
    again = (draws[: 2 * N], normals(system_stream(), 2 * N).numpy())
    for left, right in (halves, blocks, again):
        correlation = float(np.corrcoef(left, right)[0, 1])
        squares = float(np.corrcoef(left**2, right**2)[0, 1])
        assert abs(correlation) * math.sqrt(2 * N) < 5
        assert abs(squares) * math.sqrt(2 * N) < 6
    # A pair shares its radius: its direction must be uniform.
    pairs = draws[: 1 << 15].reshape(2, -1)
    angle = np.arctan2(pairs[1], pairs[0])
    assert stats.kstest(angle, "uniform", args=(-math.pi, 2 * math.pi)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("n", [0, 1, 2, 7, (1 << 15) + 3])
def test_any_number_of_draws(n: int) -> None:
    draws = normals(system_stream(), n)
    assert draws.shape == (n,)
    assert bool(draws.isfinite().all())
    assert len(draws.unique()) == n


def test_seeded_noise_repeats_and_does_not_depend_on_the_order_of_names() -> None:
    tree = {"b": torch.ones(5, 3), "a": torch.zeros(7)}
    first = add_gaussian(tree, 1.0, seeded_stream(0, "noise", 1))
    second = add_gaussian(dict(reversed(tree.items())), 1.0, seeded_stream(0, "noise", 1))
    third = add_gaussian(tree, 1.0, seeded_stream(0, "noise", 2))
    assert list(first) == ["b", "a"]
    for name in tree:
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], third[name])
    assert not torch.equal(first["b"].flatten()[:7], first["a"])


def test_what_leaves_lies_on_a_grid_that_tells_nothing_of_the_value() -> None:
    values = {"w": torch.tensor([0.1, 1 / 3, 1e-9, 12345.678], dtype=torch.float64)}
    noisy = add_gaussian(values, 3.0, system_stream())["w"]
    cells = noisy / 2.0 ** (1 - 20)  # 2 <= std < 4
    assert torch.equal(cells, cells.round())
    assert not torch.equal(cells, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_shapes_are_kept(dtype: torch.dtype) -> None:
    tree = {"w": torch.ones(2, 3, dtype=dtype), "s": torch.tensor(1.0, dtype=dtype)}
    noisy = add_gaussian(tree, 0.1, system_stream())
    assert {n: (t.shape, t.dtype) for n, t in noisy.items()} == {
        n: (t.shape, t.dtype) for n, t in tree.items()
    }
    assert torch.equal(tree["w"], torch.ones(2, 3, dtype=dtype))
    assert torch.equal(add_gaussian(tree, 0.0, system_stream())["w"], tree["w"])


def test_what_cannot_be_noised_is_named() -> None:
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="std"):
            add_gaussian({}, std, system_stream())
    for wrong in (torch.tensor([math.nan]), torch.tensor([1]), torch.tensor([math.inf])):
        with pytest.raises(InputError, match="'w' is not finite"):
            add_gaussian({"w": wrong}, 1.0, system_stream())
