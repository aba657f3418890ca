from __future__ import annotations

import math

import pytest
import torch

from umbel.core.errors import InputError
from umbel.privacy.accounting import epsilon
from umbel.privacy.adaptive_clipping import AdaptiveClip, noised_count, split
from umbel.privacy.mechanisms import Gaussian
from umbel.privacy.streams import seeded_stream


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_converges_to_the_quantile(start: float, quantile: float) -> None:
    generator = torch.Generator().manual_seed(1)
    clip_norm, seen = start, []
    rule = AdaptiveClip(quantile=quantile)
    for round_number in range(150):
        norms = torch.exp(0.5 * torch.randn(100, generator=generator, dtype=torch.float64))
        stream = seeded_stream(0, "count", round_number)
        noised = noised_count(norms, clip_norm, std=5.0, stream=stream)
        clip_norm = rule.update(clip_norm, noised, expected=100)
        seen.append(clip_norm)
    truth = math.exp(0.5 * math.sqrt(2) * torch.erfinv(torch.tensor(2 * quantile - 1)).item())
    settled = torch.tensor(seen[-50:]).median().item()
    assert settled == pytest.approx(truth, rel=0.15)


def test_moves_towards_the_quantile_not_away() -> None:
    rule = AdaptiveClip(quantile=0.5, rate=0.2)
    assert rule.update(10.0, noised=50.0, expected=100) == pytest.approx(10 * math.exp(-0.1))
    assert rule.update(0.1, noised=-50.0, expected=100) == pytest.approx(0.1 * math.exp(0.1))
    assert rule.update(1.0, noised=0.0, expected=100) == 1.0
    assert AdaptiveClip(least=0.9).update(1.0, noised=1e9, expected=1) == 0.9
    assert AdaptiveClip(most=1.1).update(1.0, noised=-1e9, expected=1) == 1.1


def test_one_unit_moves_the_count_by_a_half() -> None:
    stream = seeded_stream(0, "none")
    norms = torch.tensor([0.5, 2.0, math.inf, 1.0])
    whole = noised_count(norms, 1.0, 0.0, stream)
    assert whole == 0.0
    without = [
        noised_count(torch.cat([norms[:i], norms[i + 1 :]]), 1.0, 0.0, stream) for i in range(4)
    ]
    assert without == [-0.5, 0.5, 0.5, -0.5]
    assert noised_count(torch.zeros(0), 1.0, 0.0, stream) == 0.0


def test_count_noise_has_the_declared_std() -> None:
    draws = [noised_count(torch.zeros(0), 1.0, 5.0, seeded_stream(i, "c")) for i in range(4000)]
    assert torch.tensor(draws).std().item() == pytest.approx(5.0, rel=0.06)  # 5.4 standard errors


@pytest.mark.parametrize("z", [0.3, 1.0, 4.0])
def test_the_split_costs_what_one_gaussian_costs(z: float) -> None:
    shared = split(z, count_std=5.0)
    both = {Gaussian(shared.deltas): 3, Gaussian(shared.count_std / 0.5): 3}
    once = epsilon({Gaussian(z): 3}, 1e-5).epsilon
    assert epsilon(both, 1e-5).epsilon == pytest.approx(once, rel=1e-9)
    assert z < shared.deltas < 1.2 * z


def test_no_split_without_room() -> None:
    assert split(0.0, 5.0) == (0.0, 0.0)
    for count_std in (0.0, 0.5, 0.4):
        with pytest.raises(InputError, match="leaves nothing"):
            split(1.0, count_std)
    for wrong in ({"quantile": 1.5}, {"rate": 0.0}, {"least": 2.0, "most": 1.0}, {"least": 0.0}):
        with pytest.raises(InputError):
            AdaptiveClip(**wrong)
