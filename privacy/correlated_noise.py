"""The noise of a run's rounds, drawn together: what one round adds, a later one takes back.

For client-level privacy where cohorts are not drawn by independent coins. The whole run is ONE
Gaussian release, debited before round 1; then rounds may follow in any number up to the plan. All
draws are functions of (secret, round), so that a resumed run goes on with the noise it had: with
other noise the difference of the two would give the sums away.

Two mechanisms: ``tree`` (Kairouz et al. 2021, arXiv:2103.00039), and ``banded`` matrix
factorisation (Choquette-Choo et al. 2023, arXiv:2306.08153), whose prefix sums have less noise
wherever clients come back.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.trees import Tree
from umbel.privacy import matrix_factorisation, tree_aggregation
from umbel.privacy.clipping import check_clip_norm
from umbel.privacy.matrix_factorisation import WHERE, Participation
from umbel.privacy.mechanisms import Factorisation, Factorised, Relation
from umbel.privacy.noise import normals
from umbel.privacy.streams import Generator, keyed_stream

Kind: TypeAlias = Factorisation


@dataclass(frozen=True)
class Correlated:
    """The plan of a run's noise; :meth:`mechanism` is what the ledger debits for all of it.

    Args:
        kind: ``tree`` or ``banded``.
        who: how often a client takes part; whoever samples has to keep to it.
        clip_norm: bound on a client's contribution to the sum of a round, in its units.
        noise_multiplier: std / sensitivity of the one release.
        band: ``banded``: how many coefficients; ``None``: the best power of two up to the
            separation. A round needs memory for one draw less.

    Raises:
        InputError: a number is out of bounds.
    """

    kind: Kind
    who: Participation
    clip_norm: float
    noise_multiplier: float
    band: int | None = None

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        self.mechanism()
        if self.band is not None and self.band < 1:
            raise InputError(f"a band of {self.band}", where=WHERE, fix="give at least 1")

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Of the band; the tree has none."""
        if self.kind == "tree":
            return ()
        if self.band is not None:
            return matrix_factorisation.square_root(self.band)
        return matrix_factorisation.best_band(self.who)

    @property
    def std(self) -> float:
        """Of each independent draw, in the units of the sum."""
        if self.kind == "tree":
            reach = tree_aggregation.sensitivity(self.who)
        else:
            reach = matrix_factorisation.sensitivity(self.coefficients, self.who)
        return self.noise_multiplier * self.clip_norm * reach

    def mechanism(self, relation: Relation = "add-or-remove-one") -> Factorised:
        """One release, for all rounds together; sampling amplifies nothing."""
        who = self.who
        return Factorised(
            self.kind, self.noise_multiplier, who.rounds, who.separation, who.times, relation
        )


class CorrelatedNoise:
    """Adds the noise of a plan to the sums of a run's rounds.

    Args:
        plan: of the run.
        secret: 32 bytes, the same for all of a run: of ``os.urandom``, kept where the ledger is.
        generator: ``seeded`` where the secret is not of the operating system.

    Raises:
        InputError: the secret has another length.
    """

    def __init__(self, plan: Correlated, secret: bytes, generator: Generator = "os") -> None:
        if len(secret) != 32:
            raise InputError(
                f"a secret of {len(secret)} bytes", where=WHERE, fix="use os.urandom(32)"
            )
        self.plan, self.generator, self._secret = plan, generator, secret
        self._std, self._band = plan.std, torch.tensor(plan.coefficients, dtype=torch.float64)
        self._past: deque[Tensor] = deque(maxlen=max(1, len(self._band) - 1))
        self._round, self._size = 0, -1

    def add(self, total: Tree, round_number: int, since: int | None = None) -> dict[str, Tensor]:
        """The sum of a round's clipped contributions, noised: what may leave.

        Args:
            total: name -> (*shape), finite floating point.
            round_number: 1 … the plan's rounds.
            since: the last round whose noisy sum was used; ``None``: the one before. Rounds in
                between (a quorum missed) count: their noise is in this sum, too.

        Raises:
            InputError: beyond the plan, not after ``since``, or not finite floating point.
        """
        since = round_number - 1 if since is None else since
        if not 0 <= since < round_number <= self.plan.who.rounds:
            raise InputError(
                f"round {round_number} after {since} of {self.plan.who.rounds}",
                where=WHERE,
                fix="plan as many rounds as there shall be, and use each once",
            )
        for name, tensor in total.items():
            if not tensor.dtype.is_floating_point or not bool(tensor.isfinite().all()):
                raise InputError(
                    f"'{name}' is not finite floating point",
                    where="noise",
                    fix="clip before noise is added; integers are sent without",
                )
        names = sorted(total)
        sizes = [total[name].numel() for name in names]
        parts = torch.split(self._between(since, round_number, sum(sizes)), sizes)
        drawn = dict(zip(names, parts, strict=True))
        return {name: self._noisy(t, drawn[name]) for name, t in total.items()}

    def _noisy(self, tensor: Tensor, noise: Tensor) -> Tensor:
        if not self._std:
            return tensor.clone()
        # A grid that does not depend on the data, as in umbel.privacy.noise.
        grid = 2.0 ** (math.floor(math.log2(self._std)) - 20)
        noisy = tensor.double() + noise.view(tensor.shape).to(tensor.device)
        return noisy.div_(grid).round_().mul_(grid).to(tensor.dtype)

    def _between(self, since: int, until: int, size: int) -> Tensor:
        """The noise of the rounds after ``since`` up to ``until``, (size,) float64."""
        if self.plan.kind == "banded":
            return self._band_between(since, until, size)
        before, after = tree_aggregation.nodes(since), tree_aggregation.nodes(until)
        noise = torch.zeros(size, dtype=torch.float64)
        for level, i in sorted(after - before):
            noise += self._draw("node", level, i, size)
        for level, i in sorted(before - after):
            noise -= self._draw("node", level, i, size)
        return noise

    def _band_between(self, since: int, until: int, size: int) -> Tensor:
        """Solves C w = z row by row: w_t = (z_t - sum_j c_j w_{t-j}) / c_0."""
        if size != self._size or self._round > since:  # from the beginning, as in a resumed run
            self._past.clear()
            self._round, self._size = 0, size
        noise = torch.zeros(size, dtype=torch.float64)
        while self._round < until:
            self._round += 1
            own = self._draw("round", self._round, 0, size)
            for c, past in zip(self._band[1:].tolist(), self._past, strict=False):
                own.sub_(past, alpha=c)
            own.div_(float(self._band[0]))
            if len(self._band) > 1:
                self._past.appendleft(own)
            if self._round > since:
                noise += own
        return noise

    def _draw(self, purpose: str, level: int, place: int, size: int) -> Tensor:
        stream = keyed_stream(self._secret, self.generator, purpose, level, place)
        return normals(stream, size).mul_(self._std)
