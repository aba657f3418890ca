"""Attacks are their formulas, hit the same clients each time, and are told in the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from umbel.core import registry
from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.run_file import Attack as Section
from umbel.core.run_file import resolve
from umbel.server.store import RunStore
from umbel.simulations.attacks.alie import papers_z
from umbel.simulations.attacks.attack import Scene
from umbel.simulations.attacks.build import build_attack, choose_hostile
from umbel.simulations.simulate import Outcome, simulate

HONEST = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)


def updates(rows: np.ndarray[Any, Any], first: str) -> Updates:
    tensor = torch.from_numpy(rows)
    delta = {"a": tensor[:, :2], "b": tensor[:, 2:, None]}
    names = [f"{first}{i}" for i in range(len(rows))]
    return Updates(4, names, delta, torch.full((len(rows),), 5.0, dtype=torch.float64))


def scene(**changes: Any) -> Scene:
    given: dict[str, Any] = {
        "seed": 3,
        "round": 4,
        "hostile": ["h0", "h1"],
        "cohort": 8,
        "template": {"a": torch.zeros(2), "b": torch.zeros(3, 1), "n": torch.tensor(0)},
        "own": updates(2 * HONEST[:2], "h"),
        "honest": updates(HONEST, "c"),
        "rule": lambda sent: {n: t.double().mean(0) for n, t in sent.delta.items()},
    }
    return Scene(**{**given, **changes})


def forged(kind: str, given: Scene | None = None, **parameters: Any) -> np.ndarray[Any, Any]:
    attack = build_attack(Section.model_validate({"kind": kind, "count": 2, **parameters}))
    assert attack is not None
    assert attack.forge is not None
    tree = attack.forge(given or scene())
    assert tree.keys() == {"a", "b"}
    return torch.cat([tree["a"], tree["b"][..., 0]], dim=1).double().numpy()


def test_forged_updates_are_their_formulas() -> None:
    rows = HONEST.astype(np.float64)
    mean, std = rows.mean(0), rows.std(0, ddof=1)
    expected = {
        "sign-flip": -2 * rows[:2],
        "ipm": np.stack([-0.5 * mean] * 2),
        "backdoor": 4 * 2 * rows[:2],
    }
    for kind, value in expected.items():
        np.testing.assert_allclose(forged(kind), value, rtol=1e-6)
    np.testing.assert_allclose(forged("alie", z=1.5), np.stack([mean - 1.5 * std] * 2), rtol=1e-6)
    np.testing.assert_allclose(forged("sign-flip", of="honest-mean", scale=3.0)[1], -3 * mean)
    assert np.isnan(forged("nan")).all()
    copied = forged("mimic")
    assert (copied[0] == copied[1]).all()
    assert (copied[0] == rows).all(1).any()


def test_alie_takes_as_many_deviations_as_the_paper() -> None:
    # n = 50 with f = 24 needs 2 supporters: Phi(z) = (50 - 24 - 2) / (50 - 24).
    assert papers_z(50, 24) == pytest.approx(1.426, abs=1e-3)
    assert papers_z(11, 1) == 0.0


def test_gaussian_noise_is_drawn_by_seed_round_and_client() -> None:
    once = forged("gaussian", std=2.0)
    assert (forged("gaussian", std=2.0) == once).all()
    assert not (once[0] == once[1]).any()
    assert not (forged("gaussian", scene(round=5), std=2.0) == once).any()
    wide = scene(template={"a": torch.zeros(20000), "b": torch.zeros(1, 1)})
    assert forged("gaussian", wide, std=2.0).std() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
def test_min_max_goes_as_far_as_the_honest_are_apart(direction: str) -> None:
    sent = forged("min-max", direction=direction)[0]
    rows = HONEST.astype(np.float64)
    diameter = max(float(np.linalg.norm(a - b)) for a in rows for b in rows)
    far = max(float(np.linalg.norm(sent - row)) for row in rows)
    assert far == pytest.approx(diameter, rel=1e-9)


def test_search_finds_what_moves_the_rule_most() -> None:
    """A rule that takes a mean, but throws out who is more than 3 off the honest mean."""
    centre = HONEST.astype(np.float64).mean(0)

    def rule(sent: Updates) -> dict[str, torch.Tensor]:
        rows = torch.cat([sent.delta["a"], sent.delta["b"][..., 0]], dim=1).double()
        near = (rows - torch.from_numpy(centre)).norm(dim=1) <= 3.0
        kept = rows[near].mean(0)
        return {"a": kept[:2], "b": kept[2:, None]}

    sent = forged("ipm", scene(rule=rule), epsilon="search")[0]
    assert 2.0 < float(np.linalg.norm(sent - centre)) <= 3.0


def run(tmp_path: Path, attack: dict[str, Any], strategy: dict[str, Any], engine: str) -> Outcome:
    table = {
        "run": {"rounds": 8, "seed": 5, "store": str(tmp_path), "processes": 0},
        "data": {"name": "digits", "split": {"kind": "iid", "clients": 8}},
        "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [32]}},
        "client": {"lr": 0.3, "local_epochs": 2},
        "strategy": strategy,
        "attack": attack,
        "evaluate": {"every": 0},
    }
    return simulate(resolve(table), engine=engine)


@pytest.mark.parametrize("kind", sorted(registry.known("attacks")))
def test_every_attack_runs_and_leaves_the_honest_alone(tmp_path: Path, kind: str) -> None:
    outcome = run(
        tmp_path, {"kind": kind, "count": 2}, {"name": "trimmed-mean", "f": 2}, "vectorised"
    )
    assert outcome.status == "finished"
    assert len(outcome.hostile) == 2
    assert RunStore(tmp_path).get(outcome.run_id).engine_plan["hostile"] == list(outcome.hostile)
    last = outcome.history[-1]
    if kind == "nan":
        assert sorted(f.client for f in last.failures) == list(outcome.hostile)
        assert all("NaN" in f.reason for f in last.failures)
    else:
        assert len(last.participants) == 8
    assert ("attack_success_rate" in outcome.metrics) == (kind == "backdoor")
    assert outcome.metrics["accuracy"] > 0.6


def test_engines_agree_under_attack(tmp_path: Path) -> None:
    attack = {"kind": "alie", "z": 1.0, "fraction": 0.25}
    strategy = {"name": "krum", "f": 2, "cohort": 8}
    fast = run(tmp_path, attack, strategy, "vectorised")
    slow = run(tmp_path, attack, strategy, "sequential")
    assert fast.hostile == slow.hostile
    assert fast.metrics["loss"] == pytest.approx(slow.metrics["loss"], rel=1e-3)


def test_a_mean_falls_where_a_robust_rule_stands(tmp_path: Path) -> None:
    attack = {"kind": "sign-flip", "count": 2, "scale": 10.0}
    fallen = run(tmp_path, attack, {"name": "fedavg"}, "vectorised")
    stands = run(tmp_path, attack, {"name": "median"}, "vectorised")
    assert fallen.metrics["accuracy"] < 0.5 < stands.metrics["accuracy"]


def test_model_replacement_takes_the_mean_and_not_the_median(tmp_path: Path) -> None:
    attack = {"kind": "backdoor", "count": 1}
    taken = run(tmp_path, attack, {"name": "fedavg"}, "vectorised")
    held = run(tmp_path, attack, {"name": "median"}, "vectorised")
    assert taken.metrics["attack_success_rate"] > 0.5 > held.metrics["attack_success_rate"]


def test_hostile_clients_may_join_beside_those_that_hold_data(tmp_path: Path) -> None:
    attack = {"kind": "ipm", "count": 3, "join": True}
    outcome = run(tmp_path, attack, {"name": "trimmed-mean", "f": 3}, "vectorised")
    assert len(outcome.history[-1].participants) == 11
    assert outcome.hostile == ["~hostile-0", "~hostile-1", "~hostile-2"]
    assert outcome.metrics["accuracy"] > 0.6


def test_who_is_hostile_follows_from_the_seed() -> None:
    names = [f"c{i:02d}" for i in range(30)]
    section = Section(kind="nan", fraction=0.2)
    chosen = {seed: choose_hostile(section, names, seed) for seed in range(20)}
    assert all(len(who) == 6 for who in chosen.values())
    assert chosen[3] == choose_hostile(section, names, 3)
    assert len({tuple(who) for who in chosen.values()}) > 15


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ({"kind": "alyie", "count": 1}, "unknown attack 'alyie'"),
        ({"kind": "alie", "count": 1, "zz": 1}, "unknown key 'zz' of attack 'alie'"),
        ({"kind": "alie"}, "one of count and fraction"),
        ({"kind": "alie", "count": 1, "fraction": 0.1}, "one of count and fraction"),
        ({"count": 1}, "keys without a kind"),
        ({"kind": "alie", "count": 8}, "8 of 8 clients hostile leaves nobody honest"),
        ({"kind": "label-flip", "count": 1, "join": True}, "trains on data of its own"),
        ({"kind": "backdoor", "count": 1, "target": 10}, "target = 10 is no class"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, attack: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path, attack, {"name": "fedavg"}, "vectorised")
