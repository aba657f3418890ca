from __future__ import annotations

import math
import sys

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from umbel.core.errors import InputError
from umbel.datasets.federated import Info
from umbel.datasets.worlds.cartpole import LIMIT, USUAL, CartPoles, expert, various
from umbel.datasets.worlds.grid import Grids, chances
from umbel.datasets.worlds.own import Own
from umbel.datasets.worlds.world import find
from umbel.tasks.collect import Moment
from umbel.tasks.kinds.a2c import a2c
from umbel.tasks.kinds.behaviour_cloning import behaviour_cloning
from umbel.tasks.kinds.dqn import dqn
from umbel.tasks.kinds.dyna import dyna
from umbel.tasks.kinds.ppo_control import ppo_control
from umbel.tasks.kinds.q_learning import q_learning
from umbel.tasks.kinds.reinforce import reinforce
from umbel.tasks.reinforcement import losses as of
from umbel.tasks.reinforcement.play import earned, episodes, greedy_but, play, sampled
from umbel.tasks.reinforcement.returns import advantages, to_go
from umbel.tasks.task import Task

CARTPOLES = Info("cartpoles", (5,))
GRIDS = Info("grids", (1,))
MLP = "mlp"


def trajectories(steps: int = 20, worlds: int = 3) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(0)
    reward, value, following = draw.normal(size=(3, steps, worlds))
    over = draw.random((steps, worlds)) < 0.2
    ended = over & (draw.random((steps, worlds)) < 0.5)
    return reward, value, following, ended, over


def test_a_cartpole_moves_as_gymnasiums_step_by_step() -> None:
    theirs = gymnasium.make("CartPole-v1").unwrapped
    theirs.reset(seed=3)
    physics = (8.0, 1.5, 0.2, 0.8, 7.0)
    theirs.gravity, theirs.masscart, theirs.masspole, theirs.length, theirs.force_mag = physics
    theirs.total_mass = theirs.masscart + theirs.masspole
    theirs.polemass_length = theirs.masspole * theirs.length
    ours = CartPoles(np.array([physics, USUAL]), np.random.default_rng(0))
    ours.begin(np.ones(2, bool))
    ours.state[:, 0] = theirs.state
    for step in range(200):
        action = step // 3 % 2
        seen, reward, ended, _, _ = theirs.step(action)
        came = ours.step(np.array([action, 0]))
        np.testing.assert_allclose(ours.observe()[0], seen, rtol=1e-6)
        assert (came.reward[0], bool(came.ended[0])) == (reward, ended)
        if ended:
            break
    assert ended


def test_a_cartpole_is_cut_and_the_expert_keeps_all_of_them_up() -> None:
    world = CartPoles(various(16, 1.0, np.random.default_rng(0)), np.random.default_rng(1))
    assert earned(world, 16, expert, 1000).tolist() == [LIMIT] * 16


def test_a_grid_slips_as_often_as_it_says() -> None:
    count, slip = 30_000, 0.4
    world = Grids(np.full((count, 1), slip), np.random.default_rng(0), 3)
    world.begin(np.ones(count, bool))
    world.cell[:] = 4  # the middle
    world.step(np.zeros(count, np.int64))
    found = np.bincount(world.cell, minlength=9) / count
    np.testing.assert_allclose(found, chances(3, slip)[4, 0], atol=0.02)  # 7 standard deviations
    np.testing.assert_allclose(chances(3, slip).sum(2), 1)


def test_own_environments_are_gymnasiums() -> None:
    def make(row: np.ndarray) -> gymnasium.Env:
        return gymnasium.make("CartPole-v1")

    def seen(seed: int) -> np.ndarray:
        world = Own(np.zeros((2, 0)), np.random.default_rng(seed), make)
        return play(world, 2, lambda x: (x[:, 2] > 0).astype(np.int64), 60).x

    assert seen(1).shape == (60, 2, 4)
    np.testing.assert_array_equal(seen(1), seen(1))
    assert not np.array_equal(seen(1), seen(2))
    with pytest.raises(InputError, match="unknown environment 'cart'"):
        find("cart")


def test_play_begins_anew_and_knows_what_followed() -> None:
    world = CartPoles(np.array([USUAL] * 4), np.random.default_rng(0))
    came = play(world, 4, lambda x: np.ones(4, np.int64), 40)
    assert came.over.sum(0).min() >= 3
    for t in range(39):
        same = (came.following[t] == came.x[t + 1]).all(1)
        np.testing.assert_array_equal(same, ~came.over[t])
    world = CartPoles(np.array([USUAL] * 4), np.random.default_rng(0))
    once, within = episodes(world, 4, lambda x: np.ones(4, np.int64), 40)
    np.testing.assert_array_equal(once.over[within].sum(), 4)
    np.testing.assert_array_equal((once.over & within).argmax(0), within.sum(0) - 1)


def test_actions_are_drawn_by_the_softmax() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.7]))
    found = sampled(np.tile(logits, (30_000, 1)), np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(found) / 30_000, [0.1, 0.2, 0.7], atol=0.02)
    tied = greedy_but(np.zeros((3_000, 3)), 0.0, np.random.default_rng(0))
    assert np.bincount(tied).min() > 800


def test_returns_to_go_are_discounted_sums() -> None:
    reward, _, _, _, over = trajectories()
    found = to_go(reward, over, 0.9)
    for e in range(3):
        for t in range(20):
            total = 0.0
            for k in range(t, 20):
                total += 0.9 ** (k - t) * reward[k, e]
                if over[k, e]:
                    break
            assert found[t, e] == pytest.approx(total)


def test_advantages_are_their_definition() -> None:
    reward, value, following, ended, over = trajectories()
    gamma, lam = 0.9, 0.8
    found = advantages(reward, value, following, ended, over, gamma, lam)
    for e in range(3):
        for t in range(20):
            total = 0.0
            for k in range(t, 20):
                ahead = 0.0 if ended[k, e] else following[k, e]
                total += (gamma * lam) ** (k - t) * (reward[k, e] + gamma * ahead - value[k, e])
                if over[k, e]:
                    break
            assert found[t, e] == pytest.approx(total)


def test_advantages_of_all_rewards_are_returns_less_values() -> None:
    reward, value, _, ended, over = trajectories()
    over[-1] = ended[-1] = True
    ended = over
    found = advantages(reward, value, np.zeros_like(value), ended, over, 0.9, 1.0)
    # With lam = 1 all values but the first cancel where what follows is what is seen next.
    following = np.concatenate([value[1:], value[:1]])
    found = advantages(reward, value, following, ended, over, 0.9, 1.0)
    np.testing.assert_allclose(found, to_go(reward, over, 0.9) - value)


def test_the_clipped_objective_is_its_formula() -> None:
    torch.manual_seed(0)
    logits, advantage = torch.randn(50, 3, dtype=torch.float64), torch.randn(50).double()
    action, before = torch.randint(3, (50,)), -2 * torch.rand(50).double()
    found = of.clipped(logits, action, before, advantage, 0.2)
    seen = set()
    for i in range(50):
        weights = [math.exp(v) for v in logits[i].tolist()]
        ratio = weights[action[i]] / sum(weights) / math.exp(before[i])
        bound = min(max(ratio, 0.8), 1.2)
        value = min(ratio * float(advantage[i]), bound * float(advantage[i]))
        assert float(found[i]) == pytest.approx(-value)
        seen.add((ratio > bound, ratio < bound, bool(advantage[i] > 0)))
    assert len(seen) == 6


def test_entropy_of_even_actions_is_the_logarithm_of_their_number() -> None:
    assert float(of.entropy(torch.zeros(1, 7))) == pytest.approx(math.log(7))


@pytest.mark.parametrize("double", [False, True])
def test_the_target_of_dqn_is_its_formula(double: bool) -> None:
    task = dqn(CARTPOLES, MLP, steps=4, copies=5, gamma=0.9, double=double)
    torch.manual_seed(0)
    before, now = task.build(), task.build()
    made = collect(task, before, np.array([USUAL], np.float32))
    batch = {name: torch.from_numpy(column) for name, column in made.items()}
    batch["ended"][::3] = 1
    found = task.losses(now, batch)
    with torch.no_grad():
        for i in range(len(found)):
            following = before(batch["following"][i : i + 1])[0]
            chosen = int((now(batch["following"][i : i + 1])[0] if double else following).argmax())
            target = float(batch["reward"][i]) / 10  # the unit of values: 1 / (1 - gamma)
            target += 0.9 * (1 - float(batch["ended"][i])) * float(following[chosen])
            error = abs(float(now(batch["x"][i : i + 1])[0, batch["action"][i]]) - target)
            expected = error**2 / 2 if error < 1 else error - 0.5
            assert float(found[i]) == pytest.approx(expected, abs=1e-5)


def collect(task: Task, module: torch.nn.Module, held: np.ndarray, round_number: int = 1) -> dict:
    assert task.collect is not None
    with torch.no_grad():
        return dict(task.collect(module, {"x": held}, Moment(7 + round_number, round_number, 40)))


def trained(
    task: Task, held: np.ndarray, rounds: int, rate: float, size: int, falls: float = 0.0
) -> torch.nn.Module:
    """One client's rounds by plain SGD, on sums over batches; the rate may fall."""
    torch.manual_seed(0)
    module = task.build()
    for number in range(1, rounds + 1):
        made = collect(task, module, held, number)
        batch = {name: torch.from_numpy(column) for name, column in made.items()}
        lr = rate / (1 + falls * number / rounds)
        for part in torch.randperm(len(batch["x"])).split(size):
            loss = task.losses(module, {name: c[part] for name, c in batch.items()}).sum()
            module.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in module.parameters():
                    if p.grad is not None:
                        p -= lr * p.grad
    return module


def best_values(size: int, slip: float, gamma: float) -> np.ndarray:
    """By value iteration, (cells, actions)."""
    odds = chances(size, slip)
    reward = np.zeros(size**2)
    reward[-1] = 1
    values = np.zeros((size**2, 4))
    for _ in range(300):
        after = values.max(1)
        after[-1] = 0
        values = odds @ (reward + gamma * after)
    return values


def test_q_learning_finds_what_value_iteration_finds() -> None:
    task = q_learning(GRIDS, None, size=3, gamma=0.9, epsilon=0.8, steps=40, copies=32)
    module = trained(task, np.array([[0.3]], np.float32), 40, 0.2, 32, falls=10)
    assert isinstance(module, torch.nn.Linear)
    found = module.weight.detach().numpy().T[:-1]  # nothing is done in the last cell
    np.testing.assert_allclose(found, best_values(3, 0.3, 0.9)[:-1], atol=0.06)


def test_imagined_steps_save_real_ones() -> None:
    held, size, rounds = np.array([[0.1]], np.float32), 5, 10

    def value_at_start(**settings: int) -> float:
        task = dyna(GRIDS, None, size=size, steps=10, copies=2, epsilon=0.3, **settings)
        module = trained(task, held, rounds, 0.3, 8)
        start = torch.eye(size**2)[:1]
        return float(module(start).max().detach()) * 20  # the unit of values: 1 / (1 - 0.95)

    best = float(best_values(size, 0.1, 0.95)[0].max())
    assert value_at_start(rollouts=8, depth=8) == pytest.approx(best, rel=0.2)
    assert value_at_start(rollouts=0, repeats=1) < 0.1 * best


TASKS = [
    ppo_control(CARTPOLES, MLP, steps=6, copies=3),
    a2c(CARTPOLES, MLP, steps=6, copies=3),
    reinforce(CARTPOLES, MLP, copies=3),
    dqn(CARTPOLES, MLP, steps=6, copies=3),
    dyna(CARTPOLES, MLP, environment="cartpole", steps=6, copies=3),
    q_learning(GRIDS, None, steps=6, copies=3),
    dyna(GRIDS, None, steps=6, copies=3),
]


@pytest.mark.parametrize("task", TASKS)
def test_experience_repeats_and_losses_are_its_own(task: Task) -> None:
    grid = "weight" in task.build().state_dict() or "values.weight" in task.build().state_dict()
    held = np.array([[0.1], [0.2]] if grid else [USUAL] * 2, np.float32)
    torch.manual_seed(0)
    module = task.build()
    made, again = (collect(task, module, held, 2) for _ in range(2))
    for name, column in made.items():
        np.testing.assert_array_equal(column, again[name])
    other = collect(task, module, held, 3)
    assert any(not np.array_equal(made[n], other[n]) for n in made)
    batch: dict[str, Tensor] = {name: torch.from_numpy(c) for name, c in made.items()}
    together = task.losses(module, batch)
    assert together.shape == batch["action"].shape
    each = [{n: c[i : i + 1] for n, c in batch.items()} for i in range(10)]
    alone = torch.cat([task.losses(module, one) for one in each])
    torch.testing.assert_close(together[:10], alone)
    assert task.test is not None
    returns = -task.test.losses(module, {"x": torch.from_numpy(held)})
    assert returns.shape == (2,)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="5 parameters"):
        ppo_control(GRIDS, MLP)
    with pytest.raises(InputError, match="keeps a table"):
        q_learning(CARTPOLES, None, environment="cartpole")
    with pytest.raises(InputError, match="no other model"):
        q_learning(GRIDS, MLP)
    with pytest.raises(InputError, match="2 actions"):
        behaviour_cloning(Info("digits", (64,), classes=10), MLP)


def make(row: np.ndarray) -> gymnasium.Env:
    """A CartPole of one's own, with one parameter."""
    env = gymnasium.make("CartPole-v1").unwrapped
    if len(row):
        env.length = float(row[0])
    return gymnasium.wrappers.TimeLimit(env, 50)


def test_a_task_acts_in_an_environment_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "worlds_of_mine", sys.modules[__name__])
    task = ppo_control(
        Info("mine", (1,)), MLP, environment="worlds_of_mine:make", steps=4, copies=2
    )
    torch.manual_seed(0)
    module = task.build()
    held = np.array([[0.5], [0.1], [2.0]], np.float32)
    made = collect(task, module, held)
    assert made["x"].shape == (4 * 3 * 2, 4)
    assert task.test is not None
    returns = -task.test.losses(module, {"x": torch.from_numpy(held)})
    assert bool((returns <= 50).all())
    assert len(set(returns.tolist())) > 1
