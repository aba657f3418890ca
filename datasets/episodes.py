"""Episodes: small problems of their own, drawn from many classes."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from umbel.core import randomness
from umbel.core.errors import InputError

Index: TypeAlias = npt.NDArray[np.int64]


class Episodes(NamedTuple):
    """N-way K-shot problems: ``ways`` classes with ``shots`` known and ``queries`` asked of each.

    An episode is a batch in this order: the support part, class by class, then the query part,
    class by class. A class is called by its place in the episode, 0 … ways-1.

    Source: Vinyals et al. 2016, section 2.2 (arXiv:1606.04080).
    """

    ways: int
    shots: int
    queries: int

    @property
    def known(self) -> int:
        """Examples in the support part."""
        return self.ways * self.shots

    @property
    def size(self) -> int:
        """Examples in an episode."""
        return self.ways * (self.shots + self.queries)

    def draw(self, stream: np.uint64, classes: Classes) -> Index:
        """The positions of one episode's examples, (size,), without repetition.

        Args:
            stream: key of the draw.
            classes: as :meth:`Classes.of` these episodes gave them.
        """
        each = self.shots + self.queries
        chosen = randomness.permutation(stream, len(classes.starts))[: self.ways]
        sizes = classes.ends[chosen] - classes.starts[chosen]
        orders = randomness.permutations(randomness.mix(stream, chosen.astype(np.uint64)), sizes)
        found = classes.order[classes.starts[chosen][:, None] + orders[:, :each]]
        return np.concatenate([found[:, : self.shots].ravel(), found[:, self.shots :].ravel()])


class Classes(NamedTuple):
    """Where the examples of each class are, for classes that have enough of them.

    Args:
        order: positions of all examples, class by class.
        starts: of each class in ``order``.
        ends: of each class in ``order``.
    """

    order: Index
    starts: Index
    ends: Index

    @classmethod
    def of(cls, labels: npt.NDArray[np.int64], episodes: Episodes, whose: str) -> Classes:
        """The classes that ``episodes`` can be drawn from.

        Args:
            labels: (n,) of all examples.
            episodes: what will be drawn.
            whose: for the error.

        Raises:
            InputError: there are too few classes with enough examples.
        """
        order = np.argsort(labels, kind="stable")
        cuts = np.flatnonzero(np.diff(labels[order])) + 1
        starts, ends = np.array([0, *cuts]), np.array([*cuts, len(order)])
        each = episodes.shots + episodes.queries
        enough = ends - starts >= each
        if enough.sum() < episodes.ways:
            raise InputError(
                f"{whose}: {int(enough.sum())} of {len(starts)} classes have {each} examples, and "
                f"an episode takes {episodes.ways}",
                where="[task]",
                fix="lower ways, shots or queries, or give clients more of each class",
            )
        return cls(order, starts[enough], ends[enough])
