"""A line of the ledger: one mechanism, and all that is needed to count and to audit it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from umbel.core.errors import InputError
from umbel.privacy.mechanisms import Factorised, Gaussian, Mechanism, Relation, Unit, parse
from umbel.privacy.streams import Generator

EVERY_CLIENT = "*"
"""The client of an entry that everyone pays for: a release from a hidden sample of all clients."""


@dataclass(frozen=True)
class Entry:
    """A debit.

    Its key is (run, round, client, purpose, attempt). The same key twice is one debit, so that a
    caller who did not hear the answer may ask again. It must not let noise be drawn *again*: work
    that is repeated after a crash, with fresh noise, is a second release and needs a new attempt.

    Args:
        run: the run's id.
        round: of that run.
        client: whose units pay; :data:`EVERY_CLIENT`: all of the ledger's.
        unit: whose presence the mechanism hides.
        relation: the neighbouring relation.
        mechanism: one release.
        steps: how many releases at most; what is not taken is not refunded. > 0.
        clip_norm: bound on one unit's contribution, in the parameters' units.
        delta: at which the run states its epsilon.
        generator: of the noise; ``seeded`` protects nobody.
        purpose: what is released: ``training``, ``metrics``, ``tuning``, …
        attempt: one word a try at running the mechanism.
        versions: name -> version of what computes it.

    Raises:
        InputError: a value contradicts another.
    """

    run: str
    round: int
    client: str
    unit: Unit
    relation: Relation
    mechanism: Mechanism
    steps: int
    clip_norm: float
    delta: float
    generator: Generator
    purpose: str = "training"
    attempt: str = "1"
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise self._wrong(f"{self.steps} steps", "debit the most that may be taken, at least 1")
        if not self.client:
            raise self._wrong("no client is named", f"name one, or '{EVERY_CLIENT}' for all")
        own = self.relation
        if isinstance(self.mechanism, Gaussian | Factorised):
            own = self.mechanism.relation
        if own != self.relation:
            raise self._wrong(
                f"relation '{self.relation}' over a mechanism of '{own}'",
                "use one neighbouring relation",
            )

    @property
    def key(self) -> tuple[str, int, str, str, str]:
        """What makes a debit the same debit."""
        return self.run, self.round, self.client, self.purpose, self.attempt

    @property
    def where(self) -> str:
        """For errors."""
        who = "every client" if self.client == EVERY_CLIENT else f"client '{self.client}'"
        return f"run '{self.run}', round {self.round}, {who}"

    @cached_property
    def terms(self) -> str:
        """All but the key and the steps, as canonical text: the same over most of a run."""
        table: dict[str, Any] = {
            "unit": self.unit,
            "relation": self.relation,
            "mechanism": self.mechanism.table(),
            "clip_norm": self.clip_norm,
            "delta": self.delta,
            "generator": self.generator,
            "versions": dict(self.versions),
        }
        return _canonical(table)

    def _wrong(self, message: str, fix: str) -> InputError:
        return InputError(message, where=self.where, fix=fix)


class Line(NamedTuple):
    """An entry as it stands in the ledger.

    Args:
        number: 1, 2, …
        seconds: when, since 1970.
        digest: over this line and the digest of the one before.
    """

    number: int
    seconds: int
    entry: Entry
    digest: bytes


def read(key: tuple[str, int, str, str, str], steps: int, terms: str) -> Entry:
    """The inverse of :attr:`Entry.key`, ``steps`` and :attr:`Entry.terms`."""
    run, round_number, client, purpose, attempt = key
    table = json.loads(terms)
    return Entry(
        run=run,
        round=round_number,
        client=client,
        unit=table["unit"],
        relation=table["relation"],
        mechanism=parse(_canonical(table["mechanism"])),
        steps=steps,
        clip_norm=table["clip_norm"],
        delta=table["delta"],
        generator=table["generator"],
        purpose=purpose,
        attempt=attempt,
        versions=table["versions"],
    )


def chain(before: bytes, seconds: int, entry: Entry) -> bytes:
    """The digest of a line: SHA-256 over the digest before it and all that the line says."""
    text = _canonical([before.hex(), seconds, *entry.key, entry.steps, entry.terms])
    return hashlib.sha256(text.encode()).digest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
