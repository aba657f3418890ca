"""What preferences and rewards ask of a policy; one loss for each record.

Log-probabilities are in nats. ``T`` counts the symbols of a completion, of which ``counted`` says
which there are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, T, symbols) and (B, T) -> (B, T - 1): log p of each symbol given those before it."""
    given = logits[:, :-1].float() / temperature
    return -F.cross_entropy(given.transpose(1, 2), tokens[:, 1:], reduction="none")


def bradley_terry(margin: Tensor, smoothing: float = 0.0) -> Tensor:
    """``-log sigma(margin)``, where a share ``smoothing`` of the preferences is taken for flipped.

    Args:
        margin: (B,): by how much what was chosen is worth more.
        smoothing: 0 ≤ ε < 1/2.

    Source: Ouyang et al. 2022, equation 1 (arXiv:2203.02155); Mitchell 2023, "A note on DPO with
    noisy preferences", equation 3.
    """
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def dpo(ratio: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation, (B,).

    Args:
        ratio: (B,): log π/ρ of the chosen completion minus that of the rejected one, where ρ is
            the reference; of π alone where there is no reference.
        beta: how dear it is to leave the reference.
        smoothing: as in :func:`bradley_terry`.

    Source: Rafailov et al. 2023, equation 7 (arXiv:2305.18290).
    """
    return bradley_terry(beta * ratio, smoothing)


def ipo(ratio: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation, (B,): the ratio is drawn to ``1 / (2 beta)``, no further.

    Args:
        ratio: as in :func:`dpo`.
        beta: the paper's τ.

    Source: Azar et al. 2023, equation 17 (arXiv:2310.12036).
    """
    return (ratio - 1 / (2 * beta)).square()


def kl(policy: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(π ‖ ρ) from a symbol that π drew: ``ρ/π - log ρ/π - 1``; never negative.

    Source: Schulman 2020, "Approximating KL divergence" (k3); Shao et al. 2024, equation 4
    (arXiv:2402.03300).
    """
    log_ratio = reference - policy
    return log_ratio.exp() - log_ratio - 1


def divergence(policy: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(π ‖ ρ) of the next symbol, exact; from scores (B, T, symbols) of both, (B, T - 1)."""
    ours, theirs = (
        (logits[:, :-1].float() / temperature).log_softmax(2) for logits in (policy, reference)
    )
    return (ours.exp() * (ours - theirs)).sum(2).clamp(min=0)


Scale = Literal["group", "batch", "none"]


def group_advantages(rewards: Tensor, scale: Scale = "group") -> Tensor:
    """How much better a completion is than the others to its prompt, (n, G) -> (n, G).

    Args:
        rewards: of n prompts with G completions each.
        scale: ``group``: in standard deviations of the prompt's own rewards; ``batch``: of all
            prompts', which makes a prompt's advantages depend on others; ``none``: as they are.

    Guarantees: the advantages of a prompt add up to 0; they are 0 where all its rewards are equal.

    Source: Shao et al. 2024, section 4.1.2 (arXiv:2402.03300); Liu et al. 2025, section 3.1
    (arXiv:2503.20783), for ``none``.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (centred.square().mean().sqrt() + 1e-4)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-4)


def clipped_value(now: Tensor, then: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of values that may move by ``clip`` from what they were; per symbol.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), as in their code; Schulman et al. 2017's.
    """
    near = then + (now - then).clamp(-clip, clip)
    return torch.maximum((now - returns).square(), (near - returns).square()) / 2


def whiten(values: Tensor, counted: Tensor) -> Tensor:
    """``values`` with mean 0 and variance 1 over all that count, and 0 elsewhere."""
    n = counted.sum().clamp(min=1)
    mean = (values * counted).sum() / n
    centred = (values - mean) * counted
    return centred / (centred.square().sum() / n + 1e-8).sqrt()


class Controller(NamedTuple):
    """Steers the weight of the KL towards a target.

    Args:
        target: nats a completion.
        gain: the most that one step changes the weight by is a fifth of it.

    Source: Ziegler et al. 2019, section 2.2 (arXiv:1909.08593).
    """

    target: float
    gain: float = 0.1

    def factor(self, measured: Tensor) -> Tensor:
        """What the weight is multiplied by after a step that measured this KL."""
        return 1 + self.gain * (measured / self.target - 1).clamp(-0.2, 0.2)
