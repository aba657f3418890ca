"""The ledger: what was spent, written down before it is spent, and a budget that it will not pass.

One ledger per (site, data-set version) at the client, and one at the server. A debit is durable
before it is confirmed; whoever runs a mechanism asks first and runs it only on the answer. A
process that is killed in between has paid for nothing: that overcounts. Nothing is ever refunded.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from umbel.core.errors import InputError, RefusedError, RunError
from umbel.privacy.accounting import (
    F64,
    Accountant,
    Epsilon,
    History,
    check_delta,
    epsilon,
    pld_epsilon,
    rdp_total,
    to_epsilon,
)
from umbel.privacy.entries import EVERY_CLIENT, Entry, Line, chain
from umbel.privacy.ledger_file import FIRST, LedgerFile, described
from umbel.privacy.mechanisms import Gaussian, Mechanism, Relation, Unit, dump, parse


class Spent(NamedTuple):
    """The answer to a debit.

    Args:
        client: who paid.
        epsilon: an upper bound over everything that this client's data was used for, this debit
            included: by RDP, or the budget where only PLD keeps within it. It never decreases.
        delta: the ledger's.
        fresh: False where the entry stood there already: the mechanism must not be run with new
            noise for it.
    """

    client: str
    epsilon: float
    delta: float
    fresh: bool


class _Account:
    """What one client has spent: how often each mechanism ran.

    The divergences are those of the mechanisms, which clients share, times the counts: a hundred
    thousand clients are a hundred thousand small counters.
    """

    __slots__ = ("history",)

    def __init__(self) -> None:
        self.history: Counter[Mechanism] = Counter()

    @property
    def rdp(self) -> F64:
        """The Renyi divergences, shape (orders,)."""
        return rdp_total(self.history)

    def add(self, mechanism: Mechanism, steps: int) -> None:
        self.history[mechanism] += steps

    def plus(self, other: _Account) -> _Account:
        both = _Account()
        both.history = self.history + other.history
        return both


class Ledger:
    """An append-only, durable account of privacy; several processes may hold the same one.

    Args:
        path: of its file; made when it is missing.
        owner: what it is the ledger of, such as ``site-a/heart-2024``; fixed for ever.
        unit: whose presence is hidden; fixed for ever: units do not add up.
        relation: the neighbouring relation; fixed for ever.
        delta: at which epsilon is bounded.
        budget: the most epsilon at that delta, for each client; ``None``: no limit.
        planned: client -> what it will have spent when all goes as planned. Who is within a plan
            that is within the budget needs no PLD of its own.

    Raises:
        InputError: the file is another ledger's, or cannot be written; or a number is out of
            bounds.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        owner: str,
        unit: Unit,
        relation: Relation,
        delta: float,
        budget: float | None = None,
        planned: Callable[[str], History] | None = None,
    ) -> None:
        check_delta(delta)
        if budget is not None and not (budget > 0 and math.isfinite(budget)):
            raise InputError(
                f"a budget of epsilon {budget}", where="ledger", fix="give a positive number"
            )
        self.owner, self.unit, self.relation = owner, unit, relation
        self.delta, self.budget = delta, budget
        self._planned = planned or (lambda client: {})
        about = {"owner": owner, "unit": unit, "relation": relation}
        self._file = LedgerFile(Path(path), about)
        self._lock = threading.RLock()
        self._last = 0
        self._shared = _Account()
        self._accounts: dict[str, _Account] = {}

    @classmethod
    def opened(cls, path: Path, delta: float) -> Ledger:
        """The ledger that lies at ``path``, whatever it is of; without a budget.

        Raises:
            InputError: there is none.
        """
        about = described(path)
        unit: Any = about.get("unit")
        relation: Any = about.get("relation")
        owner = about.get("owner", "")
        return cls(path, owner=owner, unit=unit, relation=relation, delta=delta)

    def debit(self, entry: Entry, run_budget: float | None = None) -> Spent:
        """Writes ``entry`` down, durably, before it returns.

        Args:
            entry: what is about to run.
            run_budget: the most epsilon that the entry's run may spend of this ledger, at its
                delta; ``None``: no bound but the ledger's own.

        Raises:
            RefusedError: it would pass a budget. Nothing is spent; the refusal is noted.
            InputError: the entry has another unit or relation, or other values stand under its key.
            RunError: the file failed: nothing may be released.
        """
        return self.debit_all([entry], run_budget)[0]

    def debit_all(self, entries: Sequence[Entry], run_budget: float | None = None) -> list[Spent]:
        """As :meth:`debit`, for all or none: one refusal refuses the lot."""
        for entry in entries:
            self._check(entry)
        if len({entry.key for entry in entries}) < len(entries):
            raise InputError(
                "one key twice in one debit",
                where=entries[0].where,
                fix="debit once, for all steps of a round",
            )
        seconds = int(time.time())
        with self._lock:
            try:
                return self._write(entries, seconds, run_budget)
            except RefusedError as refusal:
                with self._file.write() as connection:
                    self._file.refuse(connection, refusal.where, refusal.message, seconds)
                raise

    def affords(self, entries: Sequence[Entry]) -> bool:
        """Whether a debit of ``entries`` would keep the budget now; nothing is spent or noted."""
        self._look()
        try:
            self._after(entries)
        except RefusedError:
            return False
        return True

    def _write(
        self, entries: Sequence[Entry], seconds: int, run_budget: float | None
    ) -> list[Spent]:
        with self._file.write() as connection:
            self._refresh(*self._file.spending(connection, self._last))
            standing = self._file.standing(connection, entries)
            for entry in entries:
                if standing.get(entry.key, entry) != entry:
                    raise InputError(
                        "the ledger has other values under this key",
                        where=entry.where,
                        fix="give another attempt its own word",
                    )
            fresh = [e for e in entries if e.key not in standing]
            if run_budget is not None:
                self._keep_run_budget(list(self._file.lines(connection)), fresh, run_budget)
            after = self._after(fresh)
            self._file.append(connection, [(e, dump(e.mechanism)) for e in fresh], seconds)
        accounts = [after.get(e.client) or self._account(e.client) for e in entries]
        return [
            Spent(e.client, spent, self.delta, e.key not in standing)
            for e, spent in zip(entries, self._bounds(accounts), strict=True)
        ]

    def clients(self) -> list[str]:
        """Who has entries of their own, in lexicographic order."""
        self._look()
        return sorted(self._accounts)

    def epsilon(self, client: str | None = None, accountant: Accountant = "rdp") -> Epsilon:
        """What ``client`` has spent, or the most that any has: never a mean.

        A client that sat out has spent nothing but what every client pays.

        Args:
            client: one client, or ``None`` for the maximum.
            accountant: ``rdp`` at once; ``pld`` tighter, in a second or so.
        """
        self._look()
        if client is not None:
            return epsilon(self._account(client).history, self.delta, accountant)
        return self._headline(accountant)[0]

    def report(self, accountant: Accountant = "pld") -> dict[str, Any]:
        """All that a reader needs to judge the guarantee, as plain values."""
        self._look()
        headline, client = self._headline(accountant)
        count, steps = 0, 0
        purposes: Counter[str] = Counter()
        generators, reasons = set[str](), set[str]()
        with self._file.read() as connection:
            head = self._file.head(connection).hex()
            refusals = self._file.refusals(connection)
            for line in self._file.lines(connection):
                entry, mechanism = line.entry, line.entry.mechanism
                count += 1
                steps += entry.steps
                purposes[entry.purpose] += 1
                generators.add(entry.generator)
                if isinstance(mechanism, Gaussian) and mechanism.sampling.accounted_rate < 1:
                    reasons.add(mechanism.sampling.hidden_because)
        return {
            "owner": self.owner,
            "unit": self.unit,
            "relation": self.relation,
            "epsilon": headline.epsilon,
            "delta": self.delta,
            "accountant": headline.accountant,
            "client": client,
            "budget": self.budget,
            "clients": len(self._accounts),
            "entries": count,
            "steps": steps,
            "purposes": dict(purposes),
            "generators": sorted(generators),
            "amplified_because": sorted(reasons),
            "refusals": refusals,
            "head": head,
        }

    def lines(self) -> list[Line]:
        """Every line, oldest first."""
        with self._file.read() as connection:
            return list(self._file.lines(connection))

    def head(self) -> str:
        """The digest of the last line: in a run's record, it tells if lines were cut off."""
        with self._file.read() as connection:
            return self._file.head(connection).hex()

    def verify(self, head: str | None = None) -> int:
        """Checks every digest, and that ``head`` still stands somewhere; the number of lines.

        Raises:
            RunError: a line was changed, taken out or put in, or the line of ``head`` is gone.
        """
        digest, count, seen = FIRST, 0, head in (None, FIRST.hex())
        for line in self.lines():
            digest = chain(digest, line.seconds, line.entry)
            count += 1
            seen = seen or digest.hex() == head
            if digest != line.digest:
                raise self._damaged(f"line {line.number} is not what was written")
        if not seen:
            raise self._damaged(f"no line has the digest {head}: its end is missing")
        return count

    def _damaged(self, message: str) -> RunError:
        return RunError(
            message,
            where=str(self._file.path),
            fix="take it as tampered with: restore the newest backup, and count what followed it",
        )

    def _check(self, entry: Entry) -> None:
        for name in ("unit", "relation"):
            mine, other = getattr(self, name), getattr(entry, name)
            if mine != other:
                raise InputError(
                    f"an entry of {name} '{other}' in a ledger of {name} '{mine}'",
                    where=entry.where,
                    fix="keep one ledger for each",
                )

    def _look(self) -> None:
        with self._lock, self._file.read() as connection:
            self._refresh(*self._file.spending(connection, self._last))

    def _refresh(self, last: int, spending: Sequence[tuple[str, str, int]]) -> None:
        # What others wrote, and what this process wrote: the file alone says what was spent.
        for client, mechanism, steps in spending:
            account = self._shared
            if client != EVERY_CLIENT:
                account = self._accounts.setdefault(client, _Account())
            account.add(parse(mechanism), steps)
        self._last = last

    def _account(self, client: str) -> _Account:
        own = self._accounts.get(client)
        return self._shared if own is None else own.plus(self._shared)

    def _after(self, entries: Sequence[Entry]) -> dict[str, _Account]:
        """The accounts that ``entries`` touch, as they would be.

        Raises:
            RefusedError: one would pass the budget.
        """
        extra: dict[str, _Account] = {}
        for entry in entries:
            extra.setdefault(entry.client, _Account()).add(entry.mechanism, entry.steps)
        everyone = extra.pop(EVERY_CLIENT, None)
        touched = set(extra) | (set(self._accounts) | {EVERY_CLIENT} if everyone else set())
        after = {}
        for client in touched:
            account = self._account(client)
            for more in (extra.get(client), everyone):
                account = account if more is None else account.plus(more)
            after[client] = account
        self._keep_budget(after, entries)
        return after

    def _keep_budget(self, after: dict[str, _Account], entries: Sequence[Entry]) -> None:
        if self.budget is None or not after:
            return
        names = sorted(after)
        online = to_epsilon(np.stack([after[n].rdp for n in names]), self.delta)
        for i in np.flatnonzero(~(online <= self.budget)):
            name = names[i]
            if self._within_plan(name, after[name].history):
                continue
            would = min(float(online[i]), pld_epsilon(after[name].history, self.delta))
            if would <= self.budget:
                continue
            now = epsilon(self._account(name).history, self.delta).epsilon
            entry = next((e for e in entries if e.client == name), entries[0])
            raise RefusedError(
                f"epsilon would be {would:.4g}, the budget is {self.budget:g} at delta "
                f"{self.delta:g}, and {now:.4g} is spent",
                where=entry.where,
                fix="keep the model that there is; more needs a larger budget, or data that "
                "was not used before",
            )

    def _keep_run_budget(
        self, lines: Sequence[Line], entries: Sequence[Entry], budget: float
    ) -> None:
        for entry in entries:
            mine = _Account()
            for before in (*(line.entry for line in lines), entry):
                if (before.run, before.client) == (entry.run, entry.client):
                    mine.add(before.mechanism, before.steps)
            if epsilon(mine.history, self.delta, "rdp").epsilon <= budget:
                continue
            if (would := pld_epsilon(mine.history, self.delta)) > budget:
                raise RefusedError(
                    f"the run declares epsilon {budget:g}, and with this round it would have spent "
                    f"{would:.4g} of these data at delta {self.delta:g}",
                    where=entry.where,
                    fix="ask its server: its noise is too low for what it declares",
                )

    def _within_plan(self, client: str, history: History) -> bool:
        plan = self._planned(client)
        if not plan or any(times > plan.get(m, 0) for m, times in history.items()):
            return False
        assert self.budget is not None
        return pld_epsilon(plan, self.delta) <= self.budget

    def _bounds(self, accounts: Sequence[_Account]) -> list[float]:
        if not accounts:
            return []
        online = to_epsilon(np.stack([a.rdp for a in accounts]), self.delta)
        # Above the budget by RDP, PLD has proven it below; so the figure never goes back.
        return [min(found, self.budget or math.inf) for found in online.tolist()]

    def _headline(self, accountant: Accountant) -> tuple[Epsilon, str]:
        names = [EVERY_CLIENT, *sorted(self._accounts)]
        online = to_epsilon(np.stack([self._account(n).rdp for n in names]), self.delta)
        best, who = Epsilon(-1.0, self.delta, accountant), EVERY_CLIENT
        for i in np.argsort(-online, kind="stable"):
            # PLD's answer is never above RDP's: who is behind by RDP cannot get ahead.
            if online[i] <= best.epsilon:
                break
            found = epsilon(self._account(names[i]).history, self.delta, accountant)
            if found.epsilon > best.epsilon:
                best, who = found, names[i]
        return best, who
