"""Known answers: key stream, key derivation, key agreement, secret sharing."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.core.errors import InputError
from umbel.privacy.secure_aggregation import agreement, boxes, keystream, shamir
from umbel.privacy.secure_aggregation.agreement import KeyPair, Purpose, RoundKeys
from umbel.privacy.secure_aggregation.identities import Directory, Identity
from umbel.privacy.secure_aggregation.refusals import Reason, Refused


def test_key_stream_is_aes_256_in_counter_mode():
    # The cipher of the zero block under the zero key, then NIST SP 800-38A, F.5.5, whose counter
    # starts elsewhere; the stream here is the cipher of the blocks 0, 1, 2, … under the same key.
    zero = keystream.key_bytes(bytes(32), 32)
    assert zero[:16].hex() == "dc95c078a2408989ad48a21492842087"
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
    nist = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update(plain)
    assert nist.hex() == "601ec313775789a5b7a7f504bbf3d228"
    blocks = b"".join(i.to_bytes(16, "big") for i in range(4))
    ecb = Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(blocks)
    assert keystream.key_bytes(key, 64) == ecb


@given(size=st.integers(1, 3 * 65536 + 5))
@settings(max_examples=10, deadline=None)
def test_masks_are_the_key_stream_whatever_the_chunks(size):
    keys = [os.urandom(32) for _ in range(3)]
    target = np.zeros(size, dtype=np.uint32)
    keystream.add_streams(target, keys[:2], keys[2:])
    a, b, c = (np.frombuffer(keystream.key_bytes(k, 4 * size), dtype="<u4") for k in keys)
    assert np.array_equal(target, a + b - c)


def test_hkdf_known_answers():
    # RFC 5869, appendix A.1 and A.3.
    okm = agreement.hkdf(
        b"\x0b" * 22, bytes(range(13)), bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"), size=42
    )
    assert okm.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )
    assert agreement.hkdf(b"\x0b" * 22, b"", b"", size=42).hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )


def test_x25519_known_answer():
    # RFC 7748, section 6.1.
    alice = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
    bob = "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    a, b = KeyPair(bytes.fromhex(alice)), KeyPair(bytes.fromhex(bob))
    assert a.public_key.hex().startswith("8520f0098930a754748b7ddcb43ef75a")
    assert b.public_key.hex().startswith("de9edb7d7b7dc1b4d35b61c2ece43537")
    assert a.agree(b.public_key, 1).hex() == b.agree(a.public_key, 0).hex() == shared


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_keys_of_small_order_are_refused(point):
    with pytest.raises(Refused) as refused:
        KeyPair().agree(point, 3)
    assert refused.value.reason is Reason.REPLACED_KEY


def test_no_two_purposes_pairs_rounds_or_runs_share_a_key():
    derived = set()
    for run, number, terms in itertools.product((b"a" * 16, b"b" * 16), (0, 1), (b"t" * 32,)):
        keys = RoundKeys(run, number, terms)
        for purpose in Purpose:
            derived.add(keys.derive(b"s" * 32, 1, 2, purpose))
            derived.add(keys.derive(b"s" * 32, 2, 1, purpose))
    assert len(derived) == 4 * 2 * len(Purpose)
    keys = RoundKeys(b"a" * 16, 0, b"t" * 32)
    assert keys.mask(b"s" * 32, 1, 2) == keys.mask(b"s" * 32, 2, 1)
    assert keys.mask(b"s" * 32, 1, 2) != RoundKeys(b"a" * 16, 0, b"u" * 32).mask(b"s" * 32, 1, 2)


def test_the_field_is_the_smallest_prime_above_two_to_the_256():
    assert [d for d in range(1, 298) if _is_prime(2**256 + d)] == [297]
    assert shamir.PRIME == 2**256 + 297


def _is_prime(n: int) -> bool:
    """Miller-Rabin with the first twelve primes as bases."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def test_shamir_by_hand():
    # f(x) = 7 + 3x + 2x²: f(1) = 12, f(2) = 21, f(4) = 51; at zero 12·8/3 − 21·2 + 51/3 = 7.
    shares = {x: (7 + 3 * x + 2 * x * x).to_bytes(33, "big") for x in (1, 2, 4)}
    assert int.from_bytes(shamir.combine(shares), "big") == 7


@given(secret=st.binary(min_size=32, max_size=32), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_threshold_of_shares_gives_the_secret(secret, data):
    holders = data.draw(st.integers(1, 70))
    threshold = data.draw(st.integers(1, holders))
    shares = shamir.split(secret, threshold, holders)
    points = data.draw(st.permutations(range(1, holders + 1)))[:threshold]
    assert shamir.combine({x: shares[x - 1] for x in points}) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_extreme_secrets_are_shared_raw(secret):
    shares = shamir.split(secret, 3, 4)
    assert shamir.combine({x: shares[x - 1] for x in (1, 3, 4)}) == secret


def test_one_share_too_few_is_compatible_with_every_secret():
    # The missing point can be completed to any secret: solve for f(3) with f(0) given.
    shares = shamir.split(os.urandom(32), 3, 5)
    known = {x: int.from_bytes(shares[x - 1], "big") for x in (1, 2)}
    for wanted in (0, 1, 2**256 - 1):
        third = (wanted - 3 * known[1] + 3 * known[2]) % shamir.PRIME  # λ = 3, −3, 1
        points = {1: shares[0], 2: shares[1], 3: third.to_bytes(33, "big")}
        assert int.from_bytes(shamir.combine(points), "big") == wanted


def test_large_points_have_exact_coefficients():
    # The products are grouped in 63-bit words; 1,000 holders need ten bits a factor.
    secret = os.urandom(32)
    shares = shamir.split(secret, 40, 1000)
    assert shamir.combine({x: shares[x - 1] for x in range(961, 1001)}) == secret


def test_a_box_opens_for_its_pair_and_graph_only():
    key, graph = os.urandom(32), os.urandom(32)
    box = boxes.seal(key, graph, 1, 2, b"a" * 33, b"b" * 33)
    assert len(box) == boxes.BOX_BYTES
    assert boxes.open_box(key, graph, 1, 2, box) == (b"a" * 33, b"b" * 33)
    flipped = bytes([box[0] ^ 1]) + box[1:]
    others = (
        (graph, 2, 1, box),
        (graph, 1, 3, box),
        (bytes(32), 1, 2, box),
        (graph, 1, 2, flipped),
    )
    for digest, source, destination, sealed in others:
        with pytest.raises(Refused) as refused:
            boxes.open_box(key, digest, source, destination, sealed)
        assert refused.value.reason is Reason.TAMPERED_SHARES


def test_one_party_cannot_have_two_numbers():
    key = Identity.generate().public_key
    with pytest.raises(InputError, match="twice"):
        Directory([key, key])
    with pytest.raises(InputError, match="31 bytes"):
        Directory([key[:31]])


def test_signatures_are_bound_to_purpose_member_and_message():
    identities = [Identity.generate() for _ in range(2)]
    directory = Directory([identity.public_key for identity in identities])
    signature = identities[0].sign(b"advert", b"message")
    assert directory.verify(0, b"advert", b"message", signature)
    assert not directory.verify(0, b"survivors", b"message", signature)
    assert not directory.verify(0, b"advert", b"massage", signature)
    assert not directory.verify(1, b"advert", b"message", signature)
    assert not directory.verify(2, b"advert", b"message", signature)
