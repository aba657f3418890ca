"""Where strategies with client state become simpler ones, and what their papers promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.quadratic import Quadratic
from torch import Tensor

from umbel.client import own
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model
from umbel.server.records import Scores
from umbel.server.rounds import Start, rounds
from umbel.strategies.build import build_strategy
from umbel.strategies.fednova import accumulated
from umbel.strategies.moon import moon
from umbel.strategies.parts import Combined, Local
from umbel.strategies.parts.layers import in_head, normalised
from umbel.strategies.qfedavg import qfedavg

OPTIMA = [[1.0, -2.0], [4.0, 0.5], [-3.0, 2.0]]
CURVED = [0.3, 1.0, 2.5]
SIZES = [10, 20, 30]


def file(strategy: dict[str, Any], total: int) -> RunFile:
    return resolve(
        {
            "run": {"rounds": total},
            "data": {"name": "digits"},
            "task": {"kind": "classification"},
            "strategy": strategy,
        }
    )


def go(
    strategy: dict[str, Any],
    total: int = 3,
    curved: Sequence[float] = CURVED,
    steps: int = 4,
    lr: float = 0.1,
) -> tuple[Tensor, Any]:
    """The global parameters after so many rounds on heterogeneous quadratics; the federation."""
    run = file(strategy, total)
    made = build_strategy(run.strategy)
    optima = [{"w": torch.tensor(c)} for c in OPTIMA]
    federation = Quadratic(optima, SIZES, made.client, lr, steps, curved)
    start = Start(0, Model({"w": torch.tensor([0.5, 0.5])}, {}), {})
    start = start._replace(state=made.init(start.model.params))
    *_, last = rounds(run, made, federation, start, lambda r, m: Scores({}, {}))
    return last.model.params["w"], federation


def optimum(weights: Sequence[float]) -> Tensor:
    scale = torch.tensor([w * a for w, a in zip(weights, CURVED, strict=True)])
    return (scale[:, None] * torch.tensor(OPTIMA)).sum(0) / scale.sum()


@pytest.mark.parametrize(("weights", "counts"), [("examples", SIZES), ("uniform", [1, 1, 1])])
@pytest.mark.parametrize("strategy", [{"name": "scaffold"}, {"name": "feddyn", "alpha": 1.0}])
def test_drift_is_gone_where_fedavg_has_it(
    strategy: dict[str, Any], weights: str, counts: Sequence[float]
) -> None:
    truth = optimum(counts)
    drifted, _ = go({"name": "fedavg", "weights": weights}, 100, steps=8)
    assert (drifted - truth).norm() > 0.1
    found, _ = go({**strategy, "weights": weights}, 100, steps=8)
    torch.testing.assert_close(found, truth, atol=1e-3, rtol=0)


def test_scaffold_reaches_it_with_partial_cohorts() -> None:
    found, _ = go({"name": "scaffold", "weights": "uniform", "cohort": 1}, 400, steps=4)
    torch.testing.assert_close(found, optimum([1, 1, 1]), atol=1e-2, rtol=0)


def test_scaffold_with_zero_variates_is_fedavg() -> None:
    left, right = go({"name": "scaffold"}, 1)[0], go({"name": "fedavg"}, 1)[0]
    assert torch.equal(left, right)
    later = [go({"name": name}, 2)[0] for name in ("scaffold", "fedavg")]
    assert not torch.allclose(*later)


def test_scaffold_variates_are_mean_gradients() -> None:
    # Option II: c_i+ = c_i - c + (x - y) / (K eta), which is the mean of the gradients it met.
    _, federation = go({"name": "scaffold"}, 1, steps=1)
    x = torch.tensor([0.5, 0.5])
    for k in range(3):
        gradient = CURVED[k] * (x - torch.tensor(OPTIMA[k]))
        torch.testing.assert_close(federation.kept[f"c{k}"]["c/w"], gradient)


def test_fednova_with_equal_steps_is_fedavg() -> None:
    torch.testing.assert_close(go({"name": "fednova"})[0], go({"name": "fedavg"})[0])


@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.5, 0.0), (0.0, 0.7)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_fednova_knows_what_gradients_weigh(momentum: float, mu: float, steps: int) -> None:
    # Of a constant gradient of 1, a delta is -lr times what all of them weigh together.
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=momentum)
    for _ in range(steps):
        w.grad = 1 + mu * w.detach()
        optimizer.step()
    found = accumulated(torch.tensor(float(steps), dtype=torch.float64), 0.1, momentum, mu)
    assert float(found) == pytest.approx(float(-w.detach() / 0.1), rel=1e-12)


def test_feddyn_is_worked_out_by_hand() -> None:
    alpha, lr, x = 0.5, 0.1, torch.tensor([0.5, 0.5])
    found, federation = go({"name": "feddyn", "alpha": alpha, "weights": "uniform"}, 2, steps=1)
    g, h, w = [torch.zeros(2)] * 3, torch.zeros(2), x
    for _ in range(2):
        ends = []
        for k in range(3):
            y = w - lr * (CURVED[k] * (w - torch.tensor(OPTIMA[k])) - g[k])
            g[k] = g[k] - alpha * (y - w)
            ends.append(y)
        h = h - alpha * sum(y - w for y in ends) / 3
        w = sum(ends) / 3 - h / alpha
    torch.testing.assert_close(found, w)
    torch.testing.assert_close(federation.kept["c1"]["g/w"], g[1])


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_qfedavg_without_q_is_fedavg(weights: str) -> None:
    left, right = (go({"name": n, "weights": weights, **p})[0] for n, p in PAIRS)
    torch.testing.assert_close(left, right)


PAIRS: list[tuple[str, dict[str, Any]]] = [("qfedavg", {"q": 0.0}), ("fedavg", {})]


def test_qfedavg_is_algorithm_2() -> None:
    strategy, x, y = qfedavg(q=2.0), torch.tensor([1.0, 2.0]), torch.tensor([0.8, 2.5])
    taken = own.Taken.of(3, 10, 0.7)
    left = own.end(strategy.client, {"w": y}, Local({"w": y}, {"w": x}), taken, 0.1)
    lipschitz, moved = 10.0, 10.0 * (x - y)
    torch.testing.assert_close(left.delta["w"], -(0.7**2) * moved)
    h = 2 * 0.7 * float(moved.square().sum()) + lipschitz * 0.7**2
    assert float(left.uploads["h/h"]) == pytest.approx(h, rel=1e-5)
    combined = Combined(
        {"w": left.delta["w"].double()}, 1.0, 1, {"h": {"h": left.uploads["h/h"].double()}}
    )
    stepped, _ = strategy.server({"w": x}, {}, combined)
    torch.testing.assert_close(stepped["w"], x - (0.7**2) * moved / h)


@pytest.mark.parametrize("name", ["fedprox", "moon"])
def test_without_mu_it_is_fedavg(name: str) -> None:
    assert torch.equal(go({"name": name, "mu": 0.0})[0], go({"name": "fedavg"})[0])
    assert not torch.equal(go({"name": "fedprox", "mu": 1.0})[0], go({"name": "fedavg"})[0])


def test_moon_is_equation_3() -> None:
    features = {"here": [1.0, 2.0], "everybody": [2.0, 1.0], "before": [-1.0, 0.5]}

    class Given:
        def losses(self, params: Any, batch: Any) -> Tensor:
            return torch.tensor([0.25, 0.25])

        def features(self, params: Any, batch: Any) -> Tensor:
            return torch.tensor([features[params["name"]]] * 2)

        outputs = features

    local: Any = Local(
        {"name": "here"},  # type: ignore[dict-item]
        {"name": "everybody"},  # type: ignore[dict-item]
        {},
        {"previous": {"name": "before"}},  # type: ignore[dict-item]
    )
    objective = moon(mu=3.0, temperature=0.5).client.objective
    assert objective is not None
    cosine = torch.nn.functional.cosine_similarity
    z, g, p = (torch.tensor(features[n])[None] for n in ("here", "everybody", "before"))
    near, far = (torch.exp(cosine(z, other) / 0.5) for other in (g, p))
    expected = 0.25 - 3.0 * torch.log(near / (near + far))
    torch.testing.assert_close(objective(Given(), local, {}, None), expected[0])


def alone(k: int, steps: int, lr: float = 0.1) -> Tensor:
    """What client k comes to by itself."""
    w = torch.tensor([0.5, 0.5])
    for _ in range(steps):
        w = w - lr * CURVED[k] * (w - torch.tensor(OPTIMA[k]))
    return w


def test_ditto_is_fedavg_and_without_lambda_local_training() -> None:
    for lam in (0.0, 0.5):
        found, federation = go({"name": "ditto", "lam": lam})
        assert torch.equal(found, go({"name": "fedavg"})[0])
        for k in range(3):
            close = torch.allclose(federation.kept[f"c{k}"]["v/w"], alone(k, 3 * 4), atol=1e-6)
            assert close == (lam == 0.0)


def test_dittos_own_models_find_their_fixed_point() -> None:
    # At the end v minimises f_k(v) + lam / 2 |v - w|^2.
    w, federation = go({"name": "ditto", "lam": 0.5}, 150)
    for k in range(3):
        v = (CURVED[k] * torch.tensor(OPTIMA[k]) + 0.5 * w) / (CURVED[k] + 0.5)
        torch.testing.assert_close(federation.kept[f"c{k}"]["v/w"], v, atol=1e-4, rtol=0)


def test_apfl_without_a_share_is_fedavg_and_with_all_of_it_local_training() -> None:
    fixed = {"name": "apfl", "adaptive": False}
    found, federation = go({**fixed, "alpha": 0.0})
    assert torch.equal(found, go({"name": "fedavg"})[0])
    assert torch.equal(federation.kept["c0"]["v/w"], torch.tensor([0.5, 0.5]))
    found, federation = go({**fixed, "alpha": 1.0})
    assert torch.equal(found, go({"name": "fedavg"})[0])
    for k in range(3):
        torch.testing.assert_close(federation.kept[f"c{k}"]["v/w"], alone(k, 12))


def test_apfl_learns_its_share_within_bounds() -> None:
    _, federation = go({"name": "apfl", "alpha": 0.5}, 40, lr=0.3)
    shares = [float(federation.kept[f"c{k}"]["alpha/alpha"]) for k in range(3)]
    assert all(0 <= share <= 1 for share in shares)
    assert len({0.5, *shares}) > 1


def test_pfedme_steps_down_the_moreau_envelope() -> None:
    # Of a quadratic the proximal point is known: (a c + lam w) / (a + lam).
    settings = {"name": "pfedme", "lam": 2.0, "inner_lr": 0.2, "inner_steps": 200}
    found, federation = go({**settings, "weights": "uniform"}, 1, steps=1)
    w, ends = torch.tensor([0.5, 0.5]), []
    for k in range(3):
        theta = (CURVED[k] * torch.tensor(OPTIMA[k]) + 2.0 * w) / (CURVED[k] + 2.0)
        torch.testing.assert_close(federation.kept[f"c{k}"]["theta/w"], theta)
        ends.append(w - 0.1 * 2.0 * (w - theta))
    torch.testing.assert_close(found, sum(ends) / 3)


def test_fedrep_moves_the_head_first_and_then_the_rest() -> None:
    rule = build_strategy(file({"name": "fedrep", "head_share": 0.75}, 1).strategy).client
    assert rule.after is not None
    old = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}
    new = {"a.weight": torch.ones(2), "b.weight": torch.ones(2)}
    moved = []
    for step in range(4):
        after = rule.after(new, new, Local(old, old, {}, {}, step, 4))
        moved.append([float(after[name][0]) for name in ("a.weight", "b.weight")])
    assert moved == [[0, 1], [0, 1], [0, 1], [1, 0]]
    single = rule.after(new, new, Local(old, old, {}, {}, 0, 1))
    assert [float(single[n][0]) for n in old] == [1, 0]


def test_layers_are_read_off_names() -> None:
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    buffers = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert in_head([*names, *buffers], 1) == {"3.weight", "3.bias"}
    assert in_head([*names, *buffers], 2) == {"3.weight", "3.bias", *names[2:4], *buffers}
    assert in_head(names, "*.bias") == {"0.bias", "1.bias", "3.bias"}
    assert normalised([*names, *buffers]) == {"1.weight", "1.bias", *buffers}
    assert normalised(names) == frozenset()
