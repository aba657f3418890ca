"""What a run has learned is what PEFT loads, for every kind of adapter that PEFT has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.server.store import RunStore
from umbel.simulations.export import export_adapter
from umbel.simulations.located import located
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import simulate

SPEECH = "Now is the winter of our discontent made glorious summer by this sun of York; "
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 24},
    "llama": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "max_position_embeddings": 24,
    },
    "bert": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "max_position_embeddings": 24,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}
X = torch.arange(24).reshape(3, 8)


def make(folder: Path, architecture: str, adapter: dict[str, Any]) -> RunFile:
    plays = folder / "plays"
    plays.mkdir()
    for shift, name in enumerate(("anne", "brutus")):
        (plays / f"{name}.txt").write_text((SPEECH[7 * shift :] + SPEECH) * 2)
    masked = architecture == "bert"
    return resolve(
        {
            "run": {"rounds": 1, "store": str(folder / "store"), "processes": 0},
            "data": {"name": "text", "path": str(plays), "window": 8, "client_holdout": 0.2},
            "task": {
                "kind": "masked-language-model" if masked else "language-model",
                "model": {
                    "name": "transformers",
                    "config": {"model_type": architecture, **CONFIGS[architecture]},
                },
                "adapter": adapter,
            },
            "client": {"optimizer": "adamw", "lr": 0.05, "local_steps": 3, "batch_size": 8},
            "evaluate": {"per_client": False},
        }
    )


def trained(run: RunFile) -> tuple[RunStore, str, torch.nn.Module]:
    """The store, the run's name, and the model with what it learned."""
    store, outcome = RunStore(run.run.store), simulate(run)
    last = store.latest(outcome.run_id)
    assert last is not None
    begun = prepare(located(run)).module.eval()
    untrained = begun(X).detach()
    begun.load_state_dict(last.model.tensors(), strict=False)
    assert not torch.allclose(begun(X), untrained, atol=1e-5)
    return store, outcome.run_id, begun


KINDS = ["lora", "dora", "ia3", "prompt-tuning", "prefix-tuning"]
# A model that sees both ways, over padded records, takes no prompt: the run itself is refused.
CASES = [(kind, a) for kind in KINDS for a in CONFIGS if a != "bert" or "tuning" not in kind]


@pytest.mark.parametrize(("kind", "architecture"), CASES)
def test_peft_loads_it(tmp_path: Path, kind: str, architecture: str) -> None:
    sizes = {"lora": {"rank": 2}, "dora": {"rank": 2}, "ia3": {}}.get(kind, {"tokens": 3})
    store, name, module = trained(make(tmp_path, architecture, {"kind": kind, **sizes}))
    expected = module(X).detach()
    loader = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
    folder, merged = tmp_path / "adapter", tmp_path / "merged"
    export_adapter(store, name, folder, merged=False)
    base = loader.from_pretrained(folder / "base")
    found = PeftModel.from_pretrained(base, str(folder)).eval()
    torch.testing.assert_close(found(X).logits[:, -X.shape[1] :], expected, atol=1e-5, rtol=1e-4)
    if "tokens" in sizes:
        with pytest.raises(InputError, match="no weights to merge; leave --merged out"):
            export_adapter(store, name, merged, merged=True)
        return
    export_adapter(store, name, merged, merged=True)
    whole = loader.from_pretrained(merged).eval()
    torch.testing.assert_close(whole(X).logits, expected, atol=1e-4, rtol=1e-4)


def test_what_peft_has_not_is_refused(tmp_path: Path) -> None:
    store, name, _ = trained(make(tmp_path, "gpt2", {"kind": "bottleneck", "size": 4}))
    with pytest.raises(InputError, match="no adapter of PEFT's; write its tensors"):
        export_adapter(store, name, tmp_path / "adapter", merged=False)
