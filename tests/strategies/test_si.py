"""SI: the path integral of a quadratic, and what becomes of it between experiences."""

from __future__ import annotations

import torch

from umbel.strategies.defences.si import si
from umbel.strategies.parts import ClientRule, Local
from umbel.strategies.parts.combine import Combined
from umbel.strategies.parts.defence import Classes, Turn
from umbel.strategies.parts.rule import proximal

NO_CLASSES = Classes(torch.ones(1, 0, dtype=torch.bool), torch.ones(0, dtype=torch.bool))
CURVED = torch.tensor([1.0, 3.0])
OPTIMUM = torch.tensor([2.0, -1.0])


def test_the_path_integral_on_a_quadratic_is_the_fall_of_the_loss() -> None:
    """With small steps, omega of each parameter is what it took off the loss."""
    defence = si(strength=2.0)
    params = {"w": torch.tensor([0.0, 0.0])}
    letters = defence.letters(params, NO_CLASSES)
    # A penalty of an earlier experience: it moves the parameters, and is not in the integral.
    letters = {
        **letters,
        "importance": {"w": torch.tensor([0.1, 0.2])},
        "pull": {"w": torch.tensor([0.05, 0.0])},
    }
    rule = defence.rule(ClientRule(loss_terms=(proximal(0.0),)))
    assert rule.begin is not None
    assert rule.after is not None
    state = dict(rule.begin(params, letters, {}))
    for _ in range(3000):
        leaves = {n: p.detach().requires_grad_() for n, p in state.items()}
        local = Local(leaves, params, letters)
        value = rule.loss(0.5 * (CURVED * (leaves["w"] - OPTIMUM) ** 2).sum(), local)
        (slope,) = torch.autograd.grad(value, [leaves["w"]])
        gradient = rule.gradient({"w": slope, "omega/w": torch.zeros(2)}, local)
        stepped = {n: p - 1e-3 * gradient[n] for n, p in state.items()}
        with torch.no_grad():
            state = dict(rule.after(stepped, gradient, local._replace(params=state)))
    fallen = 0.5 * CURVED * (OPTIMUM**2 - (state["w"] - OPTIMUM) ** 2)
    torch.testing.assert_close(state["omega/w"], fallen, rtol=5e-3, atol=0)


def test_importance_is_what_the_equation_says() -> None:
    defence = si(damping=0.5)
    letters = defence.letters({"w": torch.tensor([1.0, 1.0, 1.0])}, NO_CLASSES)
    assert defence.step is not None
    zero = {"w": torch.zeros(3)}
    for omega in ([1.0, -2.0, 0.5], [2.0, 1.0, 0.5]):
        mean = Combined(zero, 1.0, 1, {"omega": {"w": torch.tensor(omega).double()}})
        letters = defence.step(letters, mean)
    ended = {"w": torch.tensor([3.0, 2.0, 1.0])}
    found = defence.turn(letters, Turn(ended, NO_CLASSES, {}))
    wanted = torch.tensor([3.0 / 4.5, 0.0, 1.0 / 0.5])
    torch.testing.assert_close(found["importance"]["w"], wanted)
    torch.testing.assert_close(found["pull"]["w"], wanted * ended["w"])
    assert found["omega"]["w"].tolist() == [0.0, 0.0, 0.0]
    assert found["origin"]["w"].tolist() == ended["w"].tolist()
