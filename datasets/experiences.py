"""A data set in stages: which experience an example belongs to, and when each client meets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.core.randomness import client_keys, key, permutation
from umbel.core.run_file import Continual
from umbel.datasets.federated import Arrays, FederatedData, Holdings, rows

Whole = npt.NDArray[np.int64]

WHERE = "[continual]"


@dataclass(frozen=True)
class Stream:
    """Experiences 0 … count-1, and the order in which clients meet them.

    Args:
        data: the examples, their inputs as their experience has them. Test parts have a column
            ``experience``, (rows,) int64.
        count: of experiences, and of stages.
        of_row: (training rows,), the experience of each.
        of_class: (classes,), the same of each class; ``None`` where all have all classes.
        order: (clients, count), what each client meets in each stage.
    """

    data: FederatedData
    count: int
    of_row: Whole
    of_class: Whole | None
    order: Whole

    def met(self, place: int, stage: int) -> npt.NDArray[np.int32]:
        """The training rows that the client at ``place`` meets in ``stage``."""
        held = self.data.train_holdings.of_client(place)
        rows: npt.NDArray[np.int32] = held[self.of_row[held] == self.order[place, stage]]
        return rows

    def seen(self, stage: int) -> npt.NDArray[np.bool_]:
        """(classes,), which of them anybody has met by the end of ``stage``."""
        classes = self.data.info.classes or 0
        if self.of_class is None:
            return np.ones(classes, dtype=np.bool_)
        return np.isin(self.of_class, self.order[:, : stage + 1])


def stream(data: FederatedData, section: Continual, seed: int) -> Stream:
    """The experiences that ``[continual]`` asks for.

    Classes go to experiences in their order, as evenly as they can. Of domains, the first has the
    inputs as they are; every example is in one of them, drawn from the seed.

    Raises:
        InputError: fewer classes than experiences, no classes, or inputs that cannot be rotated.
    """
    count, info = section.experiences, data.info
    of_class = None
    if section.by == "class":
        if info.classes is None or info.classes < count:
            raise InputError(
                f"experiences = {count} by class, and data set '{info.name}' has "
                f"{info.classes or 'no'} classes",
                where=WHERE,
                fix="fewer experiences, or by = 'permutation'",
            )
        of_class = np.arange(info.classes, dtype=np.int64) * count // info.classes
    if section.by == "rotation" and len(info.input_shape) < 2:
        raise InputError(
            f"inputs of shape {info.input_shape} cannot be rotated",
            where=WHERE,
            fix="by = 'permutation'",
        )

    def whole(part: str, arrays: Arrays) -> Whole:
        if of_class is not None:
            return of_class[arrays["y"]]
        n = rows(arrays)
        return permutation(key(seed, "experiences", part), n) * count // n

    def staged(part: str, arrays: Arrays | None) -> Arrays | None:
        if arrays is None:
            return None
        at = whole(part, arrays)
        return {**_shifted(arrays, at, section, seed), "experience": at}

    of_row = whole("train", data.train)
    places = np.arange(count, dtype=np.int64)
    order = np.tile(places, (len(data.names), 1))
    if section.order == "shuffled":
        keys = client_keys(seed, "order of experiences", 0, data.names)
        order = np.stack([permutation(k, count) for k in keys])
    dealt = replace(
        data,
        train=_shifted(data.train, of_row, section, seed),
        test=staged("test", data.test),
        client_test=staged("client test", data.client_test),
    )
    return Stream(dealt, count, of_row, of_class, order)


def of_stage(
    stream: Stream, parts: Sequence[npt.NDArray[np.integer]], columns: Arrays | None = None
) -> FederatedData:
    """The training data of one stage; clients without a row in it are left out.

    Args:
        stream: the experiences.
        parts: the rows of each client, which may repeat.
        columns: further columns of all training rows.
    """
    data = stream.data
    there = [place for place, part in enumerate(parts) if len(part)]
    return replace(
        data,
        names=[data.names[place] for place in there],
        train={**data.train, **(columns or {})},
        train_holdings=Holdings.of([parts[place] for place in there]),
        test=None,
        client_test=None,
        client_test_holdings=None,
    )


def _shifted(arrays: Arrays, at: Whole, section: Continual, seed: int) -> Arrays:
    """The arrays with every input as its experience has it."""
    if section.by == "class":
        return arrays
    x = np.array(arrays["x"])
    for experience in range(1, section.experiences):
        here = np.flatnonzero(at == experience)
        if section.by == "permutation":
            flat = x[here].reshape(len(here), -1)
            mixed = permutation(key(seed, "permutation", experience), flat.shape[1])
            x[here] = flat[:, mixed].reshape(x[here].shape)
        else:
            x[here] = _rotated(x[here], np.pi * experience / section.experiences)
    return {**arrays, "x": x}


def _rotated(x: npt.NDArray[np.float32], angle: float) -> npt.NDArray[np.float32]:
    """Pictures (B, H, W) or (B, C, H, W) about their centre, bilinear, 0 from outside."""
    pictures = torch.from_numpy(x.reshape(len(x), -1, *x.shape[-2:]))
    cos, sin = np.cos(angle), np.sin(angle)
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], dtype=pictures.dtype)
    grid = F.affine_grid(turn.expand(len(x), 2, 3), list(pictures.shape), align_corners=False)
    turned = F.grid_sample(pictures, grid, align_corners=False)
    return turned.reshape(x.shape).numpy()
