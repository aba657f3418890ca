"""The state between two rounds as one safetensors document, written so that a kill cannot halve it.

Tensors are named ``params/<name>``, ``buffers/<name>``, ``server/<letter>`` and
``server/<letter>/<name>``. The metadata keeps what safetensors loses: the order of the names (sums
over a tree are taken in it) and trees without a tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from umbel.core.errors import RunError

if TYPE_CHECKING:  # torch is loaded only where tensors are read or written
    from torch import Tensor

    from umbel.core.trees import Model
    from umbel.strategies.parts import ServerState

SCHEMA = 1


class Checkpoint(NamedTuple):
    """The state after ``round``, from which the next one starts. Tensors are on the CPU."""

    round: int
    model: Model
    state: ServerState


def file_name(round_number: int) -> str:
    """``round-000012.safetensors``: sorts by round."""
    return f"round-{round_number:06d}.safetensors"


def write(path: Path, run_id: str, checkpoint: Checkpoint) -> str:
    """Writes ``path`` and returns the sha256 of its bytes; it is there whole, or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    flat: dict[str, Tensor] = {f"params/{n}": t for n, t in checkpoint.model.params.items()}
    flat.update({f"buffers/{n}": t for n, t in checkpoint.model.buffers.items()})
    for letter, part in checkpoint.state.items():
        if isinstance(part, Mapping):
            flat.update({f"server/{letter}/{n}": t for n, t in part.items()})
        else:
            flat[f"server/{letter}"] = part
    metadata = {
        "schema": SCHEMA,
        "run_id": run_id,
        "round": checkpoint.round,
        "letters": list(checkpoint.state),
        "order": list(flat),
    }
    return _write(path, flat, metadata)


def write_model(path: Path, model: Model) -> None:
    """Writes the model alone, under its plain names, for ``load_state_dict``; as :func:`write`.

    Nothing of the run is in it: the same model is the same bytes.
    """
    _write(path, model.tensors(), {})


def read(path: Path, sha256: str) -> Checkpoint:
    """The checkpoint at ``path``, after its bytes were found to be those that were written.

    Raises:
        RunError: the file is missing, damaged, or of a newer Umbel.
    """
    import safetensors
    import safetensors.torch

    from umbel.core.trees import Model

    if not is_whole(path, sha256):
        raise RunError(
            f"checkpoint '{path.name}' is missing or damaged: its bytes are not those written",
            where=str(path.parent),
            fix="restore the file from a backup",
        )
    with safetensors.safe_open(path, framework="pt") as document:
        meta = json.loads(document.metadata()["umbel"])
    if meta["schema"] != SCHEMA:
        raise RunError(
            f"checkpoint '{path.name}' has schema {meta['schema']}, this Umbel reads {SCHEMA}",
            where=str(path.parent),
            fix="resume with the version of Umbel that wrote it",
        )
    loaded = safetensors.torch.load_file(path)
    parts: dict[str, dict[str, Tensor]] = {"params": {}, "buffers": {}}
    state: dict[str, Any] = {letter: {} for letter in meta["letters"]}
    for path_name in meta["order"]:
        # Cloned: a mapped file is not aligned as torch aligns, and fast sums may depend on that.
        tensor = loaded[path_name].clone()
        kind, _, name = path_name.partition("/")
        letter, below, leaf = name.partition("/")
        if kind != "server":
            parts[kind][name] = tensor
        elif below:
            state[letter][leaf] = tensor
        else:
            state[letter] = tensor
    return Checkpoint(meta["round"], Model(parts["params"], parts["buffers"]), state)


def is_whole(path: Path, sha256: str) -> bool:
    """Whether ``path`` is there with the bytes that were written."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False


def replace_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Puts what ``fill`` writes at ``path``: all of it, durably, or nothing.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fill(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    import safetensors
    import safetensors.torch

    digest = ""

    def fill(temporary: Path) -> None:
        nonlocal digest
        text = {"umbel": json.dumps(metadata)} if metadata else {"format": "pt"}
        try:
            safetensors.torch.save_file(_separate(tensors), temporary, text)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()

    replace_file(path, fill)
    return digest


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with memory of its own, as safetensors demands."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        apart[name] = own.clone() if place in seen else own
        seen.add(place)
    return apart
