"""What a round is about, agreed on before it starts, and what a member accepts at all."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from umbel.core.errors import InputError
from umbel.privacy.secure_aggregation.identities import PROTOCOL
from umbel.privacy.secure_aggregation.parameters import SIGMA

_LAYOUT = struct.Struct(">16sI32s32sIBBB")
TERMS_BYTES = _LAYOUT.size
MAX_MEMBERS = 65535
MAX_SIZE = 1 << 30


@dataclass(frozen=True)
class Terms:
    """The terms of one round; every signature and every derived key is bound to their digest.

    Args:
        run: 16 bytes, the run.
        round_number: the round, from 0.
        context: 32 bytes, the hash of the manifest with the base model in it.
        directory: 32 bytes, the digest of the pinned public keys.
        size: numbers in the vector, 1 … 2**30.
        ring_bits: the sum is taken modulo 2**ring_bits, 16 … 32.
        value_bits: a client's numbers are 0 … 2**value_bits - 1.
        modular: the numbers are residues that fill the ring, and their sum is meant to go round it,
            as that of distributed noise; else it must not.
    Raises:
        InputError: a value is out of its bounds.
    """

    run: bytes
    round_number: int
    context: bytes
    directory: bytes
    size: int
    ring_bits: int
    value_bits: int
    modular: bool = False

    def __post_init__(self) -> None:
        bounds = (
            ("run", len(self.run), 16, 16),
            ("context", len(self.context), 32, 32),
            ("directory", len(self.directory), 32, 32),
            ("round_number", self.round_number, 0, 2**32 - 1),
            ("size", self.size, 1, MAX_SIZE),
            ("ring_bits", self.ring_bits, 16, 32),
            ("modular", int(self.modular), 0, 1),  # as all bytes: one encoding for one meaning
            ("value_bits", self.value_bits, self.ring_bits if self.modular else 1, self.ring_bits),
        )
        for name, value, low, high in bounds:
            if not low <= value <= high:
                raise InputError(
                    f"{name} is {value}, expected {low} to {high}",
                    where="secure aggregation terms",
                    fix="lengths are in bytes; value_bits is at most ring_bits",
                )

    def encode(self) -> bytes:
        """The canonical bytes."""
        return _LAYOUT.pack(
            self.run,
            self.round_number,
            self.context,
            self.directory,
            self.size,
            self.ring_bits,
            self.value_bits,
            self.modular,
        )

    @classmethod
    def decode(cls, data: bytes) -> Terms:
        """Terms from exactly ``TERMS_BYTES`` bytes.

        Raises:
            InputError: a value is out of its bounds.
        """
        return cls(*_LAYOUT.unpack(data))

    @property
    def digest(self) -> bytes:
        """32 bytes."""
        return hashlib.sha256(PROTOCOL + b"\0terms\0" + self.encode()).digest()

    @property
    def word_bytes(self) -> int:
        """Bytes of a masked number on the wire: 2, 3 or 4."""
        return (self.ring_bits + 7) // 8

    def overflows(self, n: int) -> bool:
        """Whether the sum of n clients may leave a ring that it must not leave:
        n · (2^value_bits − 1) ≥ 2^ring_bits."""
        return not self.modular and n * ((1 << self.value_bits) - 1) >= 1 << self.ring_bits


def widest_values(n: int, ring_bits: int) -> int:
    """The most value_bits that n clients can have in a ring of ``ring_bits``, or 0."""
    return (((1 << ring_bits) - 1) // n + 1).bit_length() - 1


@dataclass(frozen=True)
class Policy:
    """What a member demands of any round; its own decision, never the server's.

    Args:
        min_cohort: clients in the sum, at the least; from 2.
        corrupt_fraction: γ, the share of a cohort that may help a hostile server.
        sigma: attacks on the graph succeed with probability at most 2^-sigma.
        max_cohort: clients in a round, at the most: so many the grid of distributed noise holds.
    """

    min_cohort: int = 3
    corrupt_fraction: float = 0.1
    sigma: int = SIGMA
    max_cohort: int = MAX_MEMBERS

    def __post_init__(self) -> None:
        if self.min_cohort < 2 or not 0 <= self.corrupt_fraction < 1 or self.sigma < 1:
            raise InputError(
                f"min_cohort {self.min_cohort}, corrupt_fraction {self.corrupt_fraction}, "
                f"sigma {self.sigma}: expected at least 2, 0 to less than 1, at least 1",
                where="secure aggregation policy",
                fix="a sum of one client is that client's vector",
            )
