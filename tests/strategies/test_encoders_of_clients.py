"""FedEMA and FedU: what a client's next round starts from."""

from __future__ import annotations

import torch

from umbel.core.trees import Tree, norm, subtract
from umbel.strategies.fedema import fedema
from umbel.strategies.fedu import fedu
from umbel.strategies.parts import ClientRule, Ended, Trees

NAMES = ("encoder.w", "predictor.w")


def tree(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, generator=generator) for name in NAMES}


def ended(rule: ClientRule, trained: Tree, anchor: Tree, own: Trees) -> Trees:
    assert rule.end is not None
    one = torch.ones(())
    return rule.end(Ended(trained, anchor, {}, own, one, 0.1, one, one)).own


def begun(rule: ClientRule, anchor: Tree, own: Trees) -> Tree:
    assert rule.begin is not None
    return rule.begin(anchor, {}, own)


def after_two_rounds(rule: ClientRule) -> tuple[Tree, Tree, Tree, Trees]:
    """(last of round 1, anchor of round 2, start of round 2, what is kept after it)."""
    assert rule.state is not None
    first, last, second = tree(0), tree(1), tree(2)
    own = rule.state(first)
    start = begun(rule, first, own)
    assert all(torch.equal(start[n], first[n]) for n in NAMES)
    own = ended(rule, last, first, own)
    start = begun(rule, second, own)
    return last, second, start, ended(rule, start, second, own)


def test_fedema_keeps_tau_in_the_second_round_and_by_the_distance_in_the_third() -> None:
    rule = fedema(tau=0.7).client
    last, anchor, start, own = after_two_rounds(rule)
    for name in NAMES:
        torch.testing.assert_close(start[name], 0.7 * last[name] + 0.3 * anchor[name])
    far = norm(subtract(anchor, last))
    near = {n: t + 0.01 for n, t in own["last"].items()}
    mu = 0.7 * norm(subtract(near, own["last"])) / far
    mixed = begun(rule, near, own)
    for name in NAMES:
        want = near[name] + float(mu) * (own["last"][name] - near[name])
        torch.testing.assert_close(mixed[name], want)
    away = {n: t + 100 for n, t in own["last"].items()}
    for name, tensor in begun(rule, away, own).items():
        torch.testing.assert_close(tensor, own["last"][name], atol=1e-4, rtol=0)


def test_fedema_without_tau_is_fedavg() -> None:
    _, anchor, start, _ = after_two_rounds(fedema(tau=0.0).client)
    assert all(torch.equal(start[n], anchor[n]) for n in NAMES)


def test_fedu_takes_the_predictor_of_near_encoders_alone() -> None:
    last, anchor, start, _ = after_two_rounds(fedu(threshold=1e-3).client)
    assert torch.equal(start["encoder.w"], anchor["encoder.w"])
    assert torch.equal(start["predictor.w"], last["predictor.w"])
    _, anchor, start, _ = after_two_rounds(fedu(threshold=1e3).client)
    assert all(torch.equal(start[n], anchor[n]) for n in NAMES)
