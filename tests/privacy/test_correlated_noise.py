from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats

from umbel.core.errors import InputError
from umbel.privacy import matrix_factorisation as mf
from umbel.privacy import tree_aggregation as tree
from umbel.privacy.accounting import epsilon
from umbel.privacy.correlated_noise import Correlated, CorrelatedNoise, Kind
from umbel.privacy.matrix_factorisation import Participation
from umbel.privacy.mechanisms import Gaussian

SECRET = bytes(range(32))


def patterns(who: Participation) -> Iterator[tuple[int, ...]]:
    """All ways to take part in at most k rounds, b apart."""
    for count in range(1, who.times + 1):
        for rounds in itertools.combinations(range(who.rounds), count):
            if all(b - a >= who.separation for a, b in itertools.pairwise(rounds)):
                yield rounds


def brute_force(matrix: np.ndarray, who: Participation) -> float:
    """The worst pattern, with contributions of norm 1 in the same or in opposite directions."""
    worst = 0.0
    for rounds in patterns(who):
        for signs in itertools.product((1, -1), repeat=len(rounds) - 1):
            moved = matrix[:, list(rounds)] @ np.array([1, *signs])
            worst = max(worst, float(np.linalg.norm(moved)))
    return worst


WHO = [
    Participation(12, 3),
    Participation(12, 3, most=2),
    Participation(13, 5),
    Participation(8, 1, most=1),
    Participation(7, 2),
    Participation(5, 9),
]


@pytest.mark.parametrize("who", WHO, ids=str)
@pytest.mark.parametrize("band", [1, 2, 3, 5])
def test_banded_sensitivity_is_that_of_the_worst_pattern(who: Participation, band: int) -> None:
    c = mf.square_root(band)
    exact = brute_force(mf.strategy_matrix(c, who.rounds), who)
    found = mf.sensitivity(c, who)
    assert found >= exact
    if band <= who.separation or who.times == 1:
        assert found == pytest.approx(exact, rel=1e-9)
    else:
        assert found <= 1.2 * exact


@pytest.mark.parametrize("c", [(1.0, -0.5, 0.25), (0.5, 0.7, 0.1), (1.0, 0.0, 0.9)])
@pytest.mark.parametrize("separation", [1, 2, 3])
def test_coefficients_of_any_sign_are_bounded(c: tuple[float, ...], separation: int) -> None:
    who = Participation(7, separation)
    exact = brute_force(mf.strategy_matrix(c, 7), who)
    found = mf.sensitivity(c, who)
    assert found >= exact
    if separation == 3:
        assert found == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("who", [*WHO, Participation(8, 2), Participation(8, 4)], ids=str)
def test_tree_sensitivity_bounds_the_worst_pattern(who: Participation) -> None:
    exact = brute_force(tree.strategy_matrix(who.rounds)[0], who)
    found = tree.sensitivity(who)
    assert exact <= found <= 1.35 * exact
    if who.times == 1 or who.rounds == 8:
        assert found == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("band", [1, 2, 7, 40])
def test_c_times_its_inverse_is_the_identity(band: int) -> None:
    c, n = mf.square_root(band), 20
    column = mf.inverse(c, n)
    inverse = np.array([[column[i - j] if i >= j else 0.0 for j in range(n)] for i in range(n)])
    np.testing.assert_allclose(mf.strategy_matrix(c, n) @ inverse, np.eye(n), atol=1e-12)
    if band >= n:  # nothing is cut: the root of the prefix sums
        c_all = mf.strategy_matrix(c, n)
        np.testing.assert_allclose(c_all @ c_all, np.tril(np.ones((n, n))), atol=1e-12)


@pytest.mark.parametrize("rounds", [1, 2, 7, 8, 21])
def test_prefixes_of_the_tree_are_sums_of_its_nodes(rounds: int) -> None:
    sums, prefixes = tree.strategy_matrix(rounds)
    np.testing.assert_array_equal(prefixes @ sums, np.tril(np.ones((rounds, rounds))))
    assert prefixes.sum(1).max() <= math.floor(math.log2(rounds)) + 1


@pytest.mark.parametrize("who", [Participation(256, 16), Participation(256, 256)], ids=str)
def test_prefix_sums_have_less_noise_than_independent_draws(who: Participation) -> None:
    def rms(std: np.ndarray) -> float:
        return math.sqrt(float(np.mean(std**2)))

    independent = rms(mf.errors((1.0,), who))
    banded = rms(mf.errors(mf.best_band(who), who))
    # Independent noise of the last prefix: sqrt(n) sqrt(k), exactly.
    assert mf.errors((1.0,), who)[-1] == pytest.approx(math.sqrt(who.rounds * who.times))
    assert banded < 0.6 * independent
    assert banded < rms(tree.errors(who))
    if who.times == 1:
        assert rms(tree.errors(who)) < 0.6 * independent


def drawn(plan: Correlated, rounds: int, size: int, secret: bytes = SECRET) -> np.ndarray:
    noise = CorrelatedNoise(plan, secret, "seeded")
    zero = {"w": torch.zeros(size, dtype=torch.float64)}
    return np.stack([noise.add(zero, t)["w"].numpy() for t in range(1, rounds + 1)])


@pytest.mark.parametrize("kind", ["tree", "banded"])
def test_the_noise_has_the_covariance_of_the_plan(kind: Kind) -> None:
    who = Participation(6, 3)
    plan = Correlated(kind, who, 0.5, 2.0, band=3 if kind == "banded" else None)
    found = np.cumsum(drawn(plan, 6, 40_000), axis=0)
    if kind == "tree":
        factor = tree.strategy_matrix(6)[1]
    else:
        column = np.cumsum(mf.inverse(plan.coefficients, 6))
        factor = np.array([[column[i - j] if i >= j else 0.0 for j in range(6)] for i in range(6)])
    wanted = plan.std**2 * factor @ factor.T
    spread = np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)) * 2 / 40_000)
    assert (np.abs(np.cov(found) - wanted) < 6 * spread).all()
    for t in range(6):
        std = math.sqrt(wanted[t, t])
        assert stats.kstest(found[t], "norm", args=(0, std)).pvalue > 1e-6
        assert stats.kstest(found[t], "norm", args=(0, std * 2 / 3)).pvalue < 1e-100
    errors = tree.errors(who) if kind == "tree" else mf.errors(plan.coefficients, who)
    np.testing.assert_allclose(np.sqrt(np.diag(wanted)), errors * 0.5 * 2.0, rtol=1e-9)


@pytest.mark.parametrize("kind", ["tree", "banded"])
def test_a_resumed_run_goes_on_with_its_noise(kind: Kind) -> None:
    plan = Correlated(kind, Participation(9, 4), 1.0, 1.0)
    whole = drawn(plan, 9, 50)
    zero = {"w": torch.zeros(50, dtype=torch.float64)}
    for start in range(1, 10):
        resumed = CorrelatedNoise(plan, SECRET, "seeded")
        for t in range(start, 10):
            assert np.array_equal(resumed.add(zero, t)["w"].numpy(), whole[t - 1])
    again = CorrelatedNoise(plan, SECRET, "seeded")
    for t in (5, 5, 2, 9):  # in any order
        assert np.array_equal(again.add(zero, t)["w"].numpy(), whole[t - 1])
    other = drawn(plan, 9, 50, secret=bytes(32))
    assert not np.isclose(other, whole).any()


@pytest.mark.parametrize("kind", ["tree", "banded"])
def test_a_round_without_a_sum_leaves_its_noise_to_the_next(kind: Kind) -> None:
    plan = Correlated(kind, Participation(9, 4), 1.0, 1.0)
    whole = drawn(plan, 9, 50)
    noise = CorrelatedNoise(plan, SECRET, "seeded")
    zero = {"w": torch.zeros(50, dtype=torch.float64)}
    jumped = noise.add(zero, 7, since=3)["w"].numpy()
    np.testing.assert_allclose(jumped, whole[3:7].sum(0), atol=5 * 2.0**-19)


def test_one_release_pays_for_all_rounds() -> None:
    plan = Correlated("banded", Participation(1000, 50), 1.0, 4.0)
    assert plan.mechanism().event() == Gaussian(4.0).event()
    assert (plan.mechanism().rounds, plan.mechanism().most) == (1000, 20)
    assert epsilon({plan.mechanism(): 1}, 1e-5).epsilon == pytest.approx(0.9263, abs=1e-4)
    assert epsilon({plan.mechanism("replace-one"): 1}, 1e-5).epsilon > 1.8


def test_the_band_is_what_memory_is_needed_for() -> None:
    noise = CorrelatedNoise(Correlated("banded", Participation(40, 8), 1.0, 1.0), SECRET, "seeded")
    for t in range(1, 41):
        noise.add({"w": torch.zeros(3)}, t)
    assert len(noise._past) <= 7


def test_trees_keep_names_shapes_and_dtypes() -> None:
    noise = CorrelatedNoise(Correlated("tree", Participation(4, 1), 1.0, 1.0), SECRET, "seeded")
    total = {"b": torch.ones(2, 3), "a": torch.ones((), dtype=torch.bfloat16)}
    noisy = noise.add(total, 1)
    assert {n: (t.shape, t.dtype) for n, t in noisy.items()} == {
        n: (t.shape, t.dtype) for n, t in total.items()
    }
    cells = noisy["b"].double() / 2.0 ** (math.floor(math.log2(noise.plan.std)) - 20)
    assert torch.equal(cells, cells.round())
    none = CorrelatedNoise(Correlated("tree", Participation(4, 1), 1.0, 0.0), SECRET, "seeded")
    assert torch.equal(none.add(total, 1)["b"], total["b"])


def test_what_makes_no_sense_is_refused() -> None:
    plan = Correlated("tree", Participation(4, 2), 1.0, 1.0)
    noise = CorrelatedNoise(plan, SECRET)
    for round_number, since in ((0, None), (5, None), (3, 3), (3, -1)):
        with pytest.raises(InputError, match="plan as many rounds"):
            noise.add({"w": torch.zeros(1)}, round_number, since)
    for wrong in (torch.tensor([math.nan]), torch.tensor([1])):
        with pytest.raises(InputError, match="'w' is not finite"):
            noise.add({"w": wrong}, 1)
    for numbers in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(InputError, match="at least 1"):
            Participation(*numbers)
    with pytest.raises(InputError, match="secret"):
        CorrelatedNoise(plan, b"short")
    with pytest.raises(InputError, match="band"):
        Correlated("banded", Participation(4, 2), 1.0, 1.0, band=0)
    with pytest.raises(InputError):
        Correlated("tree", Participation(4, 2), 1.0, -1.0)
