"""Preferences and prompts: one's own files, and synthetic ones whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbel.core.errors import InputError
from umbel.core.run_file import resolve
from umbel.datasets.build import load
from umbel.datasets.federated import FederatedData
from umbel.datasets.readers.synthetic_preferences import synthetic_preferences
from umbel.datasets.readers.synthetic_prompts import synthetic_prompts


def read(tmp_path: Path, name: str, text: str, **table: Any) -> FederatedData:
    file = tmp_path / "own.csv"
    file.write_text(text)
    section = {"name": name, "path": str(file), "tokenizer": "bytes", "holdout": 0.0, **table}
    return load(resolve({"data": section, "task": {"kind": "dpo"}}).data, 0)


PAIRS = "prompt,chosen,rejected,who\nab,cd,e,anna\nlong prompt,xy,z,ben\n"


def test_pairs_of_ones_own_file(tmp_path: Path) -> None:
    data = read(tmp_path, "preferences", PAIRS, window=6, client="who", client_holdout=0.0)
    assert list(data.names) == ["anna", "ben"]
    first, second = (data.train_part(place) for place in range(2))
    assert bytes(first["x"][0, :4].tolist()) == b"abcd"
    assert first["rejected"][0].tolist() == [*b"abe", 256, 256, 256]
    assert first["prompt"].tolist() == [2]
    # The prompt loses its beginning, on both sides the same.
    assert bytes(second["x"][0].tolist()) == b"omptxy"
    assert second["rejected"][0].tolist() == [*b"omptz", 256]
    assert second["prompt"].tolist() == [4]


def test_prompts_of_ones_own_file(tmp_path: Path) -> None:
    text = "prompt,answer\n1+1=,2\n11+11=,22\n"
    data = read(tmp_path, "prompts", text, window=5, answer=3, split={"kind": "iid", "clients": 1})
    part = data.train_part(0)
    order = np.argsort(part["x"][:, -1])
    assert bytes(part["x"][order][0].tolist()) == b"1+11="[1:] + b"=" or part["x"].shape == (2, 5)
    rows = {bytes(c for c in row if c < 256) for row in part["x"].tolist()}
    assert rows == {b"1+1=", b"1+11="}
    answers = {tuple(row) for row in part["answer"].tolist()}
    assert answers == {(50, 256, 256), (50, 50, 256)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("preferences", "prompt,chosen\na,b\n", "no column 'rejected'"),
        ("preferences", "prompt,chosen,rejected\na,,c\n", "line 2: 'chosen' is empty"),
        ("preferences", "prompt,chosen,rejected\na,b,b\n", "line 2: both completions are the same"),
        ("preferences", "prompt,chosen,rejected\na,b,cdefgh\n", "line 2: 6 symbols of a comple"),
        ("prompts", "prompt,answer\n", "no column 'prompt'"),
        ("prompts", "prompt,answer\na,b\nc,long answer\n", "line 3: an answer of 11 symbols"),
    ],
)
def test_damaged_files_name_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    table = {"window": 6} | ({"answer": 4} if name == "prompts" else {})
    with pytest.raises(InputError, match=message):
        read(tmp_path, name, text, **table)


def worth(part: Any, taste: Any) -> Any:
    return [taste[part[side][:, 4:]].mean(1) for side in ("x", "rejected")]


def test_a_tenth_of_the_synthetic_preferences_is_the_wrong_way_round() -> None:
    data = synthetic_preferences(clients=4, pairs=1000, test_pairs=500, flips=0.1)
    assert data.test is not None
    # The tastes are found again from the truthful pairs: counts of symbols, by least squares.
    shapes = np.eye(16)
    gap = shapes[data.test["x"][:, 4:]].sum(1) - shapes[data.test["rejected"][:, 4:]].sum(1)
    taste = np.linalg.lstsq(gap, np.ones(len(gap)), rcond=None)[0]
    right = np.subtract(*worth(data.test, taste)) > 0
    wrong = np.subtract(*worth(data.train, taste)) < 0
    assert right.mean() > 0.93
    assert 0.08 < wrong.mean() < 0.17
    again = synthetic_preferences(clients=4, pairs=1000, test_pairs=500, flips=0.1)
    assert np.array_equal(again.train["x"], data.train["x"])
    other = synthetic_preferences(clients=4, pairs=1000, test_pairs=500, data_seed=1)
    assert not np.array_equal(other.train["x"], data.train["x"])
    assert (data.train["x"][:, :4] == data.train["rejected"][:, :4]).all()


@pytest.mark.parametrize("rule", ["last", "copy", "reverse"])
def test_synthetic_answers_follow_their_rule(rule: Any) -> None:
    data = synthetic_prompts(clients=2, prompts=5, test_prompts=3, rule=rule, prompt=4, answer=2)
    for x, answer in zip(data.train["x"], data.train["answer"], strict=True):
        expected = {"last": [x[3], x[3]], "copy": [x[0], x[1]], "reverse": [x[3], x[2]]}
        assert answer.tolist() == expected[rule]
    assert data.owner is not None
    assert data.owner.tolist() == ["c0"] * 5 + ["c1"] * 5
    with pytest.raises(InputError, match="answer = 5 symbols of a prompt of 4"):
        synthetic_prompts(rule="copy", prompt=4, answer=5)
