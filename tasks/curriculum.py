"""A curriculum: a round trains on the examples that its model finds easiest, more every round."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from umbel.core.errors import InputError
from umbel.core.run_file import Curriculum
from umbel.datasets.federated import Info, rows, take
from umbel.tasks.collect import Columns, Moment
from umbel.tasks.evaluate import BATCH, tensor_of
from umbel.tasks.task import Task


def paced(task: Task, section: Curriculum, info: Info) -> Task:
    """The task, whose clients begin a round by choosing which of their examples it trains on.

    Each example is scored by its loss under the model that the round starts from; nothing of that
    leaves the client, which still counts by all that it holds. With classes, each gives its share:
    the easiest of all would be of one class, while the model knows no more.

    Raises:
        InputError: the task makes its examples anew each round, or draws episodes.

    Source: Bengio et al. 2009 (ICML, "Curriculum learning"), for the order; Hacohen and Weinshall
    2019, Algorithm 1 and section 3 (arXiv:1904.03626), for pace and balance; the model under way as
    its own teacher is self-paced learning (Kumar et al. 2010).
    """
    if task.collect is not None or task.episodes is not None:
        raise InputError(
            "a curriculum chooses among examples, and this task draws its own",
            where="[task.curriculum]",
            fix="remove it, or choose another task",
        )

    def collect(module: nn.Module, held: Columns, moment: Moment) -> Columns:
        now = share(section, moment.round, moment.rounds)
        losses = _losses(task, module, held)
        labels = held["y"] if info.classes is not None else np.zeros(len(losses), np.int64)
        return take(held, chosen(losses, labels, now, hard=section.order == "hard"))

    return task._replace(collect=collect)


def share(section: Curriculum, round_number: int, rounds: int) -> float:
    """The share of its examples that a client trains on in a round, 1 … rounds.

    With t from 0 in the first round to 1 after ``full`` of all: ``a + (1 - a) t`` (linear);
    ``sqrt(a^2 + (1 - a^2) t)`` (root; Platanios et al. 2019, equation 7, arXiv:1903.09848);
    ``a^(1 - t)`` (exponential), a the share at the start.
    """
    t = min(1.0, (round_number - 1) / (section.full * rounds))
    a = section.start
    if section.pace == "linear":
        return a + (1 - a) * t
    if section.pace == "root":
        return float((a**2 + (1 - a**2) * t) ** 0.5)
    return float(a ** (1 - t))


def chosen(
    losses: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], now: float, *, hard: bool
) -> npt.NDArray[np.int64]:
    """The rows of least loss (of most, if ``hard``), of each label the share ``now``, rounded up;
    in the order that they had."""
    ranked = np.argsort(-losses if hard else losses, kind="stable")
    # How many of its label come before each row.
    before = np.zeros(len(losses), np.int64)
    sizes = np.zeros(len(losses), np.int64)
    for label in np.unique(labels):
        here = ranked[labels[ranked] == label]
        before[here] = np.arange(len(here))
        sizes[here] = len(here)
    # Less a hair: the share of 10 that is 0.3 is 3, whatever a float makes of it.
    found: npt.NDArray[np.int64] = np.flatnonzero(before < np.ceil(now * sizes - 1e-9))
    return found


def _losses(task: Task, module: nn.Module, held: Columns) -> npt.NDArray[np.float64]:
    """The loss of each example, (rows,); one that is not a number is the hardest."""
    device = next(module.parameters()).device
    found = []
    for start in range(0, rows(held), BATCH):
        batch = {n: tensor_of(c[start : start + BATCH]).to(device) for n, c in held.items()}
        found.append(task.losses(module, batch).double().cpu())
    losses: npt.NDArray[np.float64] = torch.cat(found).numpy()
    return np.where(np.isnan(losses), np.inf, losses)
