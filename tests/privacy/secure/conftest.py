"""A cohort with known inputs, to run rounds and to attack its members."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from umbel.privacy.secure_aggregation.client import Client
from umbel.privacy.secure_aggregation.client import Setup as ClientSetup
from umbel.privacy.secure_aggregation.identities import Directory, Identity
from umbel.privacy.secure_aggregation.keystream import Words
from umbel.privacy.secure_aggregation.messages import Message, decode, encode
from umbel.privacy.secure_aggregation.parameters import Design, safe_threshold
from umbel.privacy.secure_aggregation.server import Outbox, Server, Setup, Stage
from umbel.privacy.secure_aggregation.terms import Policy, Terms, widest_values


@dataclass
class Cohort:
    terms: Terms
    directory: Directory
    identities: list[Identity]
    policy: Policy
    design: Design
    inputs: list[Words]
    clients: dict[int, Client] = field(default_factory=dict)
    opened: list[int] = field(default_factory=list)  # members whose payload was asked for

    def client(self, member: int, keep: bool = False, setup: ClientSetup | None = None) -> Client:
        def payload() -> Words:
            self.opened.append(member)
            return self.inputs[member]

        identity = self.identities[member]
        return Client(
            member, identity, self.directory, self.terms, self.policy, payload, keep, setup
        )

    def next_round(self) -> Cohort:
        """The same members and inputs, a round later."""
        terms = replace(self.terms, round_number=self.terms.round_number + 1)
        return replace(self, terms=terms, clients={}, opened=[])

    def server(self, setup: Setup | None = None) -> Server:
        design, members = self.design, range(len(self.inputs))
        least = self.policy.min_cohort
        return Server(self.terms, self.directory, members, lambda n: _fit(design, n), least, setup)

    def until(self, kind: type[Message], victim: int = 0) -> Message:
        """Runs an honest round up to the message of ``kind`` that ``victim`` would get next."""
        server = self.server()
        out = server.invite()
        while isinstance(out, Outbox):
            message = decode(out.messages[victim], self.terms.digest)
            if isinstance(message, kind):
                return message
            self.answer(server, out)
            out = server.advance()
        raise AssertionError(f"the round ended before {kind.__name__}: {out}")

    def answer(self, server: Server, out: Outbox) -> None:
        for member, data in out.messages.items():
            answer = self.clients[member].step(data)
            server.receive(member, encode(answer, self.terms.digest))

    def send(self, message: Message, victim: int = 0) -> Message:
        return self.clients[victim].step(encode(message, self.terms.digest))


def _fit(design: Design, n: int) -> Design:
    """The design, or the complete graph with the same safety where fewer answered."""
    k = min(design.neighbours, n - 1)
    if k * n % 2:
        k -= 1
    if k == design.neighbours:
        return design
    return Design(k, safe_threshold(k, 0), 0)


def make_cohort(
    n: int = 5,
    neighbours: int | None = None,
    threshold: int | None = None,
    size: int = 7,
    ring_bits: int = 32,
    corrupt_fraction: float = 0.0,
    seed: int = 0,
    pinned: int | None = None,
) -> Cohort:
    k = n - 1 if neighbours is None else neighbours
    t = safe_threshold(k, 0) if threshold is None else threshold
    rng = np.random.default_rng(seed)
    identities = [Identity.generate() for _ in range(pinned or n)]
    directory = Directory([identity.public_key for identity in identities])
    bits = widest_values(n, ring_bits)
    terms = Terms(b"run-0123456789ab", 4, b"m" * 32, directory.digest, size, ring_bits, bits)
    inputs = [rng.integers(0, 2**bits, size, dtype=np.uint32) for _ in range(n)]
    cohort = Cohort(
        terms, directory, identities, Policy(3, corrupt_fraction), Design(k, t, 0), inputs
    )
    cohort.clients = {m: cohort.client(m) for m in range(n)}
    return cohort


@pytest.fixture(scope="session")
def cohort_of() -> Callable[..., Cohort]:
    return make_cohort


@pytest.fixture(scope="session")
def stages() -> type[Stage]:
    return Stage
