"""Tasks on text: what they predict from what, and per-record gradients of every adapter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.core.run_file import resolve
from umbel.core.trees import Tree
from umbel.datasets.federated import Info
from umbel.privacy.per_example.choose import choose
from umbel.privacy.per_example.clipped import Bounds
from umbel.privacy.per_example.functional import OneByOne
from umbel.tasks.begin import base_hash
from umbel.tasks.build import build_task, initial_module, model_of
from umbel.tasks.language.hidden import hide, uniform
from umbel.tasks.task import Task

TEXT = Info("text", (10,), classes=30, vocabulary=30)
SMALL: dict[str, Any] = {
    "gpt2": {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "llama": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    },
    "bert": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    | dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
}
MODELS: dict[str, Any] = {
    name: {"name": "transformers", "config": {"model_type": name, **config}}
    for name, config in SMALL.items()
} | {"gpt": {"name": "gpt", "layers": 1, "width": 16, "heads": 2}}
ADAPTERS = ["lora", "dora", "ia3", "prompt-tuning", "prefix-tuning", "bottleneck"]
CAUSAL = ["gpt", "gpt2", "llama", "bert"]


def make(kind: str, model: str, info: Info = TEXT, **table: Any) -> Task:
    task = {"kind": kind, "model": MODELS[model], **table}
    return build_task(resolve({"data": {"name": "digits"}, "task": task}).task, info)


def records(seed: int = 0, count: int = 4) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 30, (count, 10), generator=draw)
    return {"x": x, "y": torch.randint(30, (count,), generator=draw)}


def logits(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = module.eval()(x)
    return out.detach()


@pytest.mark.parametrize("model", CAUSAL)
def test_a_causal_model_does_not_see_what_it_predicts(model: str) -> None:
    module = initial_module(make("language-model", model), 0)
    x = records()["x"]
    changed = x.clone()
    changed[:, 6:] = 1 + (x[:, 6:] + 3) % 29
    before, after = logits(module, x), logits(module, changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


PADDED = [
    ("masked-language-model", ["gpt", "bert"]),
    ("sequence-classification", ["gpt", "bert", "gpt2", "llama"]),
    ("language-model", ["gpt2"]),
]


@pytest.mark.parametrize(("kind", "model"), [(k, m) for k, models in PADDED for m in models])
def test_padding_changes_nothing(kind: str, model: str) -> None:
    task = make(kind, model, replace(TEXT, padding=0))
    module = initial_module(task, 0).eval()
    batch = records()
    batch["x"][1, 6:] = 0
    whole = task.losses(module, batch)[1]
    short = {"x": batch["x"][1:2, :6], "y": batch["y"][1:2]}
    if kind == "masked-language-model":  # what is hidden depends on the record: hide by hand
        kept = logits(module, batch["x"])[1, :6]
        torch.testing.assert_close(kept, logits(module, short["x"])[0], atol=1e-5, rtol=1e-4)
        return
    if kind == "language-model":  # the label follows the last place, and that is padding here
        info = replace(TEXT, padding=0, classes=None)
        task = make(kind, model, info)
        whole = task.losses(module, batch)[1]
    torch.testing.assert_close(whole, task.losses(module, short)[0], atol=1e-5, rtol=1e-4)


def test_the_loss_of_a_record_is_the_mean_over_its_symbols() -> None:
    task, batch = make("language-model", "gpt"), records()
    out = torch.randn(4, 10, 30)
    targets = torch.cat([batch["x"][:, 1:], batch["y"][:, None]], 1)
    expected = F.cross_entropy(out.transpose(1, 2), targets, reduction="none").mean(1)
    torch.testing.assert_close(task.losses(lambda x: out, batch), expected)
    right = (out.argmax(-1) == targets).float().mean(1)
    torch.testing.assert_close(task.metrics(lambda x: out, batch)["token_accuracy"], right)
    assert task.derived({"loss": 1.5}) == {"perplexity": pytest.approx(math.exp(1.5))}
    unlabelled = make("language-model", "gpt", replace(TEXT, classes=None))
    shorter = F.cross_entropy(out[:, :-1].transpose(1, 2), batch["x"][:, 1:], reduction="none")
    torch.testing.assert_close(unlabelled.losses(lambda x: out, batch), shorter.mean(1))


def test_hidden_symbols_are_berts_shares_and_a_function_of_the_record() -> None:
    x = torch.randint(30, (2000, 64), generator=torch.Generator().manual_seed(0))
    chosen = uniform(x, 1) < 0.15
    # 128,000 draws: five standard deviations are 0.005.
    assert float(chosen.double().mean()) == pytest.approx(0.15, abs=0.005)
    seen = hide(x, chosen, 30, 30)
    assert torch.equal(seen[~chosen], x[~chosen])
    assert float((seen == 30)[chosen].double().mean()) == pytest.approx(0.8, abs=0.015)
    same = float((seen == x)[chosen].double().mean())
    assert same == pytest.approx(0.1 + 0.1 / 30, abs=0.015)
    assert torch.equal(vmap(lambda row: uniform(row[None], 1)[0])(x), uniform(x, 1))
    changed = x.clone()
    changed[:, 9] += 1
    assert not (uniform(changed, 1) == uniform(x, 1)).any()


def test_a_masked_model_is_scored_on_hidden_symbols_alone() -> None:
    task, batch = make("masked-language-model", "bert", share=0.3), records()
    given = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        given.append(x)
        return F.one_hot(batch["x"], 31).float() * 50.0

    assert task.losses(forward, batch).max() < 1e-3
    hidden = given[0] != batch["x"]
    assert hidden.any()
    assert int(given[0].max()) == 30
    assert initial_module(task, 0)(given[0]).shape == (4, 10, 31)


@pytest.mark.parametrize("model", ["gpt", "gpt2", "llama", "bert"])
@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_gradients_of_all_records_at_once_are_those_of_one_after_another(
    model: str, adapter: str | None
) -> None:
    if model == "gpt" and adapter in ("prompt-tuning", "prefix-tuning"):
        with pytest.raises(InputError, match="is for models of transformers"):
            initial_module(make("language-model", model, adapter=adapter), 0)
        return
    kind = "masked-language-model" if model == "bert" else "language-model"
    task = make(kind, model, **({"adapter": adapter} if adapter else {}))
    module = initial_module(task, 0)
    draw = torch.Generator().manual_seed(1)
    start = model_of(module).params  # B is 0 at first, and so would be A's gradient
    params = {n: p + 0.1 * torch.randn(p.shape, generator=draw) for n, p in start.items()}
    batch = records()

    def loss(params: Tree, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        one = {"x": x[None], "y": y[None]}
        return task.losses(lambda t: functional_call(module, dict(params), (t,)), one)[0]

    found = vmap(grad(loss), in_dims=(None, 0, 0))(params, batch["x"], batch["y"])
    alone = [grad(loss)(params, x, y) for x, y in zip(batch["x"], batch["y"], strict=True)]
    for name, gradients in found.items():
        torch.testing.assert_close(
            gradients, torch.stack([g[name] for g in alone]), atol=1e-6, rtol=1e-4
        )
    assert sum(float(g.square().sum()) for g in found.values()) > 0
    for name, tensor in model_of(module).params.items():
        tensor.copy_(params[name])
    bounds = Bounds(0.5)
    how, method, refused = choose(module, task.losses, batch, bounds)
    assert how != "one-by-one", refused
    truth = OneByOne(module, task.losses)(batch, bounds)
    for name, total in method(batch, bounds).total.items():
        torch.testing.assert_close(total, truth.total[name], atol=1e-6, rtol=1e-4)
    if adapter:
        assert 0 < sum(p.numel() for p in params.values()) < 4000
        assert base_hash(module) is not None
        assert model_of(module).buffers == {}


@pytest.mark.parametrize("model", ["gpt", "gpt2"])
def test_an_adapter_starts_as_its_base_model(model: str) -> None:
    x = records()["x"]
    base = logits(initial_module(make("language-model", model), 3), x)
    for adapter in ("lora", "dora", "ia3", "bottleneck"):
        task = make("language-model", model, adapter=adapter)
        torch.testing.assert_close(logits(initial_module(task, 3), x), base)


def test_what_a_new_head_needs_is_trained_beside_the_adapter() -> None:
    for model, head in (("gpt", "head"), ("llama", "score"), ("bert", "classifier")):
        for adapter in ("lora", "bottleneck"):
            module = initial_module(make("sequence-classification", model, adapter=adapter), 0)
            names = model_of(module).params
            assert [n for n in names if f".{head}." in f".{n}"], (model, adapter)


def test_a_frozen_a_is_the_seeds_and_a_residual_is_carried_along() -> None:
    table = {"kind": "lora", "freeze_a": True, "residual": True}
    task = make("language-model", "gpt2", adapter=table)
    module = initial_module(task, 0)
    model = model_of(module)
    assert all("lora_B" in n for n in model.params)
    assert {t.shape for t in model.buffers.values()} == {(48, 16)}
    assert base_hash(module) == base_hash(initial_module(task, 0))
    assert base_hash(module) != base_hash(initial_module(task, 1))
    x = records()["x"]
    before = logits(module, x)
    for tensor in model.buffers.values():
        tensor.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(before, logits(module, x))


@pytest.mark.parametrize(
    ("kind", "model", "table", "message"),
    [
        ("language-model", "gpt", {"adapter": "lara"}, "did you mean 'lora'"),
        ("language-model", "gpt", {"adapter": {"kind": "lora", "rnk": 1}}, "unknown key 'rnk'"),
        ("language-model", "gpt2", {"adapter": {"kind": "lora", "targets": ["q"]}}, "targets am"),
        ("language-model", "gpt", {"adapter": {"kind": "bottleneck", "targets": ["q"]}}, "no lin"),
        ("masked-language-model", "llama", {}, "no masked model"),
    ],
)
def test_wrong_adapters_are_one_clear_error(
    kind: str, model: str, table: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        initial_module(make(kind, model, **table), 0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "transformers"}, "either config or path"),
        ({"name": "transformers", "path": "/no/such"}, "no config.json"),
        ({"name": "transformers", "config": {"model_type": "gtp2"}}, "config: "),
        (
            {"name": "transformers", "config": {"model_type": "gpt2", "vocab_size": 5}},
            "knows 5 symbols",
        ),
        ({"name": "gpt", "width": 10}, "no multiple of heads"),
        ({"name": "gpt", "context": 4}, "less than the 10 symbols"),
        ("char-lstm", "expected .4, 10, 30."),
    ],
)
def test_wrong_models_are_one_clear_error(model: Any, message: str) -> None:
    section = {"kind": "language-model", "model": model}

    def attempt() -> None:
        task = build_task(resolve({"data": {"name": "digits"}, "task": section}).task, TEXT)
        task.losses(initial_module(task, 0), records())

    with pytest.raises(InputError, match=message):
        attempt()


def test_text_is_asked_for() -> None:
    with pytest.raises(InputError, match="needs text"):
        make("language-model", "gpt", Info("digits", (8, 8), classes=10))


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_recomputed_activations_give_the_same_gradients(name: str, adapter: str | None) -> None:
    found, calls = [], []
    for checkpointing in (False, True):
        model = {**MODELS[name], "checkpointing": checkpointing}
        section = {"kind": "language-model", "model": model}
        section |= {} if adapter is None else {"adapter": adapter}
        task = build_task(resolve({"data": {"name": "digits"}, "task": section}).task, TEXT)
        module = initial_module(task, 0).train()
        made: list[None] = []
        for part in module.modules():
            if type(part).__name__.endswith("Norm"):
                part.register_forward_hook(lambda *_, seen=made: seen.append(None))
        task.losses(module, records()).mean().backward()
        calls.append(len(made))
        found.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    assert calls[1] > calls[0] > 0
    assert any(g is not None and g.any() for g in found[0].values())
    for gradient_name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][gradient_name])


def test_qlora_runs_or_says_why_not() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="qlora needs the library bitsandbytes"):
            initial_module(make("language-model", "llama", adapter="qlora"), 0)
        return
    task = make("language-model", "llama", adapter="qlora")
    module = initial_module(task, 0)
    task.losses(module, records()).mean().backward()
    assert all("lora_" in n for n in model_of(module).params)
    assert model_of(module).buffers == {}
