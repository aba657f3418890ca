"""A policy from rewards that can be verified, judged within groups of its own completions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn

from umbel.core.run_file import Part
from umbel.core.settings import Count, Natural, NonNegative, Positive, Share
from umbel.datasets.federated import Info
from umbel.tasks.collect import Columns, Moment
from umbel.tasks.preferences import losses as of
from umbel.tasks.preferences import rewards, rollouts
from umbel.tasks.preferences.policy import Policy
from umbel.tasks.reinforcement.losses import surrogate
from umbel.tasks.task import Batch, Forward, Task


def grpo(
    info: Info,
    model: Part | str | None,
    *,
    reward: str = "share",
    judge: Part | str | None = None,
    judge_from: str | None = None,
    samples: Annotated[int, Ge(2)] = 8,
    length: Count = 16,
    least: Count | None = None,
    end: Natural | None = None,
    temperature: Positive = 1.0,
    clip: Share = 0.2,
    beta: NonNegative = 0.04,
    scale: of.Scale = "group",
) -> Task:
    """A policy from verifiable rewards, each completion against others to its prompt: GRPO.

    Each round a client writes ``samples`` completions of each of its prompts, and trains on them.
    The reference is the model as the run began (``init_from``): frozen, never sent.

    Args:
        info: of the data; ``x`` is prompts, ``answer`` what is right.
        model: takes symbols (B, T), gives (B, T, symbols); ``None``: ``gpt``.
        reward: ``share`` of the answer's symbols that are right, ``exact`` for all or nothing,
            ``learned`` by a reward model, or your own.
        judge: the reward model; ``None``: ``gpt``.
        judge_from: the run of the kind ``reward`` that trained it, its folder or its model.
        samples: completions of a prompt.
        length: symbols of a completion, at most.
        least: the most is drawn for each completion between this and ``length``; ``None``: no draw.
        end: the symbol that ends a completion; ``None``: none does.
        temperature: of the policy.
        clip: how far a symbol's probability may move before it counts no more.
        beta: weight of the KL to the reference.
        scale: what advantages are measured in: standard deviations of the ``group`` of a prompt, or
            of the client's whole ``batch``, or ``none``.

    Source: Shao et al. 2024, equation 3 (arXiv:2402.03300).
    """
    least = rollouts.shortest(least, length)
    score, judged = rewards.find(reward), judge_from is not None
    play = rollouts.Play(info, score, samples, length, least, temperature, end, judged)
    build = rollouts.model(play, model)

    def collect(module: nn.Module, held: Columns, moment: Moment) -> Columns:
        made = rollouts.made(module, held, play, moment.seed)
        grouped = made.rewards.view(-1, samples)
        return rollouts.columns(
            play,
            tokens=made.tokens,
            counted=made.counted,
            then=made.then,
            reference=made.reference,
            advantage=of.group_advantages(grouped, scale).flatten(),
            reward=made.rewards,
            kl=made.strays,
        )

    def losses(forward: Forward, batch: Batch) -> Tensor:
        tokens = batch["tokens"].flatten(0, 1)
        now = of.log_probs(forward(tokens), tokens, temperature).view_as(batch["then"])
        each = surrogate(now, batch["then"], batch["advantage"][..., None], clip)
        each = each + beta * of.kl(now, batch["reference"])
        return rollouts.mean(each, batch["counted"]).mean(1)

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        return {"reward": batch["reward"].mean(1), "kl": batch["kl"].mean(1)}

    return Task(
        build,
        losses,
        metrics,
        decomposable=scale != "batch",
        unit=rollouts.UNIT,
        test=rollouts.test(play, build),
        collect=collect,
        collects_apart=scale != "batch",
        around=partial(Policy, judge=rollouts.judge(play, judge, judge_from)),
    )
