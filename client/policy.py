"""What a site allows: ``policy.toml``, checked before its data are opened.

The server proposes, the site decides. A check looks at the request alone: it opens no data, builds
no model and spends no privacy.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, time
from pathlib import Path
from typing import Any

import pydantic
from pydantic import Field

from umbel.client.folder import read_toml
from umbel.client.machine import Allowance
from umbel.core.errors import RefusedError
from umbel.core.run_file import RunFile
from umbel.core.settings import Count, NonNegative, Positive, Settings, Share, parse

POLICY = """\
# What this site allows. The server cannot change it; a request that is not allowed is refused, and
# written down in audit/, before any data are opened. `umbel site policy check RUN.toml` tries it.

[allow]
# A list names what is allowed; without one, everything that comes with Umbel is.
# tasks = ["classification", "regression"]
# strategies = ["fedavg", "fedprox"]
# datasets = ["npz", "csv"]
# models = ["logistic", "mlp"]
# defences = ["naive", "replay"]  # of runs over experiences; []: no such runs
# Code of your own that a run may name, "my_package.module:object": none unless it stands here.
own_parts = []

[privacy]
# unit = "example"                # what a run must protect, at least: "example" or "client"
# minimum_noise = 0.8             # noise multiplier
# maximum_epsilon_run = 3.0       # of one run, as its file declares it
# maximum_epsilon_total = 10.0    # of all runs on this site's data; its ledger refuses the rest
# secure_aggregation = true       # the server may see sums only

[limits]
# minimum_cohort = 3              # sites that train in a round beside this one, and this one
# hours = "20:00-06:00"           # local time
maximum_bytes = 2000000000        # of one message
maximum_rounds = 1000
repeats = 3                       # how often a round may be worked for again (a server restarts)
# threads = 4                     # that compute
# memory_mb = 8000                # of the process that trains, PyTorch itself (some 700) included
# gpu_share = 0.5                 # of each GPU's memory
"""
"""The policy that a new site starts with."""


class Allow(Settings):
    """``[allow]``: which parts a run may name."""

    tasks: tuple[str, ...] | None = Field(None, strict=False)
    strategies: tuple[str, ...] | None = Field(None, strict=False)
    datasets: tuple[str, ...] | None = Field(None, strict=False)
    models: tuple[str, ...] | None = Field(None, strict=False)
    defences: tuple[str, ...] | None = Field(None, strict=False)
    own_parts: tuple[str, ...] = Field((), strict=False)


class Privacy(Settings):
    """``[privacy]``: what a run must at least protect."""

    unit: str | None = Field(None, pattern="^(example|client)$")
    minimum_noise: NonNegative | None = None
    maximum_epsilon_run: Positive | None = None
    maximum_epsilon_total: Positive | None = None
    secure_aggregation: bool = False


class Limits(Settings):
    """``[limits]``: how much, how often, when."""

    minimum_cohort: Count = 1
    hours: str | None = Field(None, pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")
    maximum_bytes: Count = 2_000_000_000
    maximum_rounds: Count = 1000
    repeats: Count = 3
    threads: Count | None = None
    memory_mb: Count | None = None
    gpu_share: Share | None = None

    def share(self) -> Allowance:
        """How much of the machine a run may use."""
        return Allowance(self.threads, self.memory_mb, self.gpu_share)

    @pydantic.field_validator("hours")
    @classmethod
    def _some(cls, hours: str | None) -> str | None:
        if hours is not None and hours[:5] == hours[6:]:
            raise ValueError("begins and ends at the same time; remove it to allow all hours")
        return hours


class Policy(Settings):
    """A whole ``policy.toml``."""

    allow: Allow = Allow()
    privacy: Privacy = Privacy()
    limits: Limits = Limits()


class PolicyError(RefusedError):
    """What a request asks for is not allowed.

    Args:
        rule: the key of ``policy.toml`` that says so; it is all that the server is told.
    """

    def __init__(self, rule: str, message: str, fix: str = "") -> None:
        super().__init__(message, where=f"policy.toml {rule}", fix=fix)
        self.rule = rule


def read_policy(path: Path) -> Policy:
    """The policy at ``path``.

    Raises:
        InputError: there is none, or a key or value is wrong. A site without a policy does nothing.
    """
    policy: Policy = parse(Policy, read_toml(path, "umbel site init"), str(path))
    return policy


def check_run(policy: Policy, run: RunFile) -> None:
    """Refuses a run that the policy does not allow, whatever round it is in.

    Raises:
        PolicyError: the first rule that is broken.
    """
    allow = policy.allow
    model = run.task.model
    name = model if isinstance(model, str) or model is None else model.name
    for rule, found, allowed in (
        ("tasks", run.task.kind, allow.tasks),
        ("strategies", run.strategy.name, allow.strategies),
        ("datasets", run.data.name, allow.datasets),
        ("models", name, allow.models),
    ):
        _listed(rule, found, allowed)
    defence = run.continual.defence
    if run.continual.experiences > 1:
        _listed("defences", defence if isinstance(defence, str) else defence.name, allow.defences)
    for part in [*run.own_parts(), *run.files()]:
        if part not in allow.own_parts:
            raise PolicyError(
                "own_parts",
                f"'{part}' is not a part of Umbel",
                "add it to own_parts if you have read it and trust it",
            )
    _privacy(policy.privacy, run)
    if run.run.rounds > policy.limits.maximum_rounds:
        raise PolicyError(
            "maximum_rounds",
            f"the run has {run.run.rounds} rounds, at most {policy.limits.maximum_rounds}",
        )


def check_round(policy: Policy, asked: int, before: int, now: datetime, *, trains: bool) -> None:
    """Refuses a round that the policy does not allow now.

    Args:
        policy: the site's.
        asked: sites that the server asks at the same time.
        before: how often this very work was accepted before.
        now: local time.
        trains: whether an update is asked for, not a greeting or an evaluation.
    Raises:
        PolicyError: the first rule that is broken.
    """
    limits = policy.limits
    if trains and asked < limits.minimum_cohort:
        raise PolicyError(
            "minimum_cohort", f"{asked} site(s) are asked, at least {limits.minimum_cohort}"
        )
    if before > limits.repeats:
        raise PolicyError("repeats", f"this round was asked for {before} times already")
    if limits.hours is not None and not within(limits.hours, now.time()):
        raise PolicyError("hours", f"it is {now:%H:%M}, allowed is {limits.hours}")


def within(hours: str, now: time) -> bool:
    """Whether ``now`` is in ``HH:MM-HH:MM``, which may go past midnight."""
    begin, end = (time.fromisoformat(part) for part in hours.split("-"))
    return begin <= now < end if begin < end else now >= begin or now < end


def _listed(rule: str, found: str | None, allowed: Collection[str] | None) -> None:
    if allowed is None:
        return
    names = {name.replace("_", "-") for name in allowed}
    if (found or "").replace("_", "-") not in names:
        said = f"'{found}'" if found else "the task's own choice"
        raise PolicyError(rule, f"{said} is not among {sorted(names)}")


def _privacy(rules: Privacy, run: RunFile) -> None:
    declared: dict[str, Any] = run.privacy.model_dump()
    unit, noise, epsilon = (declared.get(k) for k in ("unit", "noise_multiplier", "epsilon"))
    needs_unit = rules.unit is not None or rules.minimum_noise is not None
    if (needs_unit or rules.maximum_epsilon_run is not None) and unit in (None, "none"):
        raise PolicyError("unit", "the run protects nobody: [privacy] unit = 'none'")
    if rules.unit == "example" and unit != "example":
        raise PolicyError("unit", f"the run protects the unit '{unit}', asked is 'example'")
    if rules.minimum_noise is not None and (noise is None or noise < rules.minimum_noise):
        raise PolicyError(
            "minimum_noise", f"noise_multiplier = {noise}, at least {rules.minimum_noise}"
        )
    if rules.maximum_epsilon_run is not None and (
        epsilon is None or epsilon > rules.maximum_epsilon_run
    ):
        raise PolicyError(
            "maximum_epsilon_run", f"epsilon = {epsilon}, at most {rules.maximum_epsilon_run}"
        )
    secure = run.secure_aggregation.model_dump()
    masked = secure.get("enabled") and not secure.get("accounting_only")
    if rules.secure_aggregation and not masked:
        raise PolicyError("secure_aggregation", "the server would see this site's own update")
