"""The random bits of one task: the batches that are drawn, and the noise that is added.

At a site both come from the operating system: a server that knew the seed of the batches would know
who is in them, and sampling would amplify nothing. A simulation repeats: its bits are functions of
the run's seed, protect nobody, and stand in every record as ``seeded``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from umbel.core import randomness
from umbel.core.trees import Tree
from umbel.privacy.noise import add_gaussian
from umbel.privacy.streams import Generator, Stream, seeded_stream, system_stream


class Source(NamedTuple):
    """Where one client's (or the server's) bits of one round come from.

    Args:
        stream: words, for what is drawn with exact probabilities.
        add_gaussian: (float tree, std) -> the tree plus N(0, std^2 I), in the tree's dtypes.
    """

    stream: Stream
    add_gaussian: Callable[[Tree, float], dict[str, torch.Tensor]]

    @property
    def generator(self) -> Generator:
        """``os`` or ``seeded``."""
        return self.stream.generator


Sources: TypeAlias = Callable[[int, str], Source]
"""(round, client or ``server``) -> its source."""


def system_sources() -> Sources:
    """Bits that nobody can repeat."""
    stream = system_stream()
    source = Source(stream, lambda tree, std: add_gaussian(tree, std, stream))
    return lambda round_number, who: source


def seeded_sources(seed: int) -> Sources:
    """For simulation alone: bits that are functions of (seed, round, client).

    The noise is torch's own float32 normal, forty times as fast as the cryptographic one: its tail
    ends at 5.8 standard deviations.
    """

    def of(round_number: int, who: str) -> Source:
        stream = seeded_stream(seed, "batches", round_number, who)
        generator = torch.Generator()
        generator.manual_seed(randomness.torch_seed(seed, "privacy noise", round_number, who))
        return Source(stream, lambda tree, std: _seeded(tree, std, generator))

    return of


def _seeded(tree: Tree, std: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if std == 0:
        return dict(tree)
    names = sorted(tree)
    sizes = [tree[name].numel() for name in names]
    drawn = torch.split(torch.empty(sum(sizes)).normal_(generator=generator), sizes)
    noise = dict(zip(names, drawn, strict=True))
    return {
        name: t.add(noise[name].view(t.shape).to(t.device, t.dtype), alpha=std)
        for name, t in tree.items()
    }


def poisson(stream: Stream, n: int, parts: int) -> npt.NDArray[np.int64]:
    """Which of ``n`` examples are in a batch: each with probability 1 / ``parts``, by itself.

    Exact to 2^-64. May be empty.

    Returns:
        positions, ascending.
    """
    if parts == 1:
        return np.arange(n)
    return np.flatnonzero(stream.words(n) < np.uint64(2**64 // parts)).astype(np.int64)
