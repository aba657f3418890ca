"""Any model of the transformers library, from its configuration or from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.datasets.federated import Info
from umbel.tasks.models.build import WHERE, needs


class Language(nn.Module):
    """A model of transformers as a function of symbols alone."""

    def __init__(self, model: nn.Module, head: str, causal: bool, padding: int | None) -> None:
        super().__init__()
        self.model, self.kind = model, head
        # At the end of a record, where padding stands, nothing that comes before sees it.
        self.padding = None if causal else padding

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 symbols -> (B, T, outputs), or (B, outputs) for an output an example."""
        mask = None
        if self.padding is not None:
            # Of two dimensions it would be looked into, which torch.func.vmap cannot.
            inside = (tokens != self.padding)[:, None, None, :]
            mask = torch.where(inside, 0.0, -1e9).expand(-1, 1, tokens.shape[1], -1)
        out: Tensor = self.model(tokens, attention_mask=mask).logits
        # Prompts that an adapter puts before the record have outputs, too.
        return out if self.kind == "class" else out[:, -tokens.shape[1] :]


def transformers(
    info: Info,
    outputs: int,
    head: str,
    *,
    config: Mapping[str, Any] | None = None,
    path: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    checkpointing: bool = False,
) -> nn.Module:
    """A model of Hugging Face transformers, with the head that the task needs.

    Nothing is downloaded, no code of the folder is run, and weights are safetensors.

    Args:
        info: of the data; ``x`` is symbols.
        outputs: symbols or classes to choose from.
        head: ``causal``, ``masked`` or ``class``.
        config: ``model_type`` and further keys of its configuration; weights are random.
        path: a folder with ``config.json`` and ``model.safetensors``, instead.
        dtype: of the weights.
        checkpointing: whether blocks are computed again in the backward pass, which keeps one
            block's activations in memory and not all.

    Raises:
        InputError: transformers is not installed; not one of ``config`` and ``path``; no such
            architecture; too small a vocabulary.
    """
    needs(info, "transformers", symbols=True)
    try:
        import transformers as hf
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise InputError(
            f"model 'transformers' needs the library: {error}",
            where=WHERE,
            fix="pip install 'umbel[llm]'",
        ) from None
    if (config is None) == (path is None):
        raise InputError(
            "model 'transformers' takes either config or path",
            where=WHERE,
            fix='config = { model_type = "gpt2", n_layer = 2 }, or path = "folder"',
        )
    auto: Any = {
        "causal": hf.AutoModelForCausalLM,
        "masked": hf.AutoModelForMaskedLM,
        "class": hf.AutoModelForSequenceClassification,
    }[head]
    own = _configuration(hf, config) if path is None else _stored(hf, path)
    assert info.vocabulary is not None
    if path is None and "vocab_size" not in (config or {}):
        own.vocab_size = info.vocabulary
    if own.vocab_size < info.vocabulary:
        raise InputError(
            f"the model knows {own.vocab_size} symbols, data set '{info.name}' holds "
            f"{info.vocabulary}",
            where=WHERE,
            fix="use the model's own tokenizer: [data] tokenizer = its folder",
        )
    if head == "class":
        own.num_labels = outputs
    both_ways = own.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if head == "causal" and both_ways:
        own.is_decoder = True  # else BERT would see the symbol that it is asked for
    own.use_cache = False
    if path is None or info.padding is not None:
        own.pad_token_id = info.padding
    for symbol in ("bos_token_id", "eos_token_id"):
        if path is None and symbol not in (config or {}):
            setattr(own, symbol, None)
    kind = getattr(torch, dtype)
    try:
        if path is None:
            model = auto.from_config(own).to(kind)
        else:
            model = auto.from_pretrained(
                path, config=own, local_files_only=True, use_safetensors=True, dtype=kind
            )
    except (ValueError, OSError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"no {head} model: {first}", where=WHERE, fix="check it") from None
    if head == "class" and info.padding is None:
        model.config.pad_token_id = -1  # no symbol is: what decoders read is the last
    for part in model.modules():
        if hasattr(part, "warn_if_padding_and_no_attention_mask"):
            # It asks whether padding occurs, which torch.func.vmap cannot answer.
            part.warn_if_padding_and_no_attention_mask = _silent
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Language(model, head, head == "causal" or not both_ways, info.padding)


def _silent(tokens: Tensor, mask: Tensor | None) -> None: ...


def _configuration(hf: Any, config: Mapping[str, Any] | None) -> Any:
    table = dict(config or {})
    kind = table.pop("model_type", None)
    try:
        return hf.AutoConfig.for_model(kind, **table)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"config: {str(error).splitlines()[0]}",
            where=WHERE,
            fix='model_type = "gpt2", "llama", "bert", …, and keys of its configuration',
        ) from None


def _stored(hf: Any, path: str) -> Any:
    if not (Path(path) / "config.json").is_file():
        raise InputError(
            f"no config.json in '{path}'", where=WHERE, fix="name a folder of save_pretrained"
        )
    return hf.AutoConfig.from_pretrained(path, local_files_only=True)
