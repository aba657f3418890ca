"""A policy from rewards, with a judge of its states, held near a reference."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

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


def ppo(
    info: Info,
    model: Part | str | None,
    *,
    reward: str = "share",
    judge: Part | str | None = None,
    judge_from: str | None = None,
    samples: Count = 4,
    length: Count = 16,
    least: Count | None = None,
    end: Natural | None = None,
    temperature: Positive = 1.0,
    clip: Share = 0.2,
    value_clip: Positive = 0.2,
    value_weight: NonNegative = 0.5,
    gae: Share = 0.95,
    whitening: bool = True,
    kl_weight: NonNegative = 0.1,
    kl_target: NonNegative = 6.0,
    kl_gain: Positive = 0.1,
) -> Task:
    """A policy from rewards, with a value head and an adaptive KL to its reference: PPO.

    Each round a client writes ``samples`` completions of each of its prompts, and trains on them. A
    symbol's reward is minus its KL to the reference, and at the last the completion's reward. The
    reference is the model as the run began (``init_from``): frozen, never sent.

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
        value_clip: how far a value may move in a round.
        value_weight: of the values' squared error.
        gae: lambda of the generalised advantage estimate; nothing is discounted.
        whitening: whether a client's advantages have mean 0 and variance 1.
        kl_weight: of the KL in the reward, at first.
        kl_target: nats a completion that the KL is steered to by the weight; 0: the weight stays.
        kl_gain: how fast it moves: a fifth of this in a step, at most.

    Source: Schulman et al. 2017, equation 7 (arXiv:1707.06347); Ziegler et al. 2019, sections 2.1
    and 2.2 (arXiv:1909.08593).
    """
    least = rollouts.shortest(least, length)
    score, judged = rewards.find(reward), judge_from is not None
    play = rollouts.Play(info, score, samples, length, least, temperature, end, judged)
    build = rollouts.model(play, model)
    controller = of.Controller(kl_target, kl_gain) if kl_target else None

    def collect(module: nn.Module, held: Columns, moment: Moment) -> Columns:
        made = rollouts.made(module, held, play, moment.seed)
        weight = cast(Policy, module).kl_weight
        values = made.outputs[:, :-1, 0] * made.counted
        each = weight * (made.reference - made.then) * made.counted
        each = each + made.rewards[:, None] * rollouts.last(made.counted)
        advantage = rollouts.advantages(each, values, made.counted, gae)
        returns = advantage + values
        if whitening:
            advantage = of.whiten(advantage, made.counted)
        return rollouts.columns(
            play,
            tokens=made.tokens,
            counted=made.counted,
            then=made.then,
            values=values,
            returns=returns,
            advantage=advantage,
            reward=made.rewards,
            kl=made.strays,
        )

    def losses(forward: Forward, batch: Batch) -> Tensor:
        tokens, then = batch["tokens"].flatten(0, 1), batch["then"]
        out = forward(tokens, kl=batch["kl"])
        now = of.log_probs(out[..., :-1], tokens, temperature).view_as(then)
        values = out[:, :-1, -1].float().view_as(then)
        each = surrogate(now, then, batch["advantage"], clip)
        error = of.clipped_value(values, batch["values"], batch["returns"], value_clip)
        return rollouts.mean(each + value_weight * error, batch["counted"]).mean(1)

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        return {"reward": batch["reward"].mean(1), "kl": batch["kl"].mean(1)}

    around = partial(
        Policy,
        values=True,
        kl_weight=kl_weight,
        controller=controller,
        judge=rollouts.judge(play, judge, judge_from),
    )
    return Task(
        build,
        losses,
        metrics,
        decomposable=not whitening,
        unit=rollouts.UNIT,
        test=rollouts.test(play, build),
        collect=collect,
        collects_apart=not whitening,
        around=around,
    )
