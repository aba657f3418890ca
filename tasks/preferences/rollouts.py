"""What a policy writes to prompts, how likely that was, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.datasets.federated import Info
from umbel.tasks import begin
from umbel.tasks.collect import Columns
from umbel.tasks.evaluate import tensor_of
from umbel.tasks.language import symbols
from umbel.tasks.language.generation import Sampling, generate
from umbel.tasks.models.build import builder
from umbel.tasks.preferences import rewards
from umbel.tasks.preferences.losses import divergence, log_probs
from umbel.tasks.reinforcement import returns
from umbel.tasks.task import Batch, Forward, Task

SCORES = 1 << 26
"""Scores of symbols that one computation may make: 256 MiB."""

UNIT = "prompt with all its completions"


class Play(NamedTuple):
    """How completions are written.

    Args:
        info: of the prompts.
        reward: what they are worth.
        samples: completions of each prompt.
        length: symbols of a completion, at most.
        least: its number of symbols is drawn between this and ``length``; ``None``: no draw.
        temperature: > 0; of the policy, in training and evaluation alike.
        end: the symbol that ends a completion; ``None``: none does.
        judged: whether a reward model is asked what they are worth.
    """

    info: Info
    reward: rewards.Reward
    samples: int
    length: int
    least: int | None
    temperature: float
    end: int | None
    judged: bool = False

    def sampling(self) -> Sampling:
        """How symbols are drawn: from the policy as it is, which the losses' ratios assume."""
        return Sampling(temperature=self.temperature, end=self.end)


class Rollouts(NamedTuple):
    """R completions, those of a prompt one after another; target t is symbol t + 1.

    Args:
        tokens: (R, T), prompt and completion.
        counted: (R, T - 1), whether target t is the completion's.
        then: (R, T - 1), its log-probability under the policy that wrote it.
        reference: (R, T - 1), under the reference.
        strays: (R,), the KL to the reference in nats: exact at each symbol, summed over them.
        outputs: (R, T, …), what the policy gave besides the symbols' scores.
        rewards: (R,).
    """

    tokens: Tensor
    counted: Tensor
    then: Tensor
    reference: Tensor
    strays: Tensor
    outputs: Tensor
    rewards: Tensor


@torch.no_grad()
def roll_out(
    forward: Forward, held: Mapping[str, Tensor], play: Play, samples: int, seed: int
) -> Rollouts:
    """``samples`` completions of each prompt.

    Args:
        forward: the policy with its reference, without dropout.
        held: ``x`` (n, P), prompts, and what the reward reads.
        play: how they are written.
        samples: of each prompt.
        seed: of the draws.
    """
    draw = torch.Generator().manual_seed(seed)
    records = {name: column.repeat_interleave(samples, 0) for name, column in held.items()}
    a_row = (held["x"].shape[1] + play.length) * symbols.vocabulary(play.info, "a policy")
    most = max(1, SCORES // a_row)
    parts = [
        _some(forward, {n: c[start : start + most] for n, c in records.items()}, play, draw)
        for start in range(0, len(records["x"]), most)
    ]
    return Rollouts(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _some(
    forward: Forward, records: dict[str, Tensor], play: Play, draw: torch.Generator
) -> Rollouts:
    info, prompts = play.info, records["x"]
    assert info.vocabulary is not None
    count, filling = info.vocabulary, info.padding or 0
    lengths = symbols.inside(prompts, info.padding).sum(1)

    def next_symbols(tokens: Tensor) -> Tensor:
        return forward(tokens)[..., :count]

    new = play.length if play.least is None else (play.least, play.length)
    done = generate(next_symbols, prompts, lengths, new, play.sampling(), draw, filling)
    whole = forward(done.tokens)
    logits = symbols.check(whole[..., :count], done.tokens, count)
    before = forward(done.tokens, reference=True)
    counted = done.written[:, 1:]
    if play.judged:
        records = {**records, rewards.JUDGED: forward(done.tokens, judge=True)[:, 0].float()}
    return Rollouts(
        done.tokens,
        counted,
        log_probs(logits, done.tokens, play.temperature),
        log_probs(before, done.tokens, play.temperature),
        (divergence(logits, before, play.temperature) * counted).sum(1),
        whole[..., count:].float(),
        _rewards(done.tokens, done.written, lengths, records, play),
    )


def _rewards(
    tokens: Tensor, written: Tensor, lengths: Tensor, records: dict[str, Tensor], play: Play
) -> Tensor:
    # All completions begin in the first column.
    place = lengths[:, None] + torch.arange(play.length, device=tokens.device)
    inside = written.gather(1, place)
    completions = tokens.gather(1, place)
    if play.end is not None:
        inside = inside & (completions != play.end)
    given = dict(records)
    if "answer" in records and play.info.padding is not None:
        padding = records["answer"] == play.info.padding
        given["answer"] = records["answer"].masked_fill(padding, rewards.PADDING)
    completions = completions.masked_fill(~inside, rewards.PADDING)
    found = play.reward(completions, inside.sum(1), given)
    if found.shape != (len(tokens),):
        raise InputError(
            f"the reward of {len(tokens)} completions has shape {tuple(found.shape)}",
            where="[task] reward",
            fix="return one number a completion",
        )
    return found.float()


def made(module: nn.Module, held: Columns, play: Play, seed: int) -> Rollouts:
    """:func:`roll_out` of what a client holds, on the module's device."""
    device = next(module.parameters()).device
    columns = {name: tensor_of(column).to(device) for name, column in held.items()}
    return roll_out(module, columns, play, play.samples, seed)


def shortest(least: int | None, length: int) -> int | None:
    """``least``, if it is no more than ``length``.

    Raises:
        InputError: it is more.
    """
    if least is not None and least > length:
        raise InputError(
            f"least = {least} is more than length = {length}", where="[task]", fix="swap them"
        )
    return least


def mean(values: Tensor, counted: Tensor) -> Tensor:
    """The means over the symbols of each completion, (…, T) -> (…)."""
    return symbols.mean(values, counted)


def last(counted: Tensor) -> Tensor:
    """Which symbol of each completion is its last, (R, T) bool."""
    behind = counted.flip(1).cumsum(1).flip(1)
    return counted & (behind == 1)


def advantages(rewards: Tensor, values: Tensor, counted: Tensor, decay: float) -> Tensor:
    """Generalised advantage estimates of each symbol of a completion, without discount, (R, T).

    Args:
        rewards: (R, T), of each symbol.
        values: (R, T), of the state before it; 0 outside the completion.
        counted: (R, T), what the completion is.
        decay: lambda.
    """
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    ends = last(counted).T.cpu().numpy()
    steps = [t.T.double().cpu().numpy() for t in (rewards, values, following)]
    found = returns.advantages(steps[0], steps[1], steps[2], ends, ends, 1.0, decay)
    return torch.from_numpy(found.T.copy()).to(values) * counted


def columns(play: Play, **tensors: Tensor) -> Columns:
    """(R, …) tensors as columns (n, samples, …), a row a prompt."""
    return {
        name: t.reshape(-1, play.samples, *t.shape[1:]).cpu().numpy() for name, t in tensors.items()
    }


def model(play: Play, part: Part | str | None) -> Callable[[], nn.Module]:
    """What builds the policy, with room for prompt and completion."""
    count = symbols.vocabulary(play.info, "a policy")
    return builder(part or "gpt", _whole(play), count, "causal")


def judge(play: Play, part: Part | str | None, file: str | None) -> Callable[[], nn.Module] | None:
    """What builds the reward model, of the run whose model ``file`` is; ``None``: there is none.

    Raises:
        InputError: no such model.
    """
    if file is None:
        return None
    build = builder(part or "gpt", _whole(play), 1, "class")
    return partial(begin.whole, build, file, "[task] judge_from")


def _whole(play: Play) -> Info:
    """Of prompts with their completions."""
    return replace(play.info, input_shape=(play.info.input_shape[0] + play.length,))


def test(play: Play, build: Callable[[], nn.Module]) -> Task:
    """What evaluation measures: one completion of each prompt, the same draws each time.

    ``loss`` is the reward, negative; ``kl`` in nats a completion.
    """

    def losses(forward: Forward, batch: Batch) -> Tensor:
        return -roll_out(forward, batch, play, 1, 0).rewards

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        found = roll_out(forward, batch, play, 1, 0)
        return {"reward": found.rewards, "kl": found.strays}

    return Task(build, losses, metrics)
