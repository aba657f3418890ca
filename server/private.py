"""Privacy in the round loop: who may be asked, what it costs, and how updates are combined."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umbel.core.errors import RefusedError
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, Tree, map_tree
from umbel.core.versions import versions
from umbel.privacy.accounting import History
from umbel.privacy.adaptive_clipping import AdaptiveClip, count_std, split
from umbel.privacy.clipping import zeroing
from umbel.privacy.entries import EVERY_CLIENT, Entry
from umbel.privacy.ledger import Ledger
from umbel.privacy.noise import normals
from umbel.privacy.participation import Release, correlated, release
from umbel.privacy.sources import Sources
from umbel.server import private_plan
from umbel.server.private_noise import Released, RunNoise
from umbel.server.private_plan import Sizes, finite
from umbel.server.private_sum import Parts, Terms, check_mean, private_sum
from umbel.server.sampling import cohort_size
from umbel.strategies.parts import Combined, ServerState, Strategy

LEDGER = "ledger.db"
"""In the run's folder."""

KEPT = "privacy"
"""Where the server's state has the clip norm, and the last round that had a result."""


class Guard:
    """Keeps the promises of ``[privacy]`` in one run.

    Args:
        run: calibrated: it states a noise multiplier.
        strategy: what it names.
        model: the initial model, of what travels.
        clients: the federation's.
        sizes: how many examples each declares.
        sources: of the server's randomness.
        folder: of the run; its ledger is there.
        run_id: of the run.

    Raises:
        InputError: the strategy cannot be made private, or the ledger is another run's.
    """

    def __init__(
        self,
        run: RunFile,
        strategy: Strategy,
        model: Model,
        clients: Sequence[str],
        sizes: Sizes,
        sources: Sources,
        folder: Path,
        run_id: str,
    ) -> None:
        section = run.privacy
        assert section.unit != "none"
        assert section.noise_multiplier is not None
        private_plan.check(run, len(clients))
        self._central = section.unit == "client" and section.place == "server"
        if section.unit == "client":
            check_mean(strategy, run.strategy.name, model.params)
        self._run, self._strategy, self._section = run, strategy, section
        self._z = section.noise_multiplier
        self._clients, self._sizes, self._sources = clients, sizes, sources
        self._buffers = frozenset(model.buffers)
        self._names = [*model.params, *strategy.upload_template(model.params)]
        self._rate = private_plan.cohort_rate(run, len(clients))
        self._expected = float(cohort_size(run.strategy, len(clients)))
        self._generator = sources(0, "server").generator
        # Real noise is drawn anew when a killed run repeats a round: that is another release. What
        # is seeded comes out the same, to the bit.
        self._attempt = "1" if self._generator == "seeded" else secrets.token_hex(8)
        self._since = 0
        self._noise: RunNoise | None = None
        if section.correlated:  # one release for all rounds, whose noise is never drawn anew
            self._attempt = "1"
        self._run_id = run_id
        self._places: dict[str, int] | None = None
        self._plans: dict[Release, History] = {}
        for load in private_plan.loads(run, sizes):
            found = release(run, self._z, load.n, self._rate)
            self._plans[found] = {found.mechanism: found.steps * load.rounds}
        self._versions = _versions()
        self.clip_norm = section.clip_norm
        self.exhausted = False
        self._adaptive: AdaptiveClip | None = None
        if self._central and section.clipping == "adaptive":
            self._adaptive = AdaptiveClip(section.clip_quantile, section.clip_rate)
        self._path = folder / LEDGER
        self._ledger = Ledger(
            self._path,
            owner=f"run {run_id}",
            unit=section.unit,
            relation=section.neighbouring,
            delta=section.delta,
            budget=section.epsilon,
            planned=self._planned,
        )
        self._spent = self._ledger.epsilon().epsilon
        if section.correlated:
            plan = correlated(run, self._z)
            self._noise = RunNoise(plan, folder, sources, clients, self._begun())

    def asked(self, number: int) -> list[str]:
        """Who is asked in a round: nobody, where its result was given out before a crash."""
        if self._released(number) is not None:
            return []
        return private_plan.asked(self._run, self._clients, number, self._sources)

    def spend(self, number: int, asked: Sequence[str]) -> float | None:
        """Debits a round, durably, before anybody trains.

        Returns:
            the most epsilon that any client has spent, this round included; an upper bound.
            ``None``: no finite one.
        Raises:
            RefusedError: somebody would pass the budget; :attr:`exhausted` then says so. Nothing is
                spent.
        """
        if self._noise is not None and self._begun():
            return self._whole_run()
        try:
            spent = self._ledger.debit_all(self._entries(number, asked))
        except RefusedError:
            self.exhausted = True
            raise
        if self._noise is not None:
            return self._whole_run()
        self._spent = max([self._spent, *(found.epsilon for found in spent)])
        return finite(self._spent)

    def _whole_run(self) -> float | None:
        # All rounds are one release, paid for before the first: the same figure in each.
        self._spent = self._ledger.epsilon(accountant="pld").epsilon
        return finite(self._spent)

    def _begun(self) -> bool:
        return bool(self._ledger.lines())

    def last(self, number: int) -> bool:
        """Whether the budget leaves no round after this one."""
        if self._section.epsilon is None or self._noise is not None:
            return False
        return not self._ledger.affords(self._entries(number + 1, self.asked(number + 1)))

    def quorum(self, quorum: int, number: int) -> int:
        """Updates without which a round has no result; none where a missing result would tell."""
        hidden = self._section.adversary == "outsider"
        return 0 if hidden or self._released(number) is not None else quorum

    def note(self, number: int) -> str:
        """What a reader of the round's record should know."""
        if self._released(number) is None:
            return ""
        return "its result was given out before this process began: nobody was asked again"

    def wanted(self, wanted: int, asked: Sequence[str]) -> int:
        """How many updates are enough."""
        return len(asked) if self._section.adversary == "outsider" else wanted

    def restore(self, state: ServerState) -> None:
        """Takes up clip norm and noise where a resumed run had them."""
        if KEPT in state:
            self.clip_norm = float(state[KEPT]["clip_norm"])
            self._since = int(state[KEPT]["since"])

    def keep(self, state: ServerState) -> ServerState:
        """The server's state with what a resumed run needs."""
        if self._adaptive is None and self._noise is None:
            return state
        kept = {"clip_norm": self.clip_norm, "since": float(self._since)}
        tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in kept.items()}
        return {**state, KEPT: tensors}

    def terms(self, number: int) -> Terms:
        """How the updates of a round are combined."""
        if not self._central:
            return Terms(self._strategy.combine, None)
        cap = self._run.strategy.max_weight if self._run.strategy.weights == "examples" else 1.0
        clip = zeroing(self.clip_norm, self._names, self._section.clipping == "per-layer")
        parts = Parts(clip, self._buffers, cap or 1.0)

        def finish(total: Tree, short: int, came: int) -> Combined:
            return self._finish(number, total, short, came)

        return Terms(private_sum(parts, finish), parts)

    def _finish(self, number: int, total: Tree, short: int, came: int) -> Combined:
        """The noised sum over the fixed denominator; moves the clip norm for the next round."""
        released = {n: t for n, t in total.items() if n not in self._buffers}
        if self._noise is not None:
            found = self._released(number)
            if found is None:
                found = Released(self._noise.add(released, number, self._since, came), came)
            self._since = number
            return self._over_cohort(total, found.tree, found.came)
        if self._section.distributed:  # each client has added its share
            return self._over_cohort(total, released, came)
        source = self._sources(number, "server")
        noise, bits = self._z, 0.0
        if self._adaptive is not None:
            noise, bits = split(self._z, count_std(self._z, self._expected))
        noisy = source.add_gaussian(released, noise * self.clip_norm)
        if self._adaptive is not None:
            drawn = bits * float(normals(source.stream, 1)[0])
            self.clip_norm = self._adaptive.update(
                self.clip_norm, short - came / 2 + drawn, self._expected
            )
        return self._over_cohort(total, noisy, came)

    def _over_cohort(self, total: Tree, noisy: Tree, came: int) -> Combined:
        """What was noised over the fixed denominator; buffers stay."""
        whole = {n: noisy[n] if n in noisy else torch.zeros_like(t) for n, t in total.items()}
        delta: dict[str, Tensor] = map_tree(lambda t: t / self._expected, whole)
        return Combined(delta, self._expected, came)

    def _released(self, number: int) -> Released | None:
        return None if self._noise is None else self._noise.released(number)

    def end(self) -> None:
        """Deletes what only further rounds would need."""
        if self._noise is not None:
            self._noise.forget()

    def report(self) -> dict[str, Any]:
        """What was spent, by the tightest accountant, as plain values."""
        table = private_plan.describe(self._run, self._sizes, self._generator)
        assert table is not None
        found = self._ledger.report(self._section.accountant)
        return {
            **table,
            "epsilon": finite(found["epsilon"]),
            "planned_epsilon": table["epsilon"],
            "accountant": found["accountant"],
            "clip_norm": self.clip_norm,
            "client": found["client"],
            "entries": found["entries"],
            "amplified_because": found["amplified_because"],
            "ledger": str(self._path),
            "head": found["head"],
            "outside": list(OUTSIDE[self._section.unit]),
        }

    def _payers(self, asked: Sequence[str]) -> Sequence[str]:
        """Whose data pay: those who were asked; or everybody, where nobody sees who was, and where
        all rounds are one release."""
        together = self._section.adversary == "outsider" or self._section.correlated
        return [EVERY_CLIENT] if together else asked

    def _entries(self, number: int, asked: Sequence[str]) -> list[Entry]:
        return [self._entry(number, client) for client in self._payers(asked)]

    def _entry(self, number: int, client: str) -> Entry:
        found = release(self._run, self._z, self._examples(client), self._rate)
        return Entry(
            run=self._run_id,
            round=1 if self._section.correlated else number,
            client=client,
            unit="client" if self._section.unit == "client" else "example",
            relation=self._section.neighbouring,
            mechanism=found.mechanism,
            steps=found.steps,
            clip_norm=self.clip_norm,
            delta=self._section.delta,
            generator=self._generator,
            attempt=self._attempt,
            versions=self._versions,
        )

    def _planned(self, client: str) -> History:
        """What a client will have spent when all planned rounds are done, at the most."""
        n = 1 if client == EVERY_CLIENT else self._examples(client)
        return self._plans.get(release(self._run, self._z, n, self._rate), {})

    def _examples(self, client: str) -> int:
        if self._section.unit == "client":
            return 1
        if self._places is None:
            self._places = {name: place for place, name in enumerate(self._clients)}
        return int(self._sizes[self._places[client]])


OUTSIDE: Mapping[str, Sequence[str]] = {
    "example": (
        "how many examples a client holds, and that it takes part",
        "figures on the clients' own test examples",
    ),
    "client": (
        "that a client takes part, where the adversary is the server",
        "figures on the clients' own test examples",
    ),
}
"""What the guarantee does not cover, by unit."""


def _versions() -> dict[str, str]:
    found = versions()
    return {name: str(found[name]) for name in ("umbel", "torch") if name in found}
