"""From text to symbols and back: bytes, characters, or a tokenizer of a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from umbel.core.errors import InputError

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""What ``characters`` knows; the same at every site, whatever its texts hold."""


class Tokenizer(NamedTuple):
    """Text to symbols, and symbols to text.

    Args:
        vocabulary: how many symbols there are, padding included.
        padding: the symbol that fills up short records.
        mask: the symbol that stands for a hidden one, where there is one.
        encode: text -> symbols.
        decode: symbols -> text; padding is left out.
    """

    vocabulary: int
    padding: int
    mask: int | None
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def tokenizer(name: str) -> Tokenizer:
    """The tokenizer of ``[data] tokenizer``.

    Args:
        name: ``bytes``: the 256 of UTF-8, which write anything. ``characters``: newline and
            printable ASCII, and one symbol for all others. Else a folder with a ``tokenizer.json``.

    Raises:
        InputError: neither, or a tokenizer without padding.
    """
    if name == "bytes":
        return Tokenizer(
            257,
            256,
            None,
            lambda text: list(text.encode()),
            lambda symbols: bytes(s for s in symbols if s < 256).decode(errors="replace"),
        )
    if name == "characters":
        place = {character: i for i, character in enumerate(CHARACTERS)}
        other = len(CHARACTERS)
        known = CHARACTERS + "\N{REPLACEMENT CHARACTER}"
        return Tokenizer(
            other + 2,
            other + 1,
            None,
            lambda text: [place.get(character, other) for character in text],
            lambda symbols: "".join(known[s] for s in symbols if s < len(known)),
        )
    return _of_folder(Path(name))


def _of_folder(folder: Path) -> Tokenizer:
    where = "[data] tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"'{folder}' is neither 'bytes', nor 'characters', nor a folder with a tokenizer.json",
            where=where,
            fix="name the folder of save_pretrained",
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError(
            f"a tokenizer of a folder needs transformers: {error}",
            where=where,
            fix="pip install 'umbel[llm]'",
        ) from None
    own: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    padding = own.pad_token_id if own.pad_token_id is not None else own.eos_token_id
    if padding is None:
        raise InputError(
            f"the tokenizer of '{folder}' has neither a padding nor an end symbol",
            where=where,
            fix="give it a pad_token",
        )
    return Tokenizer(
        len(own),
        padding,
        own.mask_token_id,
        lambda text: list(own.encode(text, add_special_tokens=False)),
        lambda symbols: str(own.decode([s for s in symbols if s != padding])),
    )
