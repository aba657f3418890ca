from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from umbel.privacy import streams
from umbel.privacy.streams import seeded_stream, system_stream

FALSE_ALARM = 1e-6  # of each statistical test that is not seeded


def test_words_are_aes_256_in_counter_mode() -> None:
    key = bytes(range(32))
    whole = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(80))
    assert streams._aes(key, 0, 10).tobytes() == whole
    assert streams._aes(key, 2, 3).tobytes() == whole[32:56]


def test_the_system_never_repeats() -> None:
    stream = system_stream()
    drawn = np.concatenate([stream.words(1000), stream.words(1000), system_stream().words(1000)])
    assert stream.generator == "os"
    assert len(np.unique(drawn)) == 3000  # a collision of fresh words: 2^-42
    assert stream.words(0).shape == (0,)


def test_words_are_uniform_bit_by_bit() -> None:
    words = system_stream().words(1 << 16)
    for bit in range(0, 64, 7):
        ones = int(((words >> np.uint64(bit)) & np.uint64(1)).sum())
        assert stats.binomtest(ones, len(words)).pvalue > FALSE_ALARM
    counts = np.bincount((words >> np.uint64(56)).astype(np.int64), minlength=256)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_long_draws_change_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_WORDS_PER_KEY", 100)
    words = system_stream().words(250)
    assert words.shape == (250,)
    assert len(np.unique(words)) == 250


def test_a_fork_draws_its_own() -> None:
    stream = system_stream()
    stream.words(10)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, stream.words(64).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(reading, 512), np.uint64)
    os.close(reading)
    os.close(writing)
    mine = stream.words(64)
    assert len(theirs) == 64
    assert not set(theirs.tolist()) & set(mine.tolist())


def test_two_processes_differ() -> None:
    script = "from umbel.privacy.streams import system_stream; print(*system_stream().words(64))"
    drawn = [
        set(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE).stdout.split())
        for _ in range(2)
    ]
    assert [len(words) for words in drawn] == [64, 64]
    assert not drawn[0] & drawn[1]


def test_seeded_streams_repeat_by_their_coordinates_alone() -> None:
    words = seeded_stream(1, "noise", 4, "c17").words(100)
    again = seeded_stream(1, "noise", 4, "c17")
    # An odd number of words uses up whole blocks; what follows is still the stream's own.
    assert np.array_equal(words[:3], again.words(3))
    assert np.array_equal(words[4:10], again.words(6))
    assert seeded_stream(1, "noise").generator == "seeded"
    others = [(2, "noise", 4, "c17"), (1, "count", 4, "c17"), (1, "noise", 41, "c7")]
    for seed, purpose, *coordinates in others:
        other = seeded_stream(seed, purpose, *coordinates).words(100)
        assert not set(other.tolist()) & set(words.tolist())
