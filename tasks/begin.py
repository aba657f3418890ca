"""Where a model begins: from earlier runs, and with an adapter in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from umbel.core import registry, run_file, settings
from umbel.core.errors import InputError

ADAPTER = "[task.adapter]"
INIT = "[task] init_from"
POLICY = "policy."
"""What the names of a model begin with that was trained beside its reference."""


def begun(build: Callable[[], nn.Module], section: run_file.Task) -> Callable[[], nn.Module]:
    """``build``, then the tensors of ``init_from``, then the adapter.

    Tensors go to those of the same name: the base model's before the adapter is put in, and an
    adapter's after. Tensors that the model does not have are left: a pre-trained encoder may have
    had another head.

    Raises:
        InputError: no such adapter, or a parameter that is not its own; and, when the model is
            built, what :func:`_begin` says.
    """
    given = section.init_from or ()
    files = [given] if isinstance(given, str) else list(given)
    adapt: Callable[[nn.Module], nn.Module] | None = None
    if section.adapter is not None:
        kind = section.adapter
        name, table = (kind, {}) if isinstance(kind, str) else (kind.kind, kind.parameters())
        factory = registry.find("adapters", name, ADAPTER)
        own = ("module",) if ":" in name else None
        adapt = partial(
            factory, **settings.arguments(factory, table, ADAPTER, f"adapter '{name}'", own)
        )
    return partial(_begin, build, files, adapt) if files or adapt else build


def _begin(
    build: Callable[[], nn.Module],
    files: Sequence[str],
    adapt: Callable[[nn.Module], nn.Module] | None,
) -> nn.Module:
    """The module of :func:`begun`.

    Raises:
        InputError: a file is not there, is no safetensors, fits in no name, or in a name and not
            in shape; or leaves a tensor of the base model random that an adapter would freeze.
    """
    module = build()
    tensors = {file: _read(file) for file in files}
    used = {file: _copy(module, found, file) for file, found in tensors.items()}
    if adapt is not None:
        if files:
            base = {n for n, _ in module.named_parameters()}
            if missing := sorted(base - set().union(*used.values())):
                raise InputError(
                    f"'{missing[0]}' and {len(missing) - 1} other(s) of the base model are in none "
                    "of the files, and the adapter would freeze them as they are: random",
                    where=INIT,
                    fix="name the run that trained the whole model first",
                )
        module = adapt(module)
        for file, found in tensors.items():
            used[file] |= _copy(module, found, file)
        if not any(p.requires_grad for p in module.parameters()):
            raise InputError("the adapter trains nothing", where=ADAPTER, fix="give it targets")
    for file, names in used.items():
        if not names:
            raise InputError(
                f"no tensor of '{file}' has a name of the model's",
                where=INIT,
                fix="is it a run of the same model?",
            )
    return module


def whole(build: Callable[[], nn.Module], file: str, where: str) -> nn.Module:
    """What ``build`` builds, every tensor of it from ``file``.

    Raises:
        InputError: the file is not there, is no safetensors, or lacks a tensor or has it in another
            shape.
    """
    module = build()
    used = _copy(module, _read(file), file)
    if missing := sorted(n for n, _ in module.named_parameters() if n not in used):
        raise InputError(
            f"'{missing[0]}' of the model is not in '{file}', nor are {len(missing) - 1} other(s)",
            where=where,
            fix="is it a run of the same model?",
        )
    return module


def base_hash(module: nn.Module) -> str | None:
    """SHA-256 of the frozen parameters, by name: what must be the same at all clients.

    ``None`` where nothing is frozen.
    """
    digest, any_frozen = hashlib.sha256(), False
    for name, parameter in sorted(module.named_parameters()):
        if not parameter.requires_grad:
            any_frozen = True
            digest.update(f"{name}\x1f{parameter.dtype}\x1f{tuple(parameter.shape)}\x1f".encode())
            raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy().tobytes())
    return digest.hexdigest() if any_frozen else None


def _read(file: str) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load_file(file)
        return {name.removeprefix(POLICY): tensor for name, tensor in tensors.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"cannot read '{file}': {error}", where=INIT, fix="a run's id, its folder or its model"
        ) from None


def _copy(module: nn.Module, tensors: dict[str, Tensor], file: str) -> set[str]:
    """Copies what has the name of a tensor of ``module``; the names."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    names = [name for name in own if name in tensors]  # in the model's order, for the error
    for name in names:
        if own[name].shape != tensors[name].shape:
            raise InputError(
                f"'{name}' has shape {tuple(tensors[name].shape)} in '{file}', expected "
                f"{tuple(own[name].shape)}",
                where=INIT,
                fix="is it a run of the same model?",
            )
        with torch.no_grad():
            own[name].copy_(tensors[name])
    return set(names)
