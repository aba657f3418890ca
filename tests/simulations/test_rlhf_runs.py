"""Whole runs with preferences and rewards: engines, secure sums, privacy, hand-over, recipes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, load, resolve
from umbel.server.store import RunStore
from umbel.simulations.export import export_adapter
from umbel.simulations.located import located
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import check, simulate
from umbel.tasks.begin import base_hash

KINDS = ["reward", "dpo", "grpo", "ppo"]
MODEL = {"name": "gpt", "layers": 1, "width": 8, "heads": 2, "context": 8}


def make(tmp_path: Path, kind: str, **tables: Any) -> RunFile:
    pairs = {"name": "synthetic-preferences", "clients": 3, "pairs": 12, "test_pairs": 6}
    asked = {"name": "synthetic-prompts", "clients": 3, "prompts": 6, "test_prompts": 4}
    data = {"symbols": 6, "prompt": 2}
    data |= {**pairs, "length": 6} if kind in ("reward", "dpo") else {**asked, "answer": 2}
    task: dict[str, Any] = {"kind": kind, "model": MODEL}
    if kind in ("grpo", "ppo"):
        task |= {"samples": 2, "length": 2}
    whole: dict[str, Any] = {
        "run": {"name": kind, "rounds": 2, "store": str(tmp_path), "processes": 0},
        "data": data,
        "task": task,
        "client": {"lr": 0.1, "batch_size": 4},
        "evaluate": {"every": 0},
    }
    return resolve({**whole, **{k: {**whole.get(k, {}), **v} for k, v in tables.items()}})


def tensors(tmp_path: Path, run_id: str) -> dict[str, torch.Tensor]:
    return load_file(RunStore(tmp_path).model_path(run_id))


@pytest.mark.parametrize("kind", KINDS)
def test_engines_agree_and_a_run_repeats_and_resumes(tmp_path: Path, kind: str) -> None:
    run = make(tmp_path, kind)
    whole = simulate(run, engine="sequential")
    found = tensors(tmp_path, whole.run_id)
    assert not any(name.startswith("reference") for name in found)
    other = tensors(tmp_path, simulate(run, engine="vectorised").run_id)
    for name, tensor in found.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-3)
    begun = simulate(make(tmp_path, kind, run={"rounds": 1}), engine="sequential")
    again = simulate(run, engine="sequential", resume=begun.run_id)
    for name, tensor in tensors(tmp_path, again.run_id).items():
        assert torch.equal(tensor, found[name])
    assert set(whole.per_client) == {"c0", "c1", "c2"}
    expected = {"reward", "kl"} if kind in ("grpo", "ppo") else {"accuracy", "margin"}
    assert expected <= whole.per_client["c0"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_secure_sum_gives_the_same_figures(tmp_path: Path, kind: str) -> None:
    alike = {"weights": "uniform"}
    plain = simulate(make(tmp_path, kind, strategy=alike), engine="sequential")
    table = {"enabled": True, "bits": 32, "min_cohort": 3}
    run = make(tmp_path, kind, strategy=alike, secure_aggregation=table)
    secure = simulate(run, engine="sequential")
    for name, value in plain.metrics.items():
        assert secure.metrics[name] == pytest.approx(value, abs=1e-3)
    found = tensors(tmp_path, secure.run_id)
    for name, tensor in tensors(tmp_path, plain.run_id).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-3, rtol=1e-3)


PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 1e-3}


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_and_prompts_can_be_hidden(tmp_path: Path, kind: str) -> None:
    task: dict[str, Any] = {"whitening": False, "kl_target": 0.0} if kind == "ppo" else {}
    outcome = simulate(make(tmp_path, kind, task=task, privacy=PRIVATE))
    assert outcome.privacy is not None
    assert outcome.status == "finished"


@pytest.mark.parametrize(
    ("kind", "task"), [("ppo", {}), ("grpo", {"scale": "batch"})], ids=["ppo", "grpo of a batch"]
)
def test_what_is_scaled_over_a_batch_hides_no_example(
    tmp_path: Path, kind: str, task: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="no bound on one example's gradient bounds its influence"):
        check(make(tmp_path, kind, task=task, privacy=PRIVATE))


def test_clients_can_be_hidden_where_ppos_weight_stays(tmp_path: Path) -> None:
    table = {"unit": "client", "noise_multiplier": 0.1, "clip_norm": 1.0, "delta": 0.1}
    with pytest.raises(InputError, match="its buffer 'kl_weight' changes in training"):
        check(make(tmp_path, "ppo", privacy=table))
    outcome = simulate(make(tmp_path, "ppo", task={"kl_target": 0.0}, privacy=table))
    assert outcome.status == "finished"


def test_one_run_after_another_each_beside_the_one_before(tmp_path: Path) -> None:
    """Text, then preferences, then rewards; and the adapter comes home."""
    tiny = make(tmp_path, "dpo")
    base = make(tmp_path, "dpo", run={"name": "base"}, task={"kind": "language-model"})
    simulate(base)
    adapter = {"kind": "lora", "rank": 2}
    run = make(tmp_path, "dpo", task={"init_from": "base", "adapter": adapter})
    outcome = simulate(run)
    entry = RunStore(tmp_path).get(outcome.run_id)
    assert entry.versions["base_model"] == check(run)["base_model"]
    learned = tensors(tmp_path, outcome.run_id)
    assert all("lora_" in name for name in learned)

    merged = tmp_path / "merged"
    export_adapter(RunStore(tmp_path), outcome.run_id, merged, merged=True)
    module = prepare(located(run)).module.eval()
    module.load_state_dict(learned, strict=False)
    whole = prepare(tiny).module.policy.eval()  # type: ignore[operator, union-attr]
    whole.load_state_dict(load_file(merged / "model.safetensors"))
    x = torch.arange(16).view(2, 8) % 6
    torch.testing.assert_close(whole(x), module(x), atol=1e-5, rtol=1e-4)  # type: ignore[operator]

    grown = simulate(make(tmp_path, "dpo", run={"name": "whole"}, task={"init_from": "base"}))
    after = make(tmp_path, "grpo", task={"init_from": "whole"})
    begun = prepare(located(after)).module
    for name, tensor in tensors(tmp_path, grown.run_id).items():
        assert torch.equal(begun.state_dict()[name], tensor)
        reference = dict(begun.reference.named_parameters())  # type: ignore[union-attr]
        assert torch.equal(reference[name.removeprefix("policy.")], tensor)


def test_a_reward_model_judges_at_the_clients_and_does_not_travel(tmp_path: Path) -> None:
    simulate(make(tmp_path, "reward"))
    learned = {"length": 6, "reward": "learned", "judge": MODEL}
    run = make(tmp_path, "ppo", task={**learned, "judge_from": "reward"})
    outcome = simulate(run)
    assert not [n for n in tensors(tmp_path, outcome.run_id) if n.startswith("judge")]
    module = prepare(located(run)).module
    entry = next(e for e in RunStore(tmp_path).list() if e.name == "reward")
    judge = dict(module.judge.named_parameters())  # type: ignore[union-attr]
    for name, tensor in tensors(tmp_path, entry.run_id).items():
        assert torch.equal(judge[name], tensor)
    texts = torch.randint(6, (5, 8), generator=torch.Generator().manual_seed(0))
    found = module(texts, judge=True)
    assert found.shape == (5, 1)
    assert not found.requires_grad
    # Its hash is part of what clients and server compare.
    assert base_hash(module) != base_hash(prepare(make(tmp_path, "ppo")).module)
    with pytest.raises(InputError, match="there is no reward model"):
        simulate(make(tmp_path, "ppo", task=learned))
    with pytest.raises(InputError, match="is it a run of the same model"):
        simulate(make(tmp_path, "ppo", task={**learned, "judge_from": outcome.run_id}))


def shortened(tmp_path: Path, name: str, *overrides: str) -> RunFile:
    recipe = str(files("umbel.simulations.recipes").joinpath(f"{name}.toml"))
    return load(recipe, [f"run.store={tmp_path}", "run.processes=0", *overrides])


@pytest.mark.slow
def test_the_preference_recipes_learn_what_was_preferred(tmp_path: Path) -> None:
    reward = simulate(shortened(tmp_path, "reward", "run.rounds=1"))
    assert reward.metrics["accuracy"] >= 0.85
    assert min(own["accuracy"] for own in reward.per_client.values()) > 0.7
    dpo = simulate(shortened(tmp_path, "dpo", "run.rounds=1", "client.lr=2e-3"))
    assert dpo.metrics["loss"] < 0.6
    assert dpo.metrics["accuracy"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("grpo", 0.2), ("ppo", 0.25)])
def test_the_reward_recipes_earn_more_and_do_not_stray(
    tmp_path: Path, kind: str, least: float
) -> None:
    found = simulate(shortened(tmp_path, kind, "run.rounds=6"))
    assert found.history[0].metrics["reward"] < 0.1
    assert found.metrics["reward"] >= least
    assert all(0 <= record.metrics["kl"] < 7 for record in found.history)
