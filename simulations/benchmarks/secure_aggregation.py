"""What a round of secure aggregation costs, beside Flower's own functions in the same process.

    python -m umbel.simulations.benchmarks.secure_aggregation [--flower] [--only N,D]

CPU seconds of this thread: of a client the median over the cohort, from its first message to its
last and with its fixed-point encoding; of the server the whole round. Upload is what one client
sends, drop-outs happen after the shares were dealt, which costs the server most. The sum is
compared with the plain one each time. n clients live in one process here, so the cyclic garbage
collector is off during a round: it would walk the objects of all of them.

Flower's figures are its functions on the same numbers: for a client the key agreements, shares,
quantisation and masks of SecAgg+; for the server its mask removal, timed on three survivors and
three pairs and multiplied by their counts, because whole rounds take minutes.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from umbel.privacy.secure_aggregation.client import Client
from umbel.privacy.secure_aggregation.encoding import Layout, Real
from umbel.privacy.secure_aggregation.identities import Directory, Identity
from umbel.privacy.secure_aggregation.keystream import Words
from umbel.privacy.secure_aggregation.messages import encode
from umbel.privacy.secure_aggregation.parameters import Design
from umbel.privacy.secure_aggregation.server import Aborted, Outbox, Server, Stage, Total
from umbel.privacy.secure_aggregation.terms import Policy, Terms, widest_values


class Case(NamedTuple):
    """n clients, k neighbours, t to agree, d numbers, a share of drop-outs."""

    n: int
    k: int
    t: int
    d: int
    lost: float


class Cost(NamedTuple):
    """CPU seconds and bytes."""

    client: float
    server: float
    upload: int


CASES = [
    *(Case(50, 49, 25, d, lost) for d in (100_000, 1_000_000) for lost in (0.05, 0.20)),
    *(Case(100, 31, 16, d, lost) for d in (100_000, 1_000_000) for lost in (0.05, 0.20)),
    Case(1000, 61, 31, 100_000, 0.05),
]


def measure(case: Case) -> Cost:
    """Runs one round of ``case`` and checks its sum."""
    n, k, t, d, lost = case
    identities = [Identity.generate() for _ in range(n)]
    directory = Directory([identity.public_key for identity in identities])
    bits = widest_values(n, 32)
    terms = Terms(os.urandom(16), 0, os.urandom(32), directory.digest, d, 32, bits)
    layout = Layout([Real("delta", d, 1.0)], bits)
    delta = np.random.default_rng(0).normal(scale=0.1, size=d).astype(np.float32)
    plain = np.zeros(d, dtype=np.uint32)
    gone = set(range(round(lost * n)))

    def payload_of(member: int) -> Callable[[], Words]:
        def payload() -> Words:
            words = layout.encode({"delta": delta})
            if member not in gone:
                start = time.thread_time()
                np.add(plain, words, out=plain)
                unmeasured[member] += time.thread_time() - start
            return words

        return payload

    spent, unmeasured = [0.0] * n, [0.0] * n
    upload = [0] * n
    # The thresholds of these cases state no coalition: 2t > k.
    policy = Policy(corrupt_fraction=0.0)
    clients = [Client(m, identities[m], directory, terms, policy, payload_of(m)) for m in range(n)]
    gc.collect()
    gc.disable()
    try:
        mark = time.thread_time()
        server = Server(terms, directory, range(n), lambda n: Design(k, t, 0))
        out: Outbox | Total | Aborted = server.invite()
        busy = time.thread_time() - mark
        while isinstance(out, Outbox):
            for member, data in out.messages.items():
                if server.stage is Stage.MASKED and member in gone:
                    continue
                mark = time.thread_time()
                answer = encode(clients[member].step(data), terms.digest)
                spent[member] += time.thread_time() - mark
                upload[member] += len(answer)
                mark = time.thread_time()
                server.receive(member, answer)
                busy += time.thread_time() - mark
            mark = time.thread_time()
            out = server.advance()
            busy += time.thread_time() - mark
    finally:
        gc.enable()
    if not isinstance(out, Total) or not np.array_equal(out.words, plain):
        raise SystemExit(f"{case}: {getattr(out, 'why', 'a wrong sum')}")
    stayed = [m for m in range(n) if m not in gone]
    client = statistics.median(spent[m] - unmeasured[m] for m in stayed)
    return Cost(client, busy, max(upload))


def measure_flower(case: Case) -> Cost:
    """The same work by Flower's functions."""
    base = "flwr.common.secure_aggregation."
    shamir: Any = importlib.import_module(base + "crypto.shamir")
    crypto: Any = importlib.import_module(base + "crypto.symmetric_encryption")
    utils: Any = importlib.import_module(base + "secaggplus_utils")
    arithmetic: Any = importlib.import_module(base + "ndarrays_arithmetic")
    quantization: Any = importlib.import_module(base + "quantization")
    ec: Any = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
    n, k, t, d, lost = case
    modulus, shape = 1 << 32, [(d,)]
    key = ec.generate_private_key(ec.SECP384R1())
    delta = np.random.default_rng(0).normal(scale=0.1, size=d)

    mark = time.process_time()
    ec.generate_private_key(ec.SECP384R1())
    ec.generate_private_key(ec.SECP384R1())
    # Its Shamir wants as many shares as members; an odd number of them, itself among them.
    shamir.create_shares(os.urandom(32), t, k + 1)
    shares = shamir.create_shares(os.urandom(185), t, k + 1)
    vector = quantization.quantize([delta], 1.0, 1 << 22)
    mask = utils.pseudo_rand_gen(os.urandom(32), modulus, shape)
    vector = arithmetic.parameters_addition(vector, mask)
    for _ in range(k):
        peer = key.public_key()
        box = crypto.encrypt(crypto.generate_shared_key(key, peer), bytes(250))
        crypto.decrypt(crypto.generate_shared_key(key, peer), box)
        shared = crypto.generate_shared_key(key, peer)
        vector = arithmetic.parameters_addition(
            vector, utils.pseudo_rand_gen(shared, modulus, shape)
        )
    vector = arithmetic.parameters_mod(vector, modulus)
    client = time.process_time() - mark

    def timed(repeat: int, work: Callable[[], object]) -> float:
        start = time.process_time()
        for _ in range(repeat):
            work()
        return (time.process_time() - start) / repeat

    def remove(seed: bytes) -> object:
        return arithmetic.parameters_subtraction(
            vector, utils.pseudo_rand_gen(seed, modulus, shape)
        )

    gone = round(lost * n)
    rebuilt = timed(3, lambda: shamir.combine_shares(shares[:t]))
    survivor = timed(3, lambda: remove(os.urandom(32)))
    pair = timed(3, lambda: remove(crypto.generate_shared_key(key, key.public_key())))
    added = timed(3, lambda: arithmetic.parameters_addition(vector, vector))
    server = n * rebuilt + (n - gone) * (survivor + added) + gone * k * pair
    return Cost(client, server, vector[0].nbytes)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--flower", action="store_true", help="Flower's functions, side by side")
    parser.add_argument("--only", default="", help="n,d of the cases to run, as in 100,1000000")
    options = parser.parse_args()
    only = tuple(int(part) for part in options.only.split(",") if part)
    table = Table("n", "k", "t", "d", "lost", "who", "client CPU s", "server CPU s", "upload MB")
    for case in CASES:
        if only and (case.n, case.d) != only:
            continue
        rows = [("Umbel", measure(case))]
        if options.flower:
            rows.append(("Flower", measure_flower(case)))
        for who, cost in rows:
            head = [str(case.n), str(case.k), str(case.t), str(case.d), f"{case.lost:.0%}", who]
            tail = [f"{cost.client:.4f}", f"{cost.server:.3f}", f"{cost.upload / 1e6:.2f}"]
            table.add_row(*head, *tail)
    Console().print(table)


if __name__ == "__main__":
    main()
