"""Every robust rule against a reference in numpy that is written plainly, on a thousand inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.randomness import key, permutation
from umbel.core.run_file import Strategy as Section
from umbel.core.run_file import resolve
from umbel.core.trees import Tree
from umbel.simulations.simulate import check
from umbel.strategies.build import build_strategy
from umbel.strategies.parts import Strategy

Rows = np.ndarray[Any, np.dtype[np.float64]]

INPUTS = 1000


class Case(NamedTuple):
    """Random rows, one a client, with f of them hostile."""

    rows: Rows
    f: int
    kind: str


def cases(seed: int, fewest: Callable[[int], int], count: int = INPUTS) -> Iterator[Case]:
    """Plain rows, duplicates, ties, huge values, and small differences around a large value."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        f = int(draw.integers(0, 4))
        n = fewest(f) + int(draw.integers(0, 8))
        d = int(draw.integers(1, 25))
        kind = ("plain", "duplicates", "ties", "huge", "offset")[i % 5]
        rows = draw.standard_normal((n, d))
        if kind == "duplicates":
            rows = rows[draw.integers(0, n, n)]
        elif kind == "ties":
            rows = draw.integers(-2, 3, (n, d)).astype(float)
        elif kind == "huge":
            rows[draw.permutation(n)[:f]] *= 1e30
        elif kind == "offset":
            rows = 1e4 + 1e-2 * rows
        yield Case(rows.astype(np.float32).astype(np.float64), f, kind)


def ours(strategy: Strategy, rows: Rows, parts: int = 1, number: int = 1) -> Rows:
    """The rule on updates of two tensors, which come in several stacks."""
    n, d = rows.shape
    cut = d // 2
    model = {"a": torch.zeros(cut), "b": torch.zeros(d - cut, 1)}
    tensor = torch.from_numpy(rows.astype(np.float32))
    gathered = strategy.combine.zero(model)
    for part in np.array_split(np.arange(n), parts):
        if len(part):
            index = part.tolist()
            delta = {"a": tensor[index, :cut], "b": tensor[index, cut:, None]}
            names = [f"c{i:02d}" for i in index]
            weights = torch.arange(1, len(index) + 1).double()
            gathered = strategy.combine.add(gathered, Updates(number, names, delta, weights))
    found = strategy.combine.finish(gathered)
    assert found.clients == n
    assert all(t.dtype == torch.float64 for t in found.delta.values())
    return torch.cat([found.delta["a"], found.delta["b"][:, 0]]).numpy()


@lru_cache(maxsize=256)
def make(name: str, **parameters: Any) -> Strategy:
    return build_strategy(Section.model_validate({"name": name, **parameters}))


def close(found: Rows, expected: Rows, case: Case) -> None:
    """To 1e-6 of the size of the honest values."""
    size = max(1.0, float(np.median(np.abs(case.rows))))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * size, err_msg=str(case))


def trimmed(rows: Rows, f: int) -> Rows:
    """Strikes out the largest and the smallest, f times."""
    result = []
    for column in rows.T:
        values = list(column)
        for _ in range(f):
            values.remove(max(values))
            values.remove(min(values))
        result.append(math.fsum(values) / len(values))
    return np.array(result)


def around_median(rows: Rows, keep: int) -> Rows:
    """By the distance from the median; of two equally far the smaller value."""
    result = []
    for column in rows.T:
        centre = float(np.median(column))
        values = sorted(column, key=lambda v: (abs(v - centre), v))[:keep]
        result.append(math.fsum(values) / keep)
    return np.array(result)


def squared(rows: Rows) -> Rows:
    return ((rows[:, None] - rows[None]) ** 2).sum(2)


def score(i: int, others: Sequence[int], distance: Rows, f: int) -> float:
    far = sorted(distance[i, j] for j in others if j != i)
    return math.fsum(far[: max(1, len(others) - f - 2)])


def krum_order(rows: Rows, f: int) -> list[int]:
    distance, everyone = squared(rows), range(len(rows))
    return sorted(everyone, key=lambda i: (score(i, everyone, distance, f), i))


def multi_krum(rows: Rows, f: int, m: int) -> Rows:
    return np.mean([rows[i] for i in krum_order(rows, f)[:m]], axis=0)


def bulyan(rows: Rows, f: int) -> Rows:
    distance, left, chosen = squared(rows), list(range(len(rows))), []
    for _ in range(len(rows) - 2 * f):
        best = min(left, key=lambda i: (score(i, left, distance, f), i))
        left.remove(best)
        chosen.append(best)
    return around_median(rows[chosen], len(rows) - 4 * f)


def spread(rows: Rows, z: Rows, nu: float) -> float:
    """The smoothed sum of distances that the geometric median minimises (RFA, equation 7)."""
    far = np.sqrt(((rows - z) ** 2).sum(1))
    return math.fsum(np.where(far > nu, far, far**2 / (2 * nu) + nu / 2))


def newton(rows: Rows, nu: float) -> Rows:
    """Damped Newton on the smoothed sum of distances, from the coordinate-wise median."""
    z = np.median(rows, axis=0)
    for _ in range(100):
        apart = z - rows
        far = np.sqrt((apart**2).sum(1))
        unit = apart / np.maximum(far, nu)[:, None]
        outside = (far > nu)[:, None]
        curved = np.eye(len(z)) * (1 / np.maximum(far, nu)).sum()
        curved -= (unit * outside / np.maximum(far, nu)[:, None]).T @ unit
        step = np.linalg.lstsq(curved, unit.sum(0), rcond=None)[0]
        size = 1.0
        while size > 1e-9 and spread(rows, z - size * step, nu) > spread(rows, z, nu):
            size /= 2
        if size <= 1e-9 or np.linalg.norm(step) < 1e-13:
            break
        z = z - size * step
    return z


def nearest_mixed(rows: Rows, f: int) -> Rows:
    distance = squared(rows)
    mixed = []
    for i in range(len(rows)):
        others = sorted((j for j in range(len(rows)) if j != i), key=lambda j: (distance[i, j], j))
        mixed.append(np.mean(rows[[i, *others[: len(rows) - f - 1]]], axis=0))
    return np.array(mixed)


def bucketed(rows: Rows, size: int, number: int) -> Rows:
    order = permutation(key(0, "bucketing", number), len(rows))
    starts = range(0, len(rows), size)
    return np.array([rows[order[s : s + size]].mean(0) for s in starts])


def shortened(rows: Rows, bound: float) -> Rows:
    return np.array([r * min(1.0, bound / max(float(np.linalg.norm(r)), 1e-300)) for r in rows])


RULES: dict[str, tuple[Callable[[int], int], Callable[[Rows, int], Rows]]] = {
    "median": (lambda f: 2 * f + 1, lambda rows, f: np.median(rows, axis=0)),
    "trimmed-mean": (lambda f: 2 * f + 1, trimmed),
    "meamed": (lambda f: 2 * f + 1, lambda rows, f: around_median(rows, len(rows) - f)),
    "krum": (lambda f: 2 * f + 3, lambda rows, f: multi_krum(rows, f, 1)),
    "multi-krum": (lambda f: 2 * f + 3, lambda rows, f: multi_krum(rows, f, len(rows) - f)),
    "bulyan": (lambda f: 4 * f + 3, bulyan),
}
rules = pytest.mark.parametrize("name", RULES)


@rules
def test_rule_equals_its_reference(name: str) -> None:
    fewest, reference = RULES[name]
    for case in cases(sum(map(ord, name)), fewest):
        close(ours(make(name, f=case.f), case.rows), reference(case.rows, case.f), case)


# The fewest that leave a rule enough of them.
PRE: dict[str, tuple[Callable[[int], int], Callable[[Rows, int], Rows]]] = {
    "nnm": (lambda f: 2 * f + 1, nearest_mixed),
    "bucketing": (lambda f: 6 * f + 1, lambda rows, f: bucketed(rows, 3, 7)),
}


@pytest.mark.parametrize("mixing", PRE)
@pytest.mark.parametrize(
    ("clip_norm", "name", "inputs"), [(None, "median", INPUTS), (2.0, "trimmed-mean", 60)]
)
def test_clipping_then_mixing_then_rule(
    mixing: str, clip_norm: float | None, name: str, inputs: int
) -> None:
    # Rules without a winner: mixed rows come near each other, and which of two with equal scores
    # wins is not the pre-step's affair.
    fewest, mix = PRE[mixing]
    for case in cases(len(mixing), fewest, inputs):
        if clip_norm and case.kind in ("ties", "duplicates"):
            continue  # whether distances are equal is decided by rounding
        rows = case.rows if clip_norm is None else shortened(case.rows, clip_norm)
        before = {"mixing": mixing, "bucket_size": 3, "clip_norm": clip_norm}
        found = ours(make(name, f=case.f, **before), case.rows, number=7)
        close(found, RULES[name][1](mix(rows, case.f), case.f), case)


def test_adaptive_clipping_shortens_the_longest() -> None:
    rows = np.diag([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    # floor(2 * 2 / 6 * 4) = 2 rows, to the length of the third longest.
    found = ours(make("trimmed-mean", f=2, clip_norm="adaptive"), rows)
    expected = trimmed(np.diag([1.0, 2.0, 3.0, 4.0, 4.0, 4.0]), 2)
    np.testing.assert_allclose(found, expected)
    plain = ours(make("trimmed-mean", f=0, clip_norm="adaptive"), rows)
    np.testing.assert_allclose(plain, rows.mean(0))


def test_centred_clipping_is_its_formula() -> None:
    """Two rounds of two iterations, so that the momentum is more than its start."""
    for seed in range(INPUTS):
        draw = np.random.default_rng(seed)
        n, d, tau = int(draw.integers(1, 9)), int(draw.integers(1, 12)), (0.1, 0.7, 3.0)[seed % 3]
        strategy = make("centred-clipping", tau=tau, iterations=2)
        params: Tree = {"a": torch.zeros(d, dtype=torch.float64)}
        state, v, model = strategy.init(params), np.zeros(d), np.zeros(d)
        for number in (1, 2):
            rows = draw.standard_normal((n, d)) * 10.0 ** draw.integers(-3, 4)
            names = [f"c{i}" for i in range(n)]
            ones = torch.ones(n, dtype=torch.float64)
            updates = Updates(number, names, {"a": torch.from_numpy(rows)}, ones)
            gathered = strategy.combine.add(strategy.combine.zero(params), updates)
            combined = strategy.combine.finish(gathered)
            params, state = strategy.server(params, state, combined)
            for _ in range(2):
                moved = v.copy()
                for row in rows:
                    far = float(np.linalg.norm(row - v))
                    moved += (row - v) * min(1.0, tau / max(far, 1e-300)) / n
                v = moved
            model += v
        np.testing.assert_allclose(params["a"].numpy(), model, rtol=1e-6, atol=1e-9)


def test_fltrust_is_its_algorithm() -> None:
    for case in cases(11, lambda f: 1 + f):
        own = np.random.default_rng(len(case.rows)).standard_normal(case.rows.shape[1])
        expected, total = np.zeros(len(own)), 0.0
        for row in case.rows:
            length = float(np.linalg.norm(row))
            score = max(0.0, float(row @ own) / (length * float(np.linalg.norm(own)) or 1.0))
            expected += score * row * (float(np.linalg.norm(own)) / (length or 1.0))
            total += score
        expected /= total or 1.0
        strategy = make("fltrust")
        assert strategy.root is not None

        def train(number: int, model: Tree, own: Rows = own) -> Tree:
            cut = len(model["a"])
            assert number == 1
            return {"a": torch.from_numpy(own[:cut]), "b": torch.from_numpy(own[cut:, None])}

        bound = strategy._replace(combine=strategy.root.combine(train))
        close(ours(bound, case.rows), expected, case)


def test_fltrust_without_a_root_set_is_refused() -> None:
    with pytest.raises(InputError, match="needs examples of the server's own"):
        ours(make("fltrust"), np.ones((3, 2)))


def test_norm_bounding_is_the_mean_of_clipped_deltas() -> None:
    strategy = make("norm-bounding", clip_norm=1.5)
    for case in cases(3, lambda f: 2 * f + 1):
        weights = np.arange(1, len(case.rows) + 1)
        expected = np.average(shortened(case.rows, 1.5), axis=0, weights=weights)
        close(ours(strategy, case.rows, parts=1), expected, case)


@pytest.mark.parametrize("name", [*RULES, "geometric-median"])
def test_who_answered_first_does_not_matter(name: str) -> None:
    [case] = cases(8, lambda f: 4 * f + 7, 1)
    strategy = make(name, f=case.f, mixing="nnm", clip_norm="adaptive")
    once = ours(strategy, case.rows, parts=1)
    assert (ours(strategy, case.rows, parts=4) == once).all()
    model = {"a": torch.zeros(case.rows.shape[1])}
    updates = Updates(
        1,
        [f"c{i:02d}" for i in range(len(case.rows))],
        {"a": torch.from_numpy(case.rows.astype(np.float32))},
        torch.ones(len(case.rows), dtype=torch.float64),
    )
    gathered = strategy.combine.zero(model)
    for i in np.random.default_rng(0).permutation(len(case.rows)).tolist():
        gathered = strategy.combine.add(gathered, updates.take([i]))
    turned = strategy.combine.finish(gathered).delta["a"].numpy()
    np.testing.assert_allclose(turned, once, rtol=1e-12, atol=1e-12)


def test_integers_take_their_median_and_halves_their_dtype() -> None:
    strategy = make("krum", f=1)
    model = {
        "w": torch.zeros(2, dtype=torch.bfloat16),
        "count": torch.tensor(5),
        "seen": torch.tensor([True, False]),
    }
    delta = {
        "w": torch.ones(5, 2, dtype=torch.bfloat16),
        "count": torch.tensor([1, 2, 3, 4, 10**9]),
        "seen": torch.tensor([[True, False]] * 4 + [[False, True]]),
    }
    names = [f"c{i}" for i in range(5)]
    updates = Updates(1, names, delta, torch.ones(5, dtype=torch.float64))
    found = strategy.combine.finish(strategy.combine.add(strategy.combine.zero(model), updates))
    assert found.delta["count"].item() == 3.0
    assert found.delta["seen"].tolist() == [1.0, 0.0]
    assert found.delta["w"].tolist() == [1.0, 1.0]


BOUNDS = {
    "median": 3,
    "trimmed-mean": 3,
    "meamed": 3,
    "geometric-median": 3,
    "krum": 5,
    "multi-krum": 5,
    "bulyan": 7,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_cohort_that_is_too_small_is_refused_with_the_bound(name: str) -> None:
    strategy = make(name, f=1)
    assert strategy.combine.fewest == BOUNDS[name]
    assert len(ours(strategy, np.ones((BOUNDS[name], 4)))) == 4
    with pytest.raises(InputError, match=f"with f = 1 needs {BOUNDS[name]} or more updates"):
        ours(strategy, np.ones((BOUNDS[name] - 1, 4)))


def test_bounds_count_what_the_pre_step_leaves() -> None:
    assert make("krum", f=2, mixing="bucketing", bucket_size=3).combine.fewest == 19
    assert make("median", f=3, mixing="nnm").combine.fewest == 7
    assert make("multi-krum", f=1, m=9).combine.fewest == 10
    assert make("multi-krum", f=1).combine.fewest == 5


def test_a_run_with_too_few_clients_is_refused_before_it_starts() -> None:
    run = resolve(
        {
            "data": {"name": "digits", "split": {"kind": "iid", "clients": 10}},
            "task": {"kind": "classification"},
            "strategy": {"name": "krum", "f": 4},
        }
    )
    with pytest.raises(InputError, match="krum with these parameters needs 11 or more") as refused:
        check(run)
    assert refused.value.fix == "set cohort to 11 or more, or lower f"


def test_geometric_median_is_the_minimum() -> None:
    """Against Newton's method; where points lie so that many minima are, by the minimum alone."""
    for case in cases(5, lambda f: 2 * f + 3):
        nu = 0.1 if case.kind != "offset" else 1e-3
        found = ours(make("geometric-median", nu=nu, iterations=1000), case.rows)
        expected = newton(case.rows, nu)
        least = spread(case.rows, expected, nu)
        assert spread(case.rows, found, nu) <= least * (1 + 1e-9)
        if case.kind in ("plain", "offset") and case.rows.shape[1] > 1:
            close(found, expected, case)
