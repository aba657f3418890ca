"""Losses against plain loops, and a policy beside its reference."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.core.run_file import resolve
from umbel.datasets.federated import Info
from umbel.tasks.begin import base_hash
from umbel.tasks.build import build_task, initial_module, model_of
from umbel.tasks.preferences import losses as of
from umbel.tasks.preferences import rewards, rollouts
from umbel.tasks.preferences.policy import Policy
from umbel.tasks.reinforcement.losses import surrogate
from umbel.tasks.task import Task

INFO = Info("pairs", (6,), vocabulary=8, padding=7)
MODEL = {"name": "gpt", "layers": 1, "width": 8, "heads": 2}


def make(kind: str, info: Info = INFO, **table: Any) -> Task:
    section = {"kind": kind, "model": MODEL, **table}
    return build_task(resolve({"data": {"name": "digits"}, "task": section}).task, info)


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(7, (4, 6), generator=draw)
    rejected = torch.randint(7, (4, 6), generator=draw)
    x[1, 4:], rejected[2, 5:] = 7, 7
    return {"x": x, "rejected": rejected, "prompt": torch.tensor([1, 2, 3, 2])}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_prob(module: nn.Module, row: list[int], prompt: int) -> float:
    """The sum over the completion's symbols, one softmax after another."""
    total = 0.0
    with torch.no_grad():
        logits = module(torch.tensor([row]))[0].double()
    for place in range(prompt, len(row)):
        if row[place] != 7:
            scores = [math.exp(float(v)) for v in logits[place - 1]]
            total += math.log(scores[row[place]] / sum(scores))
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bradley_terry_is_the_formula(smoothing: float) -> None:
    margin = numbers(6)
    found = of.bradley_terry(margin, smoothing)
    for m, value in zip(margin.tolist(), found.tolist(), strict=True):
        right, wrong = -math.log(sigma(m)), -math.log(sigma(-m))
        assert value == pytest.approx((1 - smoothing) * right + smoothing * wrong, abs=1e-12)


def test_a_reward_model_scores_both_sides_of_a_pair() -> None:
    task = make("reward", centre=0.1)
    module, given = initial_module(task, 0), batch()
    found = task.losses(module, given).detach()
    for row in range(4):
        chosen, rejected = (
            float(module(given[side][row : row + 1]).detach()) for side in ("x", "rejected")
        )
        expected = -math.log(sigma(chosen - rejected)) + 0.1 * (chosen + rejected) ** 2
        assert float(found[row]) == pytest.approx(expected, abs=1e-5)
    figures = task.metrics(module, given)
    assert figures["accuracy"].tolist() == (figures["margin"] > 0).float().tolist()


@pytest.mark.parametrize(
    "table",
    [
        {"beta": 0.3},
        {"beta": 0.3, "label_smoothing": 0.1},
        {"beta": 0.3, "loss": "ipo"},
        {"beta": 0.3, "reference_free": True},
    ],
)
def test_dpo_is_the_formula(table: dict[str, Any]) -> None:
    task = make("dpo", **table)
    module, given = initial_module(task, 0), batch()
    assert isinstance(module, Policy)
    with torch.no_grad():  # the policy has learned something, the reference has not
        for p in module.policy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    found = task.losses(module, given).detach()
    for row in range(4):
        prompt, ratio = int(given["prompt"][row]), 0.0
        for side, sign in (("x", 1), ("rejected", -1)):
            symbols = given[side][row].tolist()
            ratio += sign * log_prob(module.policy, symbols, prompt)
            if module.reference is not None:
                ratio -= sign * log_prob(module.reference, symbols, prompt)
        if table.get("loss") == "ipo":
            expected = (ratio - 1 / (2 * 0.3)) ** 2
        else:
            flips = table.get("label_smoothing", 0.0)
            expected = -(1 - flips) * math.log(sigma(0.3 * ratio))
            expected -= flips * math.log(sigma(-0.3 * ratio))
        assert float(found[row]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_policy_begins_as_its_reference_which_neither_learns_nor_travels() -> None:
    task = make("dpo")
    module = initial_module(task, 0)
    assert task.losses(module, batch()).tolist() == pytest.approx([math.log(2)] * 4)
    model = model_of(module)
    assert {n.partition(".")[0] for n in model.params} == {"policy"}
    assert not model.buffers
    task.losses(module, batch()).sum().backward()
    before = base_hash(module)
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert base_hash(module) == before == base_hash(initial_module(task, 0))
    assert base_hash(initial_module(task, 1)) != before
    assert base_hash(initial_module(make("dpo", reference_free=True), 0)) is None


def test_an_adapters_reference_shares_what_is_frozen() -> None:
    module = initial_module(make("dpo", adapter={"kind": "lora", "rank": 2}), 0)
    assert isinstance(module, Policy)
    own, other = dict(module.policy.named_parameters()), dict(module.reference.named_parameters())  # type: ignore[union-attr]
    assert own.keys() == other.keys()
    for name, p in own.items():
        assert (p is other[name]) != p.requires_grad
    assert all("lora_" in name for name in model_of(module).params)
    twin = copy.deepcopy(module)  # as each client gets one
    shared = dict(twin.reference.named_parameters())  # type: ignore[union-attr]
    assert any(p is shared[n] for n, p in twin.policy.named_parameters())


def test_the_kl_estimate_is_never_negative_and_right_on_average() -> None:
    policy, reference = numbers(1, 9).log_softmax(1), numbers(1, 9, seed=1).log_softmax(1)
    found = of.kl(policy, reference)
    assert bool((found >= 0).all())
    assert float(of.kl(policy, policy).abs().max()) == 0
    both = zip(policy[0].tolist(), reference[0].tolist(), strict=True)
    exact = sum(math.exp(p) * (p - q) for p, q in both)
    two = [scores[:, None].expand(1, 2, 9) for scores in (policy, reference)]
    assert float(of.divergence(*two)) == pytest.approx(exact, abs=1e-6)
    assert float((policy.exp() * found).sum()) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_of_a_group(scale: of.Scale) -> None:
    given = numbers(5, 4)
    given[2] = 0.7
    found = of.group_advantages(given, scale)
    every = [x - sum(row) / 4 for row in given.tolist() for x in row]
    for row in range(5):
        values = given[row].tolist()
        mean = sum(values) / 4
        centred = [v - mean for v in values]
        spread = {
            "group": math.sqrt(sum(c * c for c in centred) / 4) + 1e-4,
            "batch": math.sqrt(sum(c * c for c in every) / 20) + 1e-4,
            "none": 1.0,
        }[scale]
        assert found[row].tolist() == pytest.approx([c / spread for c in centred], abs=1e-9)
    assert float(found[2].abs().max()) < 1e-9


def test_ppos_losses_are_the_papers_loops() -> None:
    now, then, gain = numbers(20), numbers(20, seed=1) * 0.3, numbers(20, seed=2)
    values, old, returns = numbers(20, seed=3), numbers(20, seed=4), numbers(20, seed=5)
    found, error = surrogate(now, then, gain, 0.2), of.clipped_value(values, old, returns, 0.3)
    for i in range(20):
        ratio = math.exp(float(now[i] - then[i]))
        near = min(max(ratio, 0.8), 1.2)
        expected = -min(ratio * float(gain[i]), near * float(gain[i]))
        assert float(found[i]) == pytest.approx(expected, abs=1e-12)
        v, o, r = float(values[i]), float(old[i]), float(returns[i])
        close = o + min(max(v - o, -0.3), 0.3)
        worse = max((v - r) ** 2, (close - r) ** 2) / 2
        assert float(error[i]) == pytest.approx(worse, abs=1e-12)


def test_advantage_estimates_are_sums_of_surprises_to_the_completions_end() -> None:
    begins, ends = [1, 0, 2], [4, 5, 3]
    place = torch.arange(5)
    counted = torch.stack([(place >= b) & (place < e) for b, e in zip(begins, ends, strict=True)])
    gains, values = numbers(3, 5), numbers(3, 5, seed=1) * counted
    found = rollouts.advantages(gains, values, counted, 0.9)
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        for t in range(5):
            total = 0.0
            for k in range(t, end) if begin <= t else ():
                after = float(values[row, k + 1]) if k + 1 < end else 0.0
                total += 0.9 ** (k - t) * (float(gains[row, k]) + after - float(values[row, k]))
            assert float(found[row, t]) == pytest.approx(total, abs=1e-12)


def test_whitened_values_have_mean_zero_and_variance_one_where_they_count() -> None:
    counted = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    found = of.whiten(3 + 2 * numbers(6, 5), counted)
    inside = found[counted]
    assert float(inside.mean()) == pytest.approx(0, abs=1e-12)
    assert float(inside.square().mean()) == pytest.approx(1, abs=1e-6)
    assert not found[~counted].any()


def test_the_controller_moves_by_a_fifth_of_its_gain_at_most() -> None:
    control = of.Controller(6.0, 0.1)
    for measured, factor in ((6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (0.0, 0.98)):
        assert float(control.factor(torch.tensor(measured))) == pytest.approx(factor)


def test_the_kl_weight_follows_the_controller_in_training_alone() -> None:
    module = initial_module(make("ppo", length=2, kl_weight=0.5, kl_target=1.0), 0)
    tokens, far = torch.zeros(2, 3, dtype=torch.long), torch.tensor([9.0, 9.0])
    module(tokens)
    with torch.no_grad():
        module(tokens, kl=far)
    module.eval()(tokens, kl=far)
    assert float(module.kl_weight) == 0.5
    for _ in range(10):
        module.train()(tokens, kl=far)
    assert float(module.kl_weight) == pytest.approx(0.5 * 1.02**10, rel=1e-5)
    still = initial_module(make("ppo", length=2, kl_weight=0.5), 0)
    still.controller = None
    still(tokens, kl=far)
    assert float(still.kl_weight) == 0.5


def test_values_are_linear_in_what_the_last_layer_sees() -> None:
    module = initial_module(make("ppo", length=2), 0)
    tokens = batch()["x"]
    out = module(tokens)
    assert out.shape == (4, 6, 9)
    assert not out[..., -1].any()
    torch.testing.assert_close(out[..., :-1], module.policy(tokens))
    with torch.no_grad():
        module.value.weight.fill_(1.0)
        module.value.bias.fill_(2.0)
    hidden: list[Tensor] = []
    handle = module.policy.head.register_forward_pre_hook(lambda m, given: hidden.append(given[0]))
    torch.testing.assert_close(module(tokens)[..., -1], hidden[0].sum(2) + 2)
    handle.remove()
    module.policy.to(torch.bfloat16)
    assert module(tokens).dtype is torch.bfloat16


def test_a_model_of_transformers_has_values_behind_an_adapters_prompts() -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 12, "n_positions": 16}
    model = {"name": "transformers", "config": config}
    for adapter in ("prompt-tuning", "lora"):
        module = initial_module(make("ppo", length=2, model=model, adapter=adapter), 0)
        assert module.value.in_features == 12
        tokens = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(0))
        assert module(tokens).shape == (3, 6, 9)
        torch.testing.assert_close(module(tokens)[..., :-1], module(tokens, reference=True))


def play(**changes: Any) -> rollouts.Play:
    given = {"reward": rewards.share, "samples": 2, "length": 3, "end": None, **changes}
    return rollouts.Play(INFO, least=None, temperature=1.0, **given)


class Scripted(nn.Module):
    """Answers the symbols of a script, whatever the prompt, and likes no other.

    A prompt's own symbols are below 4 and the script's are not.
    """

    def __init__(self, script: list[int]) -> None:
        super().__init__()
        self.script = script

    def forward(self, tokens: Tensor, reference: bool = False) -> Tensor:
        scores = torch.zeros(*tokens.shape, 8)
        if not reference:
            prompt = (tokens < 4).sum(1)
            for row in range(len(tokens)):
                for step, symbol in enumerate(self.script):
                    scores[row, prompt[row] - 1 + step, symbol] = 200.0
        return scores


def answered(reward: str, end: int | None, script: list[int], answers: list[list[int]]) -> Any:
    held = {
        "x": torch.tensor([[1, 2, 7], [3, 7, 7]]),
        "answer": torch.tensor(answers),
    }
    how = play(reward=rewards.find(reward), end=end)
    return rollouts.roll_out(Scripted(script), held, how, 2, 0)


def test_rewards_look_at_the_completion_and_at_nothing_else() -> None:
    answers = [[4, 5, 7], [4, 6, 6]]
    found = answered("share", None, [4, 5, 6], answers)
    assert found.rewards.tolist() == pytest.approx([1, 1, 2 / 3, 2 / 3])
    # 2 and 1 symbols of prompt; target t is symbol t + 1.
    assert found.counted.int().tolist()[1] == [0, 1, 1, 1, 0]
    assert found.counted.int().tolist()[2] == [1, 1, 1, 0, 0]
    # Never in doubt, against one that knows nothing: ln 8 for each of three symbols.
    assert found.strays.tolist() == pytest.approx([3 * math.log(8)] * 4)
    torch.testing.assert_close((found.then * found.counted).sum(1), torch.zeros(4))
    expected = torch.full((4,), -3 * math.log(8))
    torch.testing.assert_close((found.reference * found.counted).sum(1), expected)
    assert answered("exact", None, [4, 5, 6], answers).rewards.tolist() == [0, 0, 0, 0]
    assert answered("exact", 6, [4, 5, 6], answers).rewards.tolist() == [1, 1, 0, 0]
    assert answered("exact", None, [4, 6, 6], answers).rewards.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_first_step_goes_up_the_policy_gradient(kind: str) -> None:
    task = make(kind, length=2, samples=3, temperature=0.7)
    module = initial_module(task, 0)
    assert task.collect is not None
    from umbel.tasks.collect import Moment

    held = {"x": batch()["x"][:, :3].numpy(), "answer": batch()["x"][:, 3:5].numpy()}
    module.eval()
    made = {n: torch.from_numpy(c) for n, c in task.collect(module, held, Moment(5, 1, 1)).items()}
    module.train()
    found = torch.autograd.grad(
        task.losses(module, made).mean(), [p for p in module.policy.parameters() if p.requires_grad]
    )
    tokens, counted = made["tokens"].flatten(0, 1), made["counted"].flatten(0, 1)
    logits = module.policy(tokens)[:, :-1] / 0.7
    each = logits.log_softmax(2).gather(2, tokens[:, 1:, None])[..., 0]
    gain = made["advantage"].flatten(0, 1)
    gain = gain[:, None] if kind == "grpo" else gain
    surrogate = -((each * gain) * counted).sum(1) / counted.sum(1)
    expected = torch.autograd.grad(
        surrogate.mean(), [p for p in module.policy.parameters() if p.requires_grad]
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_declarations_say_what_example_level_privacy_may_rest_on() -> None:
    assert make("reward").decomposable
    assert make("dpo").decomposable
    assert make("grpo").decomposable
    assert make("grpo").collects_apart
    assert not make("grpo", scale="batch").decomposable
    assert not make("ppo").decomposable
    assert make("dpo").unit == "pair of completions"
    assert make("grpo").unit == "prompt with all its completions"


@pytest.mark.parametrize(
    ("kind", "table", "message"),
    [
        ("grpo", {"reward": "shares"}, "did you mean 'share'"),
        ("grpo", {"samples": 1}, "samples"),
        ("grpo", {"least": 9, "length": 4}, "least = 9 is more than length = 4"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing"),
        ("ppo", {"reward": "no_such_module:reward"}, "cannot import"),
    ],
)
def test_wrong_settings_are_one_clear_error(kind: str, table: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(kind, **table)


def test_data_without_pairs_or_answers_are_named() -> None:
    alone = {"x": batch()["x"]}
    for kind in ("reward", "dpo"):
        task = make(kind)
        with pytest.raises(InputError, match="no column 'rejected'"):
            task.losses(initial_module(task, 0), alone)
    task = make("grpo", length=2)
    assert task.test is not None
    with pytest.raises(InputError, match="no column 'answer'"):
        task.test.losses(initial_module(task, 0).eval(), alone)
    with pytest.raises(InputError, match="needs text"):
        make("dpo", Info("digits", (8, 8), classes=10))
