"""Private training at a client: batches, noise, rules, models that are refused, a site's ledger."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from umbel.client import site_ledger
from umbel.client.private import PrivateSteps
from umbel.client.private_model import check_model
from umbel.core import run_file
from umbel.core.errors import InputError, RefusedError
from umbel.core.run_file import RunFile
from umbel.privacy.ledger import Ledger
from umbel.privacy.participation import plan
from umbel.privacy.sources import poisson, seeded_sources, system_sources
from umbel.privacy.streams import seeded_stream, system_stream
from umbel.strategies.parts import ClientRule
from umbel.strategies.parts.rule import proximal
from umbel.tasks.task import Batch, Forward, Task


def made(**tables: Any) -> RunFile:
    table: dict[str, Any] = {
        "data": {"name": "digits"},
        "task": {"kind": "classification"},
        "client": {"batch_size": 8, "lr": 1.0},
        "privacy": {"unit": "example", "noise_multiplier": 1.0},
    }
    for name, more in tables.items():
        table[name] = {**table.get(name, {}), **more}
    return run_file.resolve(table)


def losses(forward: Forward, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(forward(batch["x"]), batch["y"], reduction="none")


def task(decomposable: bool = True) -> Task:
    return Task(lambda: nn.Linear(4, 2), losses, lambda f, b: {}, decomposable)


def columns(n: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"x": torch.randn(n, 4, generator=draw), "y": torch.arange(n) % 2}


def test_an_epoch_is_one_expected_pass_of_batches_no_larger_than_asked() -> None:
    for n in (1, 7, 8, 9, 100, 1000):
        own = plan(made(client={"local_epochs": 3}), n)
        assert own.steps == 3 * own.parts
        assert n / own.parts <= 8
    assert plan(made(client={"batch_size": 64}), 1000) == (16, 16)
    assert plan(made(client={"batch_size": "full", "local_epochs": 2}), 1000) == (1, 2)
    assert plan(made(client={"local_steps": 5}), 100) == (13, 5)


@pytest.mark.parametrize("stream", [seeded_stream(1, "test"), system_stream()])
def test_batches_are_independent_coins(stream: Any) -> None:
    """Counts of examples and sizes of batches within six standard deviations of a binomial's."""
    n, parts, draws = 50, 5, 4000
    taken = np.zeros((draws, n), dtype=bool)
    for row in taken:
        row[poisson(stream, n, parts)] = True
    q = 1 / parts
    assert abs(taken.sum(0) - draws * q).max() < 6 * np.sqrt(draws * q * (1 - q))
    variance = taken.sum(1).var()
    assert abs(variance / (n * q * (1 - q)) - 1) < 6 * np.sqrt(2 / draws)
    assert not len(poisson(stream, 0, parts))
    assert list(poisson(stream, 3, 1)) == [0, 1, 2]


def steps(run: RunFile, rule: ClientRule, module: nn.Module, n: int = 40) -> Tensor:
    """The module's weights after one round."""
    private = PrivateSteps(run, task(), rule, module, seeded_sources(0))
    anchor = {name: p.detach().clone() for name, p in module.named_parameters()}
    private.train(1, "a", columns(n), anchor, run.client.lr)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def test_batches_without_anybody_are_noise_alone() -> None:
    run = made(client={"local_steps": 3, "batch_size": 1}, privacy={"clip_norm": 1e-12})
    moved = steps(run, ClientRule(), linear(), n=1000)
    assert moved.isfinite().all()


def test_terms_on_parameters_come_after_the_noise_and_are_not_clipped() -> None:
    """The privatised part of a step does not change with mu; the term's part is the whole of it."""
    quiet = {"noise_multiplier": 1.0, "clip_norm": 1e-3}
    one = made(client={"local_steps": 2, "batch_size": "full", "lr": 0.5}, privacy=quiet)
    before = torch.cat([p.detach().flatten() for p in linear().parameters()])
    plain = steps(one, ClientRule(), linear()) - before
    pulled = steps(one, ClientRule(loss_terms=(proximal(1.0),)), linear()) - before
    first = made(client={"local_steps": 1, "batch_size": "full", "lr": 0.5}, privacy=quiet)
    step = steps(first, ClientRule(), linear()) - before
    # Two steps d1, d2 become d1 + d2 - lr mu d1; d2 hardly depends on where it is taken.
    assert torch.allclose(pulled, plain - 0.5 * step, atol=2e-5)
    huge = ClientRule(loss_terms=(proximal(1e3),))
    moved = steps(made(client={"local_steps": 2, "lr": 0.5}, privacy=quiet), huge, linear())
    assert float((moved - before).norm()) > 100 * 1e-3 / 40  # far beyond the clip norm's reach


def test_rules_that_may_see_the_data_otherwise_are_refused() -> None:
    rule = ClientRule(objective=lambda forward, local, batch, mask: torch.zeros(()))
    with pytest.raises(InputError, match="objective"):
        PrivateSteps(made(), task(), rule, linear(), system_sources())


def test_an_uncalibrated_run_trains_nobody() -> None:
    run = made(privacy={"noise_multiplier": None, "epsilon": 1.0})
    with pytest.raises(InputError, match="calibrated"):
        PrivateSteps(run, task(), ClientRule(), linear(), system_sources())


class Centred(nn.Module):
    """A user's own batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x - x.mean(0))
        return out


class Counting(nn.Module):
    """A buffer that follows the data."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.add_(x.detach().mean(0))  # type: ignore[operator]
        out: Tensor = self.head(x)
        return out


MODELS: list[tuple[nn.Module, bool]] = [
    (nn.Linear(4, 2), True),
    (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.5), nn.Linear(4, 2)), True),
    (nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)), True),
    (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), False),
]


@pytest.mark.parametrize(("module", "allowed"), MODELS)
def test_verdicts_are_those_of_opacus(module: nn.Module, allowed: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.validators import ModuleValidator
    module.train()
    assert (not ModuleValidator.validate(module, strict=False)) == allowed
    batch = columns(4)
    if allowed:
        check_model(made(), task(), module, batch)
        return
    with pytest.raises(InputError, match="mixes the examples") as refusal:
        check_model(made(), task(), module, batch)
    assert "GroupNorm" in refusal.value.fix


def test_what_opacus_does_not_look_for_is_refused_too() -> None:
    running = nn.Sequential(nn.InstanceNorm1d(1, track_running_stats=True), nn.Linear(4, 2))
    with pytest.raises(InputError, match="running statistics"):
        check_model(made(), task(), running, columns(4))
    with pytest.raises(InputError, match="act on each other"):
        check_model(made(), task(), Centred(), columns(4))
    with pytest.raises(InputError, match="'mean' changes in training"):
        check_model(made(), task(), Counting(), columns(4))
    with pytest.raises(InputError, match="'mean' changes in training"):
        check_model(made(privacy={"unit": "client"}), task(), Counting(), columns(4))
    with pytest.raises(InputError, match="not a mean over its examples"):
        check_model(made(), task(decomposable=False), linear(), columns(4))


SPEND = """
import sys
from umbel.client import site_ledger
from umbel.core import run_file

privacy = {"unit": "example", "noise_multiplier": 1.0}
tables = {"data": {"name": "digits"}, "task": {"kind": "classification"}, "privacy": privacy}
run = run_file.resolve({**tables, "client": {"batch_size": 8}})
mine = site_ledger.account("a", {"folder": sys.argv[1]})
for number in range(1, 6):
    site_ledger.debit(mine, run, "job", number, 100)
"""


def test_two_processes_of_a_site_lose_no_debit(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SPEND, str(tmp_path)]
    workers = [subprocess.Popen(command) for _ in range(2)]
    assert [worker.wait(240) for worker in workers] == [0, 0]
    (found,) = site_ledger.read(tmp_path / "ledger")
    assert (found["entries"], found["steps"]) == (10, 10 * 13)


def test_a_site_keeps_its_own_budget_and_delta_whatever_the_server_says(tmp_path: Path) -> None:
    mine = site_ledger.account("a", {"ledger": str(tmp_path), "epsilon": 3.0})
    generous = made(privacy={"epsilon": 99.0, "delta": 0.5, "noise_multiplier": 1.2})
    done = 0
    refused = ""
    while not refused and done < 50:
        try:
            site_ledger.debit(mine, generous, f"job {done}", 1, 100)
            done += 1
        except RefusedError as refusal:
            refused = refusal.message
    assert "the budget is 3 at delta 1e-05" in refused
    ledger = Ledger.opened(tmp_path / "data-example.db", 1e-5)
    assert len(ledger.lines()) == done > 0
    assert ledger.epsilon(accountant="pld").epsilon <= 3.0
    other = made(privacy={"neighbouring": "replace-one"})
    with pytest.raises(InputError, match="relation"):
        site_ledger.debit(mine, other, "job", 1, 100)


def test_a_site_without_a_place_for_its_ledger_does_not_train_privately() -> None:
    with pytest.raises(InputError, match="no place for its ledger"):
        site_ledger.account("a", {})


def test_a_run_is_held_to_the_epsilon_that_it_declares(tmp_path: Path) -> None:
    """A server that calibrates honestly is never refused; one that lowers the noise is, at once."""
    from umbel.server.private_plan import calibrated

    mine = site_ledger.account("a", {"ledger": str(tmp_path)})
    quick = {"noise_multiplier": None, "epsilon": 2.0, "accountant": "rdp"}
    asked = made(privacy=quick, run={"rounds": 4})
    honest = calibrated(asked, [100, 100])
    noise = honest.privacy.noise_multiplier
    assert noise is not None
    for number in range(1, 5):
        spent = site_ledger.debit(mine, honest, "honest", number, 100)
    assert spent.epsilon > 1.9
    lowered = made(privacy={"noise_multiplier": noise / 4, "epsilon": 2.0}, run={"rounds": 4})
    with pytest.raises(RefusedError, match="its noise is too low"):
        site_ledger.debit(mine, lowered, "lowered", 1, 100)
    longer = made(privacy={"noise_multiplier": noise, "epsilon": 2.0}, client={"local_epochs": 4})
    with pytest.raises(RefusedError, match="declares epsilon 2"):
        site_ledger.debit(mine, longer, "honest", 5, 100)
    # nor does it help to claim that the site holds more: the site counts itself
    claimed = calibrated(asked, [100_000])
    with pytest.raises(RefusedError, match="declares epsilon 2"):
        site_ledger.debit(mine, claimed, "claimed", 1, 100)
    assert len(Ledger.opened(tmp_path / "data-example.db", 1e-5).lines()) == 4
