"""Where a strategy's parameters take it back to a simpler one, and steps worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from umbel.core.errors import InputError
from umbel.core.run_file import Strategy as Section
from umbel.core.trees import Tree
from umbel.strategies.build import build_strategy
from umbel.strategies.fedadagrad import fedadagrad
from umbel.strategies.fedadam import fedadam
from umbel.strategies.fedavg import fedavg
from umbel.strategies.fedavgm import fedavgm
from umbel.strategies.fedprox import fedprox
from umbel.strategies.fedyogi import fedyogi
from umbel.strategies.parts import Combined, Local, Strategy
from umbel.strategies.parts.rule import clip_gradient, proximal

DELTAS = [[0.5, -1.0, 0.0], [0.25, 2.0, -0.125], [-1.0, 0.5, 4.0]]


def run(strategy: Strategy) -> np.ndarray:
    params: Tree = {"w": torch.tensor([1.0, 2.0, 3.0])}
    state = strategy.init(params)
    for delta in DELTAS:
        combined = Combined({"w": torch.tensor(delta, dtype=torch.float64)}, 1.0, 1)
        params, state = strategy.server(params, state, combined)
    return params["w"].numpy()


def test_fedavgm_without_momentum_is_fedavg() -> None:
    assert (run(fedavgm(momentum=0.0)) == run(fedavg())).all()


def test_fedavg_moves_by_the_mean_delta() -> None:
    np.testing.assert_allclose(run(fedavg(server_lr=0.5)), [1.0 - 0.125, 2.75, 3.0 + 3.875 / 2])


def test_fedprox_without_mu_has_the_gradient_of_fedavg() -> None:
    w = torch.randn(7, requires_grad=True)
    local = Local({"w": w}, {"w": torch.randn(7)})
    plain = torch.autograd.grad(w.sin().sum(), w)[0]
    prox = torch.autograd.grad(fedprox(mu=0.0).client.loss(w.sin().sum(), local), w)[0]
    assert torch.equal(plain, prox)


def test_proximal_term_is_that_of_the_paper() -> None:
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    local = Local({"w": w}, {"w": torch.zeros(2)})
    term = proximal(0.2)(local)
    assert term.item() == pytest.approx(0.5 * 0.2 * 25)
    gradient = torch.autograd.grad(term, w)[0]
    torch.testing.assert_close(gradient, 0.2 * w.detach())


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_gradient_clipping_is_torchs(scale: float) -> None:
    leaf = torch.nn.Parameter(torch.zeros(5))
    leaf.grad = torch.randn(5) * scale
    ours = clip_gradient(1.5)({"w": leaf.grad.clone()}, Local({}, {}))["w"]
    torch.nn.utils.clip_grad_norm_([leaf], 1.5)
    torch.testing.assert_close(ours, leaf.grad)


def paper(second_moment: str, eta: float, b1: float, b2: float, tau: float) -> np.ndarray:
    """Reddi et al. 2021, Algorithm 2, line by line in numpy."""
    x, m, v = np.array([1.0, 2.0, 3.0]), np.zeros(3), np.full(3, tau**2)
    for delta in map(np.array, DELTAS):
        m = b1 * m + (1 - b1) * delta
        if second_moment == "adagrad":
            v = v + delta**2
        elif second_moment == "yogi":
            v = v - (1 - b2) * delta**2 * np.sign(v - delta**2)
        else:
            v = b2 * v + (1 - b2) * delta**2
        x = x + eta * m / (np.sqrt(v) + tau)
    return x


def test_adaptive_strategies_are_algorithm_2() -> None:
    for name, strategy in {
        "adagrad": fedadagrad(server_lr=0.3, beta1=0.2, tau=0.01),
        "adam": fedadam(server_lr=0.3, beta1=0.2, beta2=0.7, tau=0.01),
        "yogi": fedyogi(server_lr=0.3, beta1=0.2, beta2=0.7, tau=0.01),
    }.items():
        np.testing.assert_allclose(run(strategy), paper(name, 0.3, 0.2, 0.7, 0.01), rtol=1e-5)


def test_fedavgm_is_worked_out_by_hand() -> None:
    # v = 0.5 v + d; x = x + 2 v, first coordinate: v = 0.5, 0.5, -0.75
    assert run(fedavgm(server_lr=2.0, momentum=0.5))[0] == pytest.approx(1 + 2 * (0.5 + 0.5 - 0.75))


def test_a_parameter_of_another_strategy_is_refused_by_name() -> None:
    section = Section.model_validate({"name": "fedavg", "mu": 0.1})
    with pytest.raises(InputError, match=r"'mu' is a parameter of .*fedprox.*, not of fedavg"):
        build_strategy(section)
