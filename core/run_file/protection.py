"""The tables of what is hidden, and from whom."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field

from umbel.core.settings import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Settings,
    Share,
)


class Privacy(Settings):
    """``[privacy]``: whose presence is hidden, how well, and from whom."""

    unit: Literal["none", "example", "client"] = "none"
    """Whose presence is hidden: one example of a client (DP-SGD at the client), a client with all
    that it holds, or nobody's. A table that says anything else and no unit means ``example``."""
    epsilon: Positive | None = None
    """The budget of each client's data: the run ends before it is passed. Without
    ``noise_multiplier``, the noise is calibrated so that the planned rounds just fit."""
    noise_multiplier: NonNegative | None = None
    """Standard deviation of the noise over ``clip_norm``; ``None``: calibrated to ``epsilon``. 0 is
    no privacy at all."""
    delta: Fraction = 1e-5
    """The probability that the guarantee may fail with; much less than one over the number of
    units."""
    clip_norm: Positive = 1.0
    """Bound on the L2 norm of what one unit contributes: an example's gradient, a client's delta.
    With ``adaptive`` clipping, where it starts."""
    clipping: Literal["flat", "per-layer", "adaptive"] = "flat"
    """``flat``: one bound on the whole; ``per-layer``: shared evenly by the parameters;
    ``adaptive``: follows ``clip_quantile`` of the norms, whose noised count is paid for."""
    clip_quantile: Share = 0.5
    """``adaptive``: the share of units that are not clipped."""
    clip_rate: Positive = 0.2
    """``adaptive``: the geometric rate at which the bound moves."""
    mechanism: Literal[
        "gaussian", "tree", "banded", "distributed-discrete-gaussian", "distributed-skellam"
    ] = "gaussian"
    """What noise: continuous; ``tree`` and ``banded``: drawn for the whole run together, so that
    later rounds take back what earlier ones added (unit ``client``, noise at the server);
    ``distributed-…``: whole numbers, of which each client adds its share under secure aggregation,
    so that the server never sees a sum without noise."""
    separation: Count | None = None
    """``tree``, ``banded``: a client that was asked sits out the next separation - 1 rounds.
    ``None``: as many as leave a cohort to ask."""
    band: Count | None = None
    """``banded``: rounds over which noise is taken back; a server keeps as many draws, less one.
    ``None``: the best power of two up to the separation."""
    place: Literal["server", "client"] = "server"
    """Unit ``client``: who adds the noise. ``client`` (local privacy) hides a delta from the server
    too, and needs much more of it for the same model."""
    accountant: Literal["pld", "rdp"] = "pld"
    """What calibrates and reports: ``pld`` is tighter, ``rdp`` faster. Both are upper bounds."""
    neighbouring: Literal["add-or-remove-one", "replace-one", "zero-out"] = "add-or-remove-one"
    """What a unit's presence means. ``replace-one`` doubles the sensitivity and is not amplified by
    sampling."""
    adversary: Literal["server", "outsider"] = "server"
    """Unit ``client``: who must learn nothing. ``server`` knows who takes part, so that sampling
    clients amplifies nothing. For an ``outsider`` who sees the models alone clients are sampled by
    independent coins, and that amplifies."""
    adversary_because: str = Field("", max_length=500)
    """Why the adversary does not see who takes part; in the ledger. ``outsider`` needs it."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _meant(cls, table: Any) -> Any:
        # Who writes epsilon = 3.0 and no more must not train without any.
        if isinstance(table, dict) and table and "unit" not in table:
            return {"unit": "example", **table}
        return table

    @pydantic.model_validator(mode="after")
    def _complete(self) -> Privacy:
        if self.unit == "none":
            return self
        if self.noise_multiplier is None and self.epsilon is None:
            raise ValueError(
                f"unit = '{self.unit}' needs a budget or a noise; set epsilon = 3.0, or "
                "noise_multiplier = 1.0"
            )
        if not self.delta:
            raise ValueError("delta = 0 is out of reach of Gaussian noise; set delta = 1e-5")
        if self.unit == "example" and (self.place, self.adversary) != ("server", "server"):
            raise ValueError("place and adversary belong to unit = 'client'; remove them")
        if (self.adversary == "outsider") != bool(self.adversary_because.strip()):
            raise ValueError(
                "adversary = 'outsider' and adversary_because belong together; say why the "
                "adversary does not see who takes part, or remove both"
            )
        if self.place == "client" and (self.adversary, self.clipping) != ("server", "flat"):
            raise ValueError(
                "place = 'client' takes adversary = 'server' and clipping = 'flat'; remove the rest"
            )
        if self.adversary == "outsider" and self.neighbouring == "replace-one":
            raise ValueError("sampling is not amplified under 'replace-one'; use another relation")
        self._correlated()
        if self.distributed and (
            (self.unit, self.place, self.adversary) != ("client", "server", "server")
            or self.clipping == "adaptive"
        ):
            raise ValueError(
                f"mechanism = '{self.mechanism}' takes unit = 'client', the default place and "
                "adversary, and no adaptive clipping; remove the rest, or use 'gaussian'"
            )
        return self

    @property
    def distributed(self) -> bool:
        """Whether each client adds a share of the noise, and the server none."""
        return self.unit != "none" and self.mechanism.startswith("distributed")

    @property
    def correlated(self) -> bool:
        """Whether the noise of all rounds is one release."""
        return self.unit != "none" and self.mechanism in ("tree", "banded")

    def _correlated(self) -> None:
        if not self.correlated:
            if self.separation or self.band:
                raise ValueError("separation and band belong to mechanism = 'tree' and 'banded'")
            return
        if (self.unit, self.place) != ("client", "server"):
            raise ValueError(
                f"mechanism = '{self.mechanism}' noises sums over clients at the server; use "
                "unit = 'client' and place = 'server', or mechanism = 'gaussian'"
            )
        if self.adversary != "server":
            raise ValueError(
                f"mechanism = '{self.mechanism}' is for cohorts that are not drawn by coins, which "
                "adversary = 'outsider' asks for; use one of the two"
            )
        if self.clipping == "adaptive":
            raise ValueError(
                f"mechanism = '{self.mechanism}' takes back noise that earlier rounds had, of the "
                "same clip_norm; use clipping = 'flat' or 'per-layer'"
            )
        if self.mechanism == "tree" and self.band:
            raise ValueError("a tree has no band; remove it, or use mechanism = 'banded'")


class SecureAggregation(Settings):
    """``[secure_aggregation]``: the server sees the sum of the updates and nothing else."""

    enabled: bool = False
    """Whether updates, weights and metrics are summed under masks."""
    accounting_only: bool = False
    """Simulation: rounded and summed as under masks, but without them. The same numbers for less
    work; no site takes part in it."""
    min_cohort: int = Field(3, ge=3, le=65535)
    """The fewest clients of a sum; a round that keeps fewer has no result."""
    corrupt_fraction: Fraction = 0.1
    """The share of a cohort that may help a hostile server."""
    dropout_fraction: Fraction = 0.1
    """The share of a cohort that may vanish without the end of the round."""
    neighbours: Count | None = None
    """Clients that each shares masks with; ``None``: what the two fractions ask for."""
    threshold: Count | None = None
    """Neighbours that must stay and agree; ``None``: what the two fractions ask for. One that is
    not safe is refused."""
    bits: int = Field(32, ge=16, le=32)
    """Sums are taken modulo 2 to the power of this; fewer bits are a smaller upload."""
    clip: Positive = 4.0
    """Each number of a delta, times the client's share of ``max_weight``, is clipped to ±clip."""
    buffer_clip: Positive = 1024.0
    """The same for buffers, such as running statistics and counters."""
    metric_clip: Positive = 100.0
    """The same for training metrics."""
    groups: Count = 1
    """Random groups of a cohort, each summed by itself: robust strategies see the groups' sums."""
    keep_setup: bool = False
    """Rounds of the same clients keep graph and agreed keys, 100 rounds at most; masks are new."""

    @pydantic.model_validator(mode="after")
    def _meant(self) -> SecureAggregation:
        # Who writes min_cohort = 20 and no more must not send updates in clear.
        if self.model_fields_set and "enabled" not in self.model_fields_set:
            raise ValueError("nothing says whether it is on; set enabled = true, or false")
        return self
