"""Whole runs whose clients add the noise under the masks: the model, the cost, the refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy import stats

from umbel.core.errors import InputError
from umbel.core.payloads import TrainPlan, Updates
from umbel.core.run_file import RunFile, resolve
from umbel.privacy.accounting import INTEGER_ORDERS, rdp_epsilon
from umbel.privacy.distributed import Noise, as_private_as, sized
from umbel.privacy.mechanisms import Concentrated, Gaussian, SkellamSum
from umbel.privacy.participation import shares
from umbel.privacy.secure_aggregation.server import Stage
from umbel.privacy.sources import seeded_sources
from umbel.privacy.streams import seeded_stream, system_stream
from umbel.server.conduct import conduct
from umbel.server.evaluation import evaluation
from umbel.server.store import RunStore
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import prepare
from umbel.simulations.secure import SecureFederation
from umbel.simulations.simulate import check, simulate
from umbel.strategies.parts.noisy_sum import NoisySum

CLIENTS = 8
KINDS = ["distributed-discrete-gaussian", "distributed-skellam"]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(store: Path | str = "runs", **tables: dict[str, Any]) -> RunFile:
    table: dict[str, Any] = {
        "run": {"rounds": 2, "store": str(store), "seed": 5},
        "data": {
            "name": "breast-cancer",
            "split": {"kind": "dirichlet", "clients": CLIENTS, "alpha": 1.0},
        },
        "task": {"kind": "classification", "model": "logistic"},
        "client": {"device": "cpu", "local_steps": 3},
        "strategy": {"weights": "uniform"},
        "privacy": {"unit": "client", "mechanism": KINDS[0], "noise_multiplier": 0.5},
        "secure_aggregation": {"enabled": True, "corrupt_fraction": 0.13},
    }
    for name, more in tables.items():
        table[name] = {**table.get(name, {}), **more}
    return resolve(table)


def model_of(path: str | None) -> dict[str, torch.Tensor]:
    assert path is not None
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("noise", ["discrete-gaussian", "skellam"])
@pytest.mark.parametrize(("bits", "length", "z"), [(16, 1 << 17, 1.0), (32, 1000, 0.3), (20, 7, 5)])
def test_a_sum_costs_no_more_than_the_gaussian_that_it_stands_for(
    noise: Noise, bits: int, length: int, z: float
) -> None:
    agreed = sized(
        length=length,
        clip_norm=2.0,
        noise_multiplier=z,
        bits=bits,
        clients=100,
        survivors=100,
        noise=noise,
    )
    real, stated = agreed.mechanism(), as_private_as(z, noise, 100, "add-or-remove-one")
    for orders in ((2.0,), (3.0, 17.0), INTEGER_ORDERS):
        for delta in (1e-5, 1e-9):
            cost = rdp_epsilon({real: 1}, delta, orders)
            assert cost <= rdp_epsilon({stated: 1}, delta, orders) * (1 + 1e-9)
    # Paid for with noise, and hardly any of it.
    std = math.sqrt(float(agreed.noise_variance) * 100) * agreed.step
    assert 1 <= std / (z * 2.0) < 1.001
    assert float(agreed.noise_variance) <= 2.0**24
    assert agreed.bits == bits


def test_golden_of_a_run(tmp_path: Path) -> None:
    # n 100, d 2^17, z 1, 16 bits, T 1: the Gaussian's 4.7527, not the 4.7544 that the same noise
    # comes to with integers: sizing adds the noise that makes up for it.
    privacy = {"noise_multiplier": 1.0, "accountant": "rdp"}
    secure = {"corrupt_fraction": 0.0, "threshold": 99, "bits": 16}
    table = made(
        tmp_path,
        privacy=privacy,
        secure_aggregation=secure,
        run={"rounds": 1},
        data={"split": {"kind": "iid", "clients": 100}},
    )
    found = check(table)["privacy"]
    assert (found["shares"], found["steps"]) == (100, 1)
    gaussian = rdp_epsilon({Gaussian(1.0): 1}, 1e-5)
    assert found["epsilon"] == pytest.approx(gaussian, rel=1e-9)
    stated = as_private_as(1.0, "discrete-gaussian", 100, "add-or-remove-one")
    assert rdp_epsilon({stated: 1}, 1e-5, INTEGER_ORDERS) == pytest.approx(4.7527, abs=5e-5)


def test_replace_one_costs_twice_the_sensitivity() -> None:
    twice = as_private_as(1.0, "discrete-gaussian", 5, "replace-one")
    assert isinstance(twice, Concentrated)
    assert twice.rho == pytest.approx(2.0)
    skellam = as_private_as(1.0, "skellam", 5, "replace-one")
    assert isinstance(skellam, SkellamSum)
    assert skellam.divergence(2.0) == pytest.approx(4.0, rel=1e-9)
    assert as_private_as(0.0, "skellam", 5, "zero-out").divergence(2.0) == math.inf  # type: ignore[union-attr]


def test_masks_and_engines_change_no_bit(tmp_path: Path) -> None:
    kept, kind = {}, KINDS[1]
    for name, secure, engine in (
        ("masked", {}, "vectorised"),
        ("unmasked", {"accounting_only": True}, "vectorised"),
        ("sequential", {}, "sequential"),
    ):
        run = made(tmp_path / name, secure_aggregation=secure, privacy={"mechanism": kind})
        outcome = simulate(run, engine=engine)
        assert (outcome.status, outcome.rounds) == ("finished", 2)
        assert outcome.privacy is not None
        assert outcome.privacy["generator"] == "seeded"
        assert outcome.privacy["mechanism"] == kind
        assert outcome.history[-1].training == {}
        kept[name] = model_of(outcome.model)
    for name, tensor in kept["masked"].items():
        assert torch.equal(tensor, kept["unmasked"][name])
        # A delta that differs in its last bit may be rounded the other way.
        torch.testing.assert_close(tensor, kept["sequential"][name], rtol=0, atol=1e-3)


def test_the_run_is_the_gaussian_one_but_for_the_noise(tmp_path: Path) -> None:
    # Without corrupt clients and drop-outs the two differ by noise of std z·C/n in each number.
    run = made(
        tmp_path,
        run={"rounds": 1},
        secure_aggregation={"corrupt_fraction": 0.0, "min_cohort": CLIENTS},
    )
    ours = model_of(simulate(run, engine="sequential").model)
    central = made(
        tmp_path / "central",
        privacy={"mechanism": "gaussian", "noise_multiplier": 0.0},
        run={"rounds": 1},
        secure_aggregation={"enabled": False},
    )
    bare = model_of(simulate(central, engine="sequential").model)
    noise = torch.cat([(ours[n] - bare[n]).double().reshape(-1) for n in bare]).numpy()
    std = 0.5 * 1.0 / CLIENTS
    assert stats.kstest(noise, "norm", args=(0, std)).pvalue > 1e-6
    assert np.abs(noise).max() > 0.5 * std


def contributions(prepared: Any, number: int, count: int) -> tuple[NoisySum, list[Updates]]:
    template = prepared.model().tensors()
    sums = NoisySum(prepared.run, template, frozenset(), number)
    generator = torch.Generator().manual_seed(0)
    updates = []
    for place in range(count):
        delta = {
            n: torch.randn((1, *t.shape), generator=generator) for n, t in sorted(template.items())
        }
        updates.append(Updates(number, [f"{place}"], delta, torch.ones(1, dtype=torch.float64)))
    return sums, updates


@pytest.mark.parametrize("kind", KINDS)
def test_noise_in_the_sum_is_that_of_the_fewest_survivors(kind: str) -> None:
    prepared = prepare(
        made(
            privacy={"mechanism": kind, "noise_multiplier": 2.0},
            task={"model": {"name": "mlp", "hidden": [40]}},
        )
    )
    least = shares(prepared.run)
    assert least == prepared.run.secure_aggregation.min_cohort - 1 < CLIENTS
    sums, updates = contributions(prepared, 1, least)
    total = np.zeros(sums.size, dtype=np.uint32)
    plain = np.zeros(sum(t.numel() for t in prepared.model().tensors().values()))
    for update in updates:
        total += sums.encode(update, seeded_stream(3, "noise", update.clients[0]))
        flat = torch.cat([t.reshape(-1).double() for _, t in sorted(update.delta.items())]).numpy()
        plain += flat / max(1.0, float(np.linalg.norm(flat)))
    found = sums.decode(total)
    noise = np.concatenate([found[n].reshape(-1).numpy() for n in sorted(found)]) - plain
    assert stats.kstest(noise, "norm", args=(0, 2.0)).pvalue > 1e-6
    assert stats.kstest(noise, "norm", args=(0, 2.0 * 2 / 3)).pvalue < 1e-6
    assert stats.kstest(noise, "norm", args=(0, 2.0 * 3 / 2)).pvalue < 1e-6


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30, -1e30])
def test_nobody_moves_the_sum_by_more_than_the_stated_norm(value: float) -> None:
    prepared = prepare(made(privacy={"noise_multiplier": 1e-3}, task={"model": "logistic"}))
    sums, (update, _) = contributions(prepared, 1, 2)
    extreme = {n: torch.full_like(t, value) for n, t in update.delta.items()}
    sent = sums.encode(Updates(1, ["x"], extreme, update.weights * 1e9), system_stream())
    found = torch.cat([t.reshape(-1) for t in sums.decode(sent).values()])
    # 1, and next to no noise and rounding.
    assert float(found.norm()) < 1.05
    assert value in (1e30, -1e30) or float(found.norm()) < 0.05


def test_below_the_sized_number_a_round_has_no_result_and_is_paid_for(tmp_path: Path) -> None:
    prepared = prepare(made(tmp_path))
    run = prepared.run
    assert run.secure_aggregation.min_cohort == 6
    lost: list[tuple[Stage, int]] = []

    def silent(stage: Stage, member: int) -> bool:
        # Three of eight in the first round: five are left, and the noise is sized for six.
        if stage is Stage.ADVERTS and len(lost) < 3:
            lost.append((stage, member))
            return True
        return False

    inner = sequential(run, prepared.data, prepared.task, prepared.strategy.client)
    federation = SecureFederation(inner, run, prepared.strategy, silent)
    store = RunStore(tmp_path)
    run_id = store.create(run, engine="sequential")
    score = evaluation(run, federation, prepared.task, prepared.module, None, "cpu")
    seen: list[Any] = []
    done = conduct(
        store,
        run_id,
        run,
        prepared.strategy,
        federation,
        prepared.model(),
        score,
        seen.append,
        0.0,
        sources=seeded_sources(5),
    )
    assert done == "finished"
    first, second = seen
    assert first.participants == []
    assert "5 members, need 6" in first.note
    assert first.epsilon is not None
    assert second.epsilon > first.epsilon > 0
    assert len(second.participants) == CLIENTS
    store.close()


def test_accounting_only_keeps_the_same_bound() -> None:
    prepared = prepare(made(secure_aggregation={"accounting_only": True}))
    inner = sequential(prepared.run, prepared.data, prepared.task, prepared.strategy.client)
    federation = SecureFederation(inner, prepared.run, prepared.strategy)
    names = list(prepared.data.names)
    few = TrainPlan(1, names[:5], prepared.model(), 5)
    assert "5 members, need 6" in "".join(f.reason for f in federation.train(few))  # type: ignore[union-attr]


def test_a_budget_is_calibrated_and_kept(tmp_path: Path) -> None:
    run = made(tmp_path, privacy={"noise_multiplier": None, "epsilon": 4.0})
    plan = check(run)["privacy"]
    outcome = simulate(run, engine="vectorised")
    assert outcome.privacy is not None
    assert 3.99 < outcome.privacy["epsilon"] <= 4.0
    assert plan["noise_multiplier"] == outcome.privacy["noise_multiplier"]
    assert outcome.history[-1].epsilon == pytest.approx(outcome.privacy["epsilon"])


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"secure_aggregation": {"enabled": False}}, "the server would see each"),
        ({"secure_aggregation": {"groups": 2}}, "groups would each have the noise"),
        ({"privacy": {"clipping": "adaptive"}}, "no adaptive clipping"),
        ({"privacy": {"place": "client"}}, "default place"),
        ({"privacy": {"unit": "example"}}, "takes unit = 'client'"),
        ({"strategy": {"name": "median"}}, "needs"),
    ],
)
def test_what_cannot_be_private_is_refused(tables: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        prepare(made(**tables))


def test_a_ring_too_small_is_refused_before_anything_is_sent() -> None:
    make: Callable[..., Any] = sized
    with pytest.raises(InputError, match="bits"):
        make(
            length=10,
            clip_norm=1.0,
            noise_multiplier=1.0,
            bits=4,
            clients=100,
            survivors=50,
            noise="discrete-gaussian",
        )


def test_corrupt_clients_noise_does_not_count() -> None:
    run = prepare(made(secure_aggregation={"corrupt_fraction": 0.0})).run
    assert shares(run) == run.secure_aggregation.min_cohort
    bad = run.model_copy(
        update={
            "secure_aggregation": run.secure_aggregation.model_copy(
                update={"min_cohort": 3, "corrupt_fraction": 0.4}
            )
        }
    )
    with pytest.raises(InputError, match="nobody's noise is sure to be in a sum"):
        shares(bad)
