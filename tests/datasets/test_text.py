"""Texts of one's own, and their symbols."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbel.core.errors import InputError
from umbel.core.run_file import Data
from umbel.datasets.build import load, read
from umbel.datasets.tokenizers import tokenizer


@pytest.mark.parametrize("name", ["bytes", "characters"])
def test_symbols_turn_back_into_text(name: str) -> None:
    own = tokenizer(name)
    codes = own.encode("Was it a rat?\n~")
    assert own.decode([*codes, own.padding]) == "Was it a rat?\n~"
    assert max(codes) < own.padding < own.vocabulary


def test_bytes_write_anything_and_characters_say_where_they_cannot() -> None:
    own = tokenizer("bytes")
    assert own.decode(own.encode("größer 猫")) == "größer 猫"
    assert tokenizer("characters").decode(tokenizer("characters").encode("für")) == "f\ufffdr"


def test_a_tokenizer_of_a_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2, "to": 3, "be": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]"
    ).save_pretrained(tmp_path)
    own = tokenizer(str(tmp_path))
    assert (own.vocabulary, own.padding, own.mask) == (5, 0, 1)
    assert own.encode("to be or") == [3, 4, 2]
    with pytest.raises(InputError, match="neither 'bytes', nor 'characters'"):
        tokenizer(str(tmp_path / "none"))


def test_each_file_is_a_client_and_ends_are_padded(tmp_path: Path) -> None:
    (tmp_path / "anna.txt").write_text("abcdefghij")
    (tmp_path / "ben.txt").write_text("xyz" * 8)
    data = load(Data(name="text", path=str(tmp_path), window=8, client_holdout=0.0, holdout=0.0), 0)  # type: ignore[call-arg]
    assert list(data.names) == ["anna", "ben"]
    own = tokenizer("characters")
    records = data.train_part(0)["x"]
    assert [own.decode(r.tolist()) for r in records] == ["abcdefgh", "ij"]
    assert (records[1] == own.padding).sum() == 6
    assert len(data.train_part(1)["x"]) == 3
    assert (data.info.vocabulary, data.info.padding) == (own.vocabulary, own.padding)


def test_overlapping_windows_and_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("0123456789")
    found = read(Data(name="text", path=str(tmp_path / "one.txt"), window=4, stride=3))  # type: ignore[call-arg]
    assert found.owner is None
    assert found.train["x"].shape == (3, 4)
    (tmp_path / "two.txt").write_text("x")
    with pytest.raises(InputError, match="nothing to predict"):
        read(Data(name="text", path=str(tmp_path)))
    with pytest.raises(InputError, match=r"no \.txt file"):
        read(Data(name="text", path=str(tmp_path / "none")))


def test_sentences_have_classes_and_owners(tmp_path: Path) -> None:
    file = tmp_path / "notes.csv"
    file.write_text('text,label,ward\n"well, today",good,a\nworse,bad,b\nfine,good,a\n')
    table = {"name": "sentences", "path": str(file), "window": 6, "client": "ward"}
    found = read(Data(**table))
    own = tokenizer("characters")
    assert [own.decode(r.tolist()) for r in found.train["x"]] == ["well, ", "worse", "fine"]
    assert found.train["y"].tolist() == [1, 0, 1]
    assert found.owner is not None
    assert found.owner.tolist() == ["a", "b", "a"]
    turned = read(Data(**table, labels=["good", "bad"]))  # type: ignore[call-arg]
    assert turned.train["y"].tolist() == [0, 1, 0]
    with pytest.raises(InputError, match="line 3: unknown label 'bad'"):
        read(Data(**table, labels=["good"]))  # type: ignore[call-arg]
    with pytest.raises(InputError, match="no column 'topic'"):
        read(Data(**{**table, "label": "topic"}))


@pytest.mark.data
def test_half_of_the_speakers(data_root: Path) -> None:
    whole, even, odd = (
        read(
            Data(name="tinyshakespeare", path=str(data_root), window=64, stride=64, speakers=part)  # type: ignore[call-arg]
        )
        for part in ("all", "even", "odd")
    )
    assert whole.owner is not None
    assert even.owner is not None
    assert odd.owner is not None
    assert not set(even.owner) & set(odd.owner)
    assert set(even.owner) | set(odd.owner) == set(whole.owner)
    assert len(even.owner) + len(odd.owner) == len(whole.owner)
