"""The tables of what a study adds to a run: experiences, attacks, a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from pydantic import Field

from umbel.core.run_file.tables import Open, Part
from umbel.core.settings import (
    Count,
    Natural,
    Positive,
    Settings,
    Share,
    parse,
)


class Continual(Settings):
    """``[continual]``: the examples come in stages, one experience after another."""

    experiences: Count = 1
    """How many; ``[run] rounds`` is divided evenly among them. 1: all examples are there at once.
    """
    by: Literal["class", "permutation", "rotation", "column"] = "class"
    """What sets experiences apart: groups of classes in order; or, for the same classes (domains),
    a permutation of the inputs or a rotation of pictures, each of which a share of the examples
    has; or the values of a column of the data, such as a year or a hospital, in order."""
    column: str | None = None
    """``by = "column"``: its name; whole numbers, one an example."""
    values: tuple[int, ...] | None = Field(None, min_length=1, strict=False)
    """``by = "column"``: its values. ``None``: all there are; where clients are remote, nobody sees
    them all, and they are stated here."""
    order: Literal["in-step", "shuffled", "staggered"] = "in-step"
    """``in-step``: all clients meet the same experience at the same time; ``shuffled``: each in an
    order of its own; ``staggered``: all in the same order, some later than others."""
    lag: Count = 1
    """``staggered``: how many experiences the last client is behind the first. The run has so many
    stages more than experiences, and ``[run] rounds`` is divided among stages."""
    head: Literal["single", "multi", "growing"] = "single"
    """Which classes an example may be given: all; those of its experience, which is then known in
    evaluation, too; those that were met so far."""
    defence: Part | str = "naive"
    """What is done against forgetting: a name, or a table of a name and the defence's own keys."""
    reference: bool = False
    """Whether the same rounds are made once more with all examples at once, for intransigence."""

    @pydantic.model_validator(mode="after")
    def _with_experiences(self) -> Continual:
        defaults = {name: field.default for name, field in Continual.model_fields.items()}
        if self.experiences == 1 and any(getattr(self, n) != d for n, d in defaults.items()):
            raise ValueError("keys for a single experience; set experiences = 5, or remove them")
        if (self.by == "column") != (self.column is not None):
            raise ValueError("by = 'column' and column = … go together; set both, or neither")
        if self.values is not None and self.column is None:
            raise ValueError("values are those of a column; set by = 'column' and column = …")
        if self.lag != 1 and self.order != "staggered":
            raise ValueError("lag is of order = 'staggered'; set that, or remove lag")
        if self.by != "class" and self.head != "single":
            raise ValueError(
                f"by = '{self.by}' has the same classes in all experiences; set head = 'single'"
            )
        return self


class Attack(Open):
    """``[attack]``: simulated adversaries; a run with real sites is refused."""

    kind: str = "none"
    """Name of an attack, or ``module:object``; further keys are its own. ``none``: all are honest.
    """
    count: Count | None = None
    """How many clients are hostile; which ones follows from the seed."""
    fraction: Share | None = None
    """The same as a share of all clients."""
    join: bool = False
    """Hostile clients come besides those that hold data, and hold none; for attacks that train
    nothing."""

    @pydantic.model_validator(mode="after")
    def _how_many(self) -> Attack:
        if self.kind == "none":
            if self.model_fields_set - {"kind"} and (self.parameters() or self.count):
                raise ValueError("keys without a kind; set kind, see umbel list attacks")
        elif (self.count is None) == (self.fraction is None):
            raise ValueError("one of count and fraction says how many are hostile; set count = 1")
        return self


class Sought(Settings):
    """``[tune.space."section.key"]``: where a value is looked for."""

    low: int | float | None = None
    """A number, at least. Whole numbers as bounds give whole numbers."""
    high: int | float | None = None
    """A number, at most."""
    log: bool = False
    """A number whose logarithm is drawn evenly: for rates over several powers of ten."""
    step: Count | Positive | None = None
    """A number: only ``low`` and whole steps from it."""
    choices: tuple[bool | int | float | str, ...] | None = Field(None, min_length=1, strict=False)
    """Anything else: the values that are tried."""

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> Sought:
        if self.choices is not None:
            if self.model_fields_set != {"choices"}:
                raise ValueError("choices and bounds exclude each other; remove one")
            return self
        if self.low is None or self.high is None:
            raise ValueError("nothing to choose from; give low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}; swap them")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0 and no step; remove one of them")
        return self


class Tune(Settings):
    """``[tune]``: what ``umbel tune`` looks for, and how long. Runs themselves ignore it."""

    space: dict[str, Sought] = Field(default_factory=dict)
    """``"client.lr" = { low = 0.001, high = 1.0, log = true }``, ``"strategy.name" = { choices =
    ["fedavg", "fedadam"] }``: keys of the run file as for ``--set``, quoted."""
    trials: Count = 20
    """Runs, in all; pruned ones count, and those that were cut off do not."""
    metric: str = "loss"
    """Which metric of the last evaluated round decides."""
    better: Literal["lower", "higher"] | None = None
    """``None``: lower for loss, perplexity and error, higher for everything else."""
    prune: bool = True
    """Whether a trial ends that is worse than the median of the earlier ones at the same round."""
    prune_after: Natural = 3
    """Rounds that no trial is ended before."""

    @pydantic.field_validator("space", mode="before")
    @classmethod
    def _place_by_place(cls, space: Any) -> Any:
        if not isinstance(space, Mapping):
            return space
        for key, value in space.items():
            if key.count(".") < 1:
                raise ValueError(f"'{key}' is not section.key; write \"client.{key}\"")
            if isinstance(value, Mapping):
                parse(Sought, value, f'[tune.space."{key}"]')
        return space
