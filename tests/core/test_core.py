from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umbel.core import randomness, registry
from umbel.core.errors import InputError
from umbel.core.payloads import canonical_json, pack, unpack
from umbel.core.trees import Model, add_cast, flatten, norm, unflatten

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@given(seed=st.integers(0, 2**31), n=st.integers(0, 200))
def test_permutation_is_one(seed: int, n: int) -> None:
    assert sorted(randomness.permutation(randomness.key(seed, "p"), n)) == list(range(n))


@pytest.mark.parametrize("n", [randomness.BLOCK + 1, 150_000])
@pytest.mark.parametrize("bits", [18, 56, 64])  # no ties, most, nothing but ties
def test_a_long_permutation_is_the_order_of_its_hashes(n: int, bits: int) -> None:
    stream = randomness.key(1, "long", n)
    order = np.argsort(randomness.mix(stream, np.arange(n, dtype=np.uint64)), kind="stable")
    assert np.array_equal(randomness._in_place(stream, n, bits), order)
    assert np.array_equal(randomness.permutation(stream, n), order)


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_permutations_of_a_cohort_are_those_of_its_clients(sizes: list[int]) -> None:
    keys = randomness.client_keys(3, "batches", 5, [f"c{i}" for i in range(len(sizes))])
    rows = randomness.permutations(keys, np.array(sizes))
    for i, n in enumerate(sizes):
        assert keys[i] == randomness.key(3, "batches", 5, f"c{i}")
        assert (rows[i, :n] == randomness.permutation(keys[i], n)).all()


def test_permutations_are_uniform() -> None:
    # Each of the 24 orders of four, drawn 24,000 times: chi-squared with 23 degrees of freedom.
    keys = np.array([randomness.key(0, "u", i) for i in range(24_000)])
    rows = randomness.permutations(keys, np.full(24_000, 4))
    _, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 60  # p = 4e-5


def test_hash_bits_are_fair_and_streams_differ() -> None:
    bits = np.unpackbits(randomness.mix(randomness.key(1, "a"), np.arange(4096)).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(bits.size)
    assert randomness.key(1, "a") != randomness.key(1, "b")
    assert randomness.key(1, "a", 1, 2) != randomness.key(1, "a", 12)


def test_torch_seeds_are_what_torch_takes() -> None:
    for i in range(100):
        torch.Generator().manual_seed(randomness.torch_seed(i, "init"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_go_through_bytes_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = {"a.weight": (torch.randn(3, 4) * 5).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    back, meta = unpack(pack(tensors, {"round": 3, "names": ["ä"]}))
    assert meta == {"round": 3, "names": ["ä"]}
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor)


def test_views_and_no_metadata_are_packed_too() -> None:
    back, meta = unpack(pack({"t": torch.arange(12.0).reshape(3, 4).T}))
    assert meta is None
    assert torch.equal(back["t"], torch.arange(12.0).reshape(3, 4).T)


@given(cut=st.integers(0, 200))
def test_a_document_cut_short_is_one_clear_error(cut: int) -> None:
    document = pack({"t": torch.zeros(40)}, {"round": 1})
    with pytest.raises(InputError, match="not a safetensors document"):
        unpack(document[:cut])


def test_canonical_json_is_one_text_for_one_value() -> None:
    assert canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


def test_flatten_and_back() -> None:
    nested = {"m": {"fc.weight": torch.ones(2)}, "t": torch.zeros(())}
    flat = flatten(nested)
    assert list(flat) == ["m/fc.weight", "t"]
    assert unflatten(flat).keys() == nested.keys()
    assert unflatten(flat)["m"]["fc.weight"] is nested["m"]["fc.weight"]


def test_integers_are_rounded_not_truncated() -> None:
    base = torch.tensor([1, 1, -1])
    stepped = add_cast(base, torch.tensor([0.6, 0.4, -0.6], dtype=torch.float64))
    assert stepped.dtype == torch.int64
    assert stepped.tolist() == [2, 1, -2]


def test_norm_is_of_the_whole_tree() -> None:
    assert norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}).item() == 5
    assert norm({}).item() == 0


def test_a_model_knows_its_weight() -> None:
    model = Model({"w": torch.zeros(3)}, {"n": torch.zeros((), dtype=torch.int64)})
    assert model.bytes() == 20


@pytest.mark.parametrize("name", [":b", "..x:y", "no.such:thing", "math:no", "math:pi"])
def test_a_part_that_cannot_be_had_is_one_clear_error(name: str) -> None:
    with pytest.raises(InputError):
        registry.find("models", name, "[task.model]")


def test_names_of_parts_are_forgiving_of_underscores() -> None:
    assert registry.find("datasets", "heart_disease", "[data]").__name__ == "heart_disease"
    with pytest.raises(InputError, match=r"unknown data set 'digit'.*did you mean 'digits'"):
        registry.find("datasets", "digit", "[data]")
