"""Completions: greedy, sampled, or by beam search, from any model of the next symbol.

A model is (B, T) symbols -> (B, T, symbols) and no symbol sees those after it: the shorter prompts
of a batch are completed in their own rows, with what follows not yet written. All draws come from
the generator that is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How the next symbol is chosen; filters apply in this order.

    Args:
        repetition_penalty: > 0; scores of symbols that the row holds are divided by it, negative
            ones multiplied.
        temperature: scores are divided by it; 0: the likeliest symbol is taken.
        top_k: only so many of the likeliest are drawn from; ``None``: all.
        top_p: only the fewest likeliest whose probabilities add up to this.
        end: the symbol that ends a completion; ``None``: none does.

    Source: Keskar et al. 2019, section 4.1 (arXiv:1909.05858), the penalty; Fan, Lewis and Dauphin
    2018, section 5.3 (arXiv:1805.04833), top-k; Holtzman et al. 2020, equations 2 and 3
    (arXiv:1904.09751), top-p.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    end: int | None = None


class Completed(NamedTuple):
    """Prompts with their completions.

    Args:
        tokens: (B, P + new): prompt, completion, and filling up to the end.
        written: (B, P + new) bool: which of them are the completion, its end symbol included.
    """

    tokens: Tensor
    written: Tensor


@torch.no_grad()
def generate(
    forward: Callable[[Tensor], Tensor],
    prompts: Tensor,
    lengths: Tensor,
    new: int | tuple[int, int],
    sampling: Sampling,
    draw: torch.Generator,
    filling: int = 0,
) -> Completed:
    """A completion of each prompt.

    Args:
        forward: the model, without dropout.
        prompts: (B, P) int64, filled up at their ends.
        lengths: (B,): how many symbols of each row are the prompt; at least one.
        new: symbols of a completion, at most; or the least and the most, between which each row's
            number is drawn.
        sampling: how symbols are chosen.
        draw: of the CPU, so that all devices draw the same.
        filling: the symbol that stands where nothing does.
    """
    least, most = (new, new) if isinstance(new, int) else new
    rows, device = torch.arange(len(prompts), device=prompts.device), prompts.device
    tokens, lengths = _with_room(prompts, lengths, most, filling)
    allowed = torch.randint(least, most + 1, (len(prompts),), generator=draw).to(device)
    written = torch.zeros_like(tokens, dtype=torch.bool)
    place = torch.arange(tokens.shape[1], device=device)
    for step in range(most):
        at = lengths + step
        logits = forward(tokens)[rows, at - 1].float()
        logits = warp(logits, sampling, tokens, place < at[:, None])
        uniform = torch.rand(len(prompts), generator=draw, dtype=torch.float64).to(device)
        going = step < allowed
        tokens[rows[going], at[going]] = choose(logits, sampling, uniform)[going]
        written[rows[going], at[going]] = True
        if sampling.end is not None:
            allowed = torch.where(going & (tokens[rows, at] == sampling.end), step, allowed)
        if not bool((allowed > step + 1).any()):
            break
    return Completed(tokens, written)


def warp(logits: Tensor, sampling: Sampling, tokens: Tensor, held: Tensor) -> Tensor:
    """Scores of the next symbol after the filters; what is not drawn from is -inf.

    Args:
        logits: (B, symbols).
        sampling: the filters.
        tokens: (B, T), what the rows hold.
        held: (B, T) bool, how much of it counts.
    """
    if (penalty := sampling.repetition_penalty) != 1:
        seen = torch.zeros_like(logits, dtype=torch.long).scatter_add(1, tokens, held.long()) > 0
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature:
        logits = logits / sampling.temperature
    if sampling.top_k is not None:
        worst = logits.topk(min(sampling.top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        shares = ordered.double().softmax(1)
        # A symbol stays if those that are likelier do not yet add up to top_p: the first always.
        late = shares.cumsum(1) - shares >= sampling.top_p
        late[:, 0] = False
        logits = logits.masked_fill(late.gather(1, order.argsort(1)), -torch.inf)
    return logits


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The symbol at ``uniform`` of the cumulated probabilities, (B,); the best at temperature 0."""
    if not sampling.temperature:
        return logits.argmax(1)
    below = logits.double().softmax(1).cumsum(1)
    # The last sum may be a rounding short of 1.
    drawn = torch.searchsorted(below, (uniform * below[:, -1])[:, None], right=True)[:, 0]
    return drawn.clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def beam(
    forward: Callable[[Tensor], Tensor],
    prompts: Tensor,
    lengths: Tensor,
    new: int,
    width: int,
    end: int | None = None,
    length_penalty: float = 0.0,
    filling: int = 0,
) -> tuple[Completed, Tensor]:
    """The likeliest completion that a beam of ``width`` finds for each prompt, and its score.

    Args:
        forward: the model, without dropout.
        prompts: (B, P) int64, filled up at their ends.
        lengths: (B,): how many symbols of each row are the prompt; at least one.
        new: symbols of a completion, at most.
        width: completions that are followed; at ``symbols ** (new - 1)`` the search is exhaustive.
        end: the symbol that ends a completion; ``None``: none does.
        length_penalty: the log-probability is divided by the number of symbols to this power:
            above 0 for longer completions.
        filling: the symbol that stands where nothing does.

    Returns:
        the completions, and scores (B,).
    Source: Wu et al. 2016, section 7 (arXiv:1609.08144), with ``|Y| ** alpha`` as the penalty.
    """
    count, device = len(prompts), prompts.device
    tokens, starts = _with_room(prompts, lengths, new, filling)
    tokens, at = tokens.repeat_interleave(width, 0), starts.repeat_interleave(width)
    rows, base = torch.arange(len(tokens), device=device), torch.arange(count, device=device)
    # All beams of a prompt are one at first.
    scores = torch.full((count, width), -torch.inf, dtype=torch.float64, device=device)
    scores[:, 0] = 0
    sizes, over = torch.zeros_like(at), torch.zeros_like(at, dtype=torch.bool)
    for step in range(new):
        each = forward(tokens)[rows, at + step - 1].double().log_softmax(1)
        symbols = each.shape[1]
        # What has ended goes on in one way, at no cost.
        only = torch.full_like(each, -torch.inf)
        only[:, 0] = 0
        each = scores.view(-1, 1) + torch.where(over[:, None], only, each)
        scores, best = each.view(count, -1).topk(width, dim=1)
        source = (base[:, None] * width + best // symbols).view(-1)
        tokens, sizes, over = tokens[source], sizes[source], over[source]
        on = ~over
        tokens[rows[on], at[on] + step] = (best % symbols).view(-1)[on]
        sizes = sizes + on
        if end is not None:
            over = over | (on & (tokens[rows, at + step] == end))
    ranked = scores / sizes.view(count, width).double() ** length_penalty
    chosen = base * width + ranked.argmax(1)
    place = torch.arange(tokens.shape[1], device=device)
    written = (place >= starts[:, None]) & (place < (starts + sizes[chosen])[:, None])
    return Completed(tokens[chosen], written), ranked.max(1).values


def _with_room(prompts: Tensor, lengths: Tensor, new: int, filling: int) -> tuple[Tensor, Tensor]:
    """A copy with ``new`` more columns, filled up behind the prompts; and the lengths there."""
    room = torch.full((len(prompts), new), filling, dtype=prompts.dtype, device=prompts.device)
    tokens, lengths = torch.cat([prompts, room], 1), lengths.to(prompts.device)
    behind = torch.arange(tokens.shape[1], device=prompts.device) >= lengths[:, None]
    return tokens.masked_fill(behind, filling), lengths
