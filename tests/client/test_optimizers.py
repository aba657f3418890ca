"""Stacks step as torch's optimizer objects do; rates are those of torch's schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules

from umbel.client.optimizers import Stacked, learning_rate, optimizer, slots
from umbel.core.run_file import Client, Schedule

OPTIMIZERS = [
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "weight_decay": 0.1},
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"optimizer": "adam", "weight_decay": 0.1},
    {"optimizer": "adam", "beta1": 0.5, "beta2": 0.9, "eps": 1e-3},
    {"optimizer": "adamw", "weight_decay": 0.1},
    {"optimizer": "lion", "weight_decay": 0.1},
    {"optimizer": "adan", "weight_decay": 0.1, "beta3": 0.9},
]


def paths(table, gradients, start):
    """Where one parameter goes, step by step."""
    p = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    made, found = optimizer(Client(lr=0.1, **table), [p], 0.1), []
    for gradient in gradients:
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        made.step()
        found.append(p.item())
    return found


def test_lion_is_algorithm_2_of_the_paper():
    # c = .9 m + .1 g: .1, then .9 * .02 - .1 * 3 = -.282; m = .8 m + .2 g
    table = {"optimizer": "lion", "beta2": 0.98, "weight_decay": 0.5}
    first = 2.0 - 0.1 * (1 + 0.5 * 2.0)
    second = first - 0.1 * (-1 + 0.5 * first)
    assert paths(table, [1.0, -3.0], 2.0) == pytest.approx([first, second])


def test_adan_is_algorithm_1_of_the_paper_with_its_authors_correction():
    table = {"optimizer": "adan", "beta1": 0.5, "beta2": 0.6, "beta3": 0.7, "weight_decay": 0.5}
    x, m, v, n, last = 2.0, 0.0, 0.0, 0.0, None
    expected = []
    for k, g in enumerate([1.0, -3.0, 0.5], 1):
        change = 0.0 if last is None else g - last
        m, v = 0.5 * m + 0.5 * g, 0.6 * v + 0.4 * change
        n, last = 0.7 * n + 0.3 * (g + 0.6 * change) ** 2, g
        step = 0.1 / ((n / (1 - 0.7**k)) ** 0.5 + 1e-8)
        x = (x - step * (m / (1 - 0.5**k) + 0.6 * v / (1 - 0.6**k))) / (1 + 0.1 * 0.5)
        expected.append(x)
    assert paths(table, [1.0, -3.0, 0.5], 2.0) == pytest.approx(expected)


@pytest.mark.parametrize("table", OPTIMIZERS, ids=str)
def test_a_stack_that_shrinks_steps_as_each_client_alone(table):
    section = Client(lr=0.05, **table)
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(3, *shape, generator=draw) for shape in [(2, 4), (4,), ()]]
    lengths = [5, 4, 2]
    gradients = [[torch.randn(p.shape, generator=draw) for p in start] for _ in range(5)]

    stacks = [p.clone() for p in start]
    stacked = Stacked(section, 0.05)
    for step in range(5):
        n = sum(length > step for length in lengths)
        stacked.step([p[:n] for p in stacks], [g[:n] for g in gradients[step]])

    for client, length in enumerate(lengths):
        own = [p[client].clone().requires_grad_() for p in start]
        alone = optimizer(section, own, 0.05)
        for step in range(length):
            for p, g in zip(own, gradients[step], strict=True):
                p.grad = g[client].clone()
            alone.step()
        for p, stack in zip(own, stacks, strict=True):
            torch.testing.assert_close(stack[client], p.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("table", "kept"), [(0, 0), (2, 1), (4, 2)])
def test_slots_count_what_torch_keeps(table, kept):
    section = Client(**OPTIMIZERS[table])
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(3)
    made = optimizer(section, [p], 0.1)
    made.step()
    state = made.state[p].values()
    tensors = [s for s in state if torch.is_tensor(s) and s.shape == p.shape]
    assert slots(section) == len(tensors) == kept


def rates(schedule: Schedule, rounds: int) -> list[float]:
    section = Client(lr=0.3, schedule=schedule)
    return [learning_rate(section, r, rounds) for r in range(1, rounds + 1)]


def torch_rates(rounds: int, warmup: int, make) -> list[float]:
    base = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = make(base)
    if warmup:
        first = torch_schedules.LinearLR(base, 1 / warmup, total_iters=warmup - 1)
        scheduler = torch_schedules.SequentialLR(base, [first, make(base)], [warmup])
    seen = []
    for _ in range(rounds):
        seen.append(base.param_groups[0]["lr"])
        base.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("warmup", [0, 4])
def test_rates_are_those_of_torch(warmup):
    rounds = 12
    step = Schedule(kind="step", warmup=warmup, step=3, factor=0.5)
    cosine = Schedule(kind="cosine", warmup=warmup, final=0.1)
    assert rates(step, rounds) == pytest.approx(
        torch_rates(rounds, warmup, lambda o: torch_schedules.StepLR(o, 3, 0.5))
    )
    assert rates(cosine, rounds) == pytest.approx(
        torch_rates(
            rounds,
            warmup,
            lambda o: torch_schedules.CosineAnnealingLR(o, rounds - warmup, eta_min=0.03),
        )
    )


def test_a_warm_up_as_long_as_the_run_and_a_bare_name():
    assert rates(Schedule(kind="cosine", warmup=3), 3) == pytest.approx([0.1, 0.2, 0.3])
    assert learning_rate(Client(lr=0.3), 9, 10) == 0.3
    assert learning_rate(Client(lr=0.3, schedule="cosine"), 1, 10) == 0.3
