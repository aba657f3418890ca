"""Completions against exact distributions, an exhaustive search, and rows of their own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from umbel.tasks.language.generation import Sampling, beam, choose, generate, warp

SYMBOLS = 5
TABLE = torch.randn(SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(0)).double()


def chain(tokens: Tensor) -> Tensor:
    """A Markov chain: scores of the next symbol from the one before."""
    return TABLE[tokens]


def looks_back(tokens: Tensor) -> Tensor:
    """Scores that depend on all symbols so far and none after them."""
    weights = torch.arange(1, tokens.shape[1] + 1).double()
    past = ((tokens + 1) * weights).cumsum(1)
    return torch.sin(past[..., None] * torch.arange(1, SYMBOLS + 1).double())


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of 1, 2 and 3 symbols; 0 behind them."""
    return torch.tensor([[1, 0, 0], [2, 3, 0], [4, 1, 2]]), torch.tensor([1, 2, 3])


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(rows: int, sampling: Sampling, held: Tensor | None = None) -> Tensor:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -2.0]]).expand(rows, -1)
    tokens = torch.zeros(rows, 2, dtype=torch.long) if held is None else held
    return warp(logits, sampling, tokens, torch.full(tokens.shape, held is not None))


def test_greedy_takes_the_best_and_every_row_goes_on_where_its_prompt_ends() -> None:
    tokens, lengths = prompts()
    found = generate(looks_back, tokens, lengths, 4, Sampling(temperature=0), draw())
    for row, length in enumerate(lengths.tolist()):
        alone = tokens[row : row + 1, :length]
        for _ in range(4):
            best = looks_back(alone)[0, -1].argmax()
            alone = torch.cat([alone, best[None, None]], 1)
        assert found.tokens[row, : length + 4].tolist() == alone[0].tolist()
        assert found.written[row].nonzero().flatten().tolist() == list(range(length, length + 4))
        assert not found.tokens[row, length + 4 :].any()


def test_an_end_symbol_ends_a_row_and_nothing_follows_it() -> None:
    count, end = 200, 2
    tokens = torch.ones(count, 1, dtype=torch.long)
    sampling = Sampling(end=end)
    found = generate(chain, tokens, torch.ones(count, dtype=torch.long), 6, sampling, draw(), 4)
    for row, written in zip(found.tokens.tolist(), found.written.tolist(), strict=True):
        stop = row.index(end, 1) if end in row[1:] else 6
        assert written == [False] + [place <= stop for place in range(1, 7)]
        assert row[stop + 1 :] == [4] * (6 - stop)
    assert {2, 3, 6} < {sum(written) for written in found.written.tolist()} | {6}


def test_lengths_are_drawn_between_the_least_and_the_most() -> None:
    count = 3000
    tokens = torch.ones(count, 1, dtype=torch.long)
    found = generate(chain, tokens, torch.ones(count).long(), (2, 4), Sampling(), draw())
    sizes = found.written.sum(1).bincount(minlength=6).tolist()
    assert sizes[:2] == [0, 0]
    assert sizes[5:] == [0]
    # 3,000 draws of a third: six standard deviations are 155.
    assert all(abs(size - 1000) < 155 for size in sizes[2:5])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(top_k=2),
        Sampling(top_p=0.8),
        Sampling(temperature=2.0, top_k=4, top_p=0.9),
    ],
)
def test_draws_have_the_exact_distribution(sampling: Sampling) -> None:
    count = 20_000
    plain = [2.0, 1.0, 0.5, -1.0, -2.0]
    shares = (torch.tensor(plain).double() / sampling.temperature).softmax(0).tolist()
    kept = list(range(5))[: sampling.top_k]
    inside = sum(shares[k] for k in kept)
    whole, before = [], 0.0
    for k in kept:
        if before < sampling.top_p:
            whole.append(k)
        before += shares[k] / inside
    total = sum(shares[k] for k in whole)
    expected = [shares[k] / total if k in whole else 0.0 for k in range(5)]
    uniform = torch.rand(count, generator=draw(1), dtype=torch.float64)
    found = choose(scores(count, sampling), sampling, uniform).bincount(minlength=5) / count
    for share, truth in zip(found.tolist(), expected, strict=True):
        assert abs(share - truth) <= 6 * (truth * (1 - truth) / count) ** 0.5


def test_a_roll_out_draws_the_chain() -> None:
    count = 20_000
    tokens = torch.ones(count, 1, dtype=torch.long)
    found = generate(chain, tokens, torch.ones(count).long(), 2, Sampling(), draw(2)).tokens
    first, step = TABLE[1].softmax(0), TABLE.softmax(1)
    for a, b in itertools.product(range(SYMBOLS), repeat=2):
        truth = float(first[a] * step[a, b])
        share = float(((found[:, 1] == a) & (found[:, 2] == b)).double().mean())
        assert abs(share - truth) <= 6 * (truth * (1 - truth) / count) ** 0.5
    again = generate(chain, tokens, torch.ones(count).long(), 2, Sampling(), draw(2)).tokens
    assert torch.equal(again, found)


def test_the_penalty_meets_symbols_that_the_row_holds_and_no_filling() -> None:
    sampling = Sampling(repetition_penalty=2.0, temperature=1.0)
    held = torch.tensor([[0, 3]])
    assert scores(1, sampling, held).tolist() == [[1.0, 1.0, 0.5, -2.0, -2.0]]
    counted = torch.tensor([[False, True]])
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -2.0]])
    assert warp(logits, sampling, held, counted).tolist() == [[2.0, 1.0, 0.5, -2.0, -2.0]]


def every(prompt: list[int], new: int, end: int | None) -> dict[tuple[int, ...], float]:
    """All completions of a prompt and their log-probabilities."""
    found: dict[tuple[int, ...], float] = {}
    for symbols in itertools.product(range(SYMBOLS), repeat=new):
        stop = symbols.index(end) + 1 if end in symbols else new
        short = symbols[:stop]
        each = looks_back(torch.tensor([prompt + list(short)]))[0].log_softmax(1)
        found[short] = sum(float(each[len(prompt) + i - 1, s]) for i, s in enumerate(short))
    return found


@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_is_an_exhaustive_search(end: int | None, penalty: float) -> None:
    tokens, lengths = prompts()
    done, score = beam(looks_back, tokens, lengths, 3, SYMBOLS**2 * 2, end, penalty)
    for row, length in enumerate(lengths.tolist()):
        whole = every(tokens[row, :length].tolist(), 3, end)
        ranked = {short: p / len(short) ** penalty for short, p in whole.items()}
        best = max(ranked, key=lambda short: ranked[short])
        assert tuple(done.tokens[row][done.written[row]].tolist()) == best
        assert float(score[row]) == pytest.approx(ranked[best], abs=1e-9)


def test_a_beam_of_one_is_greedy_and_a_wider_one_is_no_worse() -> None:
    tokens, lengths = prompts()
    greedy = generate(looks_back, tokens, lengths, 4, Sampling(temperature=0), draw())
    one, low = beam(looks_back, tokens, lengths, 4, 1)
    assert torch.equal(one.tokens, greedy.tokens)
    _, high = beam(looks_back, tokens, lengths, 4, 3)
    assert bool((high >= low - 1e-12).all())
