"""Known answers: key stream, key derivation, key agreement, secret sharing."""

from __future__ import annotations

import hashlib
import itertools
import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.core.errors import InputError
from umbel.privacy.secure_aggregation import agreement, boxes, keystream, shamir
from umbel.privacy.secure_aggregation.agreement import KeyPair, RoundKeys
from umbel.privacy.secure_aggregation.identities import Directory, Identity
from umbel.privacy.secure_aggregation.refusals import Reason, Refused


def test_key_stream_is_aes_256_in_counter_mode():
    # The cipher of the zero block under the zero key, then NIST SP 800-38A, F.5.5, whose counter
    # starts elsewhere; the stream here is the cipher of the blocks 2, 3, 4, … under the same key.
    zero = Cipher(algorithms.AES256(bytes(32)), modes.ECB()).encryptor().update(bytes(16))
    assert zero.hex() == "dc95c078a2408989ad48a21492842087"
    # The first block of ciphertext of GCM's test case 14 (McGrew and Viega), of a zero plaintext.
    assert keystream.key_bytes(bytes(32), 16).hex() == "cea7403d4d606b6e074ec5d3baf39d18"
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
    nist = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update(plain)
    assert nist.hex() == "601ec313775789a5b7a7f504bbf3d228"
    blocks = b"".join(i.to_bytes(16, "big") for i in range(2, 6))
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
        for a, b in ((1, 2), (2, 3)):
            derived.update(keys.pair(b"s" * 64, a, b))
            derived.add(keys.half(b"s" * 32, a, b))
            derived.add(keys.half(b"s" * 32, b, a))
            derived.add(keys.wrap(bytes(32), b"s" * 32, a, b))
            derived.add(keys.wrap(bytes(32), b"s" * 32, b, a))
            derived.add(keys.mask((b"s" * 32, b"t" * 32), a, b))
        derived.add(keys.self_mask(b"s" * 32, 1))
    assert len(derived) == 4 * (2 * 8 + 1)
    keys, other = RoundKeys(b"a" * 16, 0, b"t" * 32), RoundKeys(b"a" * 16, 0, b"u" * 32)
    assert keys.pair(b"s" * 64, 1, 2) == keys.pair(b"s" * 64, 2, 1)
    assert keys.pair(b"s" * 64, 1, 2).box(1, 2) != keys.pair(b"s" * 64, 1, 2).box(2, 1)
    assert keys.mask((b"s" * 32, b"t" * 32), 1, 2) == keys.mask((b"t" * 32, b"s" * 32), 2, 1)
    assert keys.mask((b"s" * 32, b"t" * 32), 1, 2) != other.mask((b"s" * 32, b"t" * 32), 1, 2)
    assert set(keys.pair(b"s" * 64, 1, 2)).isdisjoint(other.pair(b"s" * 64, 1, 2))


def test_a_half_is_read_with_the_other_half_alone():
    keys = RoundKeys(b"a" * 16, 0, b"t" * 32)
    mine, theirs = os.urandom(32), os.urandom(32)
    wrapped = keys.wrap(mine, theirs, 1, 2)
    assert keys.wrap(wrapped, theirs, 1, 2) == mine
    assert keys.wrap(wrapped, theirs, 2, 1) != mine
    assert keys.wrap(wrapped, os.urandom(32), 1, 2) != mine


def test_an_identity_agrees_as_its_map_to_the_other_curve_says():
    # The pair of RFC 8032, section 7.1, test 1, and its image as libsodium's
    # crypto_sign_ed25519_pk_to_curve25519 gives it.
    private = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    one, other = Identity(bytes.fromhex(private)), Identity.generate()
    assert one.public_key.hex() == public
    directory = Directory([one.public_key, other.public_key])
    scalar = X25519PrivateKey.from_private_bytes(
        hashlib.sha512(bytes.fromhex(private)).digest()[:32]
    )
    assert directory.exchange_key(0).public_bytes_raw() == scalar.public_key().public_bytes_raw()
    assert one.agree(directory, 1) == other.agree(directory, 0)
    assert one.agree(directory, 1) != Identity.generate().agree(directory, 1)


def test_a_pinned_key_of_small_order_agrees_on_nothing():
    neutral = (1).to_bytes(32, "little")
    one = Identity.generate()
    directory = Directory([one.public_key, neutral])
    with pytest.raises(ValueError, match=r"(?i)shared"):
        one.agree(directory, 1)


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
    contents = boxes.Contents(b"a" * 33, b"b" * 33, b"c" * 32)
    box = boxes.seal(key, graph, 1, 2, contents)
    assert len(box) == boxes.BOX_BYTES
    assert boxes.open_box(key, graph, 1, 2, box) == contents
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
