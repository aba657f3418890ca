"""A data set in stages: which experience an example belongs to, and when each client meets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.core.randomness import client_keys, key, permutation
from umbel.core.run_file import Continual
from umbel.datasets.federated import Arrays, FederatedData, Holdings, Info, rows

Whole = npt.NDArray[np.int64]

WHERE = "[continual]"


@dataclass(frozen=True)
class Timetable:
    """Experiences 0 … count-1, and when clients meet them: known without a look at any data.

    Args:
        count: of experiences.
        classes: of the data set; 0: it has none.
        of_class: (classes,), the experience of each class; ``None`` where all have all classes.
        order: (clients, stages), what each client meets in each stage.
    """

    count: int
    classes: int
    of_class: Whole | None
    order: Whole

    @property
    def stages(self) -> int:
        """How many stages there are: as many as experiences, unless some clients are behind."""
        return int(self.order.shape[1])

    def earlier(self, place: int, stage: int) -> dict[int, int]:
        """The experiences that the client at ``place`` has left before ``stage``, in the order in
        which it met them, each with the last stage that it was in it."""
        order = self.order[place].tolist()
        left = {e: s for s, e in enumerate(order[:stage]) if e != order[stage]}
        return {e: left[e] for e in dict.fromkeys(order[:stage]) if e in left}

    def leaves(self, place: int, stage: int) -> bool:
        """Whether the client at ``place`` goes on to another experience after ``stage``."""
        following = self.order[place, stage + 1 : stage + 2]
        return not len(following) or bool(following[0] != self.order[place, stage])

    def begins(self, place: int) -> Whole:
        """(count,), the first stage in which the client at ``place`` is in each experience."""
        there = self.order[place][None, :] == np.arange(self.count)[:, None]
        first: Whole = there.argmax(1)
        return first

    def seen(self, stage: int) -> npt.NDArray[np.bool_]:
        """(classes,), which of them anybody has met by the end of ``stage``; none before 0."""
        if stage < 0:
            return np.zeros(self.classes, dtype=np.bool_)
        if self.of_class is None:
            return np.ones(self.classes, dtype=np.bool_)
        return np.isin(self.of_class, self.order[:, : stage + 1])


@dataclass(frozen=True)
class Stream:
    """A data set in stages.

    Args:
        data: the examples, their inputs as their experience has them. Test parts have a column
            ``experience``, (rows,) int64.
        times: when clients meet the experiences.
        of_row: (training rows,), the experience of each.
    """

    data: FederatedData
    times: Timetable
    of_row: Whole

    def of(self, place: int, experience: int) -> npt.NDArray[np.int32]:
        """The training rows of an experience that the client at ``place`` has."""
        held = self.data.train_holdings.of_client(place)
        rows: npt.NDArray[np.int32] = held[self.of_row[held] == experience]
        return rows

    def met(self, place: int, stage: int) -> npt.NDArray[np.int32]:
        """The training rows that the client at ``place`` meets in ``stage``."""
        return self.of(place, int(self.times.order[place, stage]))


def timetable(info: Info, names: Sequence[str], section: Continual, seed: int) -> Timetable:
    """When the clients of these names meet the experiences that ``[continual]`` asks for.

    Classes go to experiences in their order, as evenly as they can.

    Raises:
        InputError: fewer classes than experiences, or none; inputs that cannot be rotated.
    """
    count, of_class = section.experiences, None
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
    places = np.arange(count, dtype=np.int64)
    order = np.tile(places, (len(names), 1))
    if section.order == "shuffled":
        keys = client_keys(seed, "order of experiences", 0, names)
        order = np.stack([permutation(k, count) for k in keys])
    elif section.order == "staggered":
        stages, clients = count + section.lag, len(names)
        behind = permutation(key(seed, "order of experiences"), clients)
        behind = behind * (section.lag + 1) // clients
        order = np.clip(np.arange(stages)[None, :] - behind[:, None], 0, count - 1)
    return Timetable(count, info.classes or 0, of_class, order)


def stream(
    data: FederatedData, section: Continual, seed: int, order: Whole | None = None
) -> Stream:
    """The experiences that ``[continual]`` asks for.

    Classes go to experiences in their order, as evenly as they can, and so do a column's values. Of
    domains, the first has the inputs as they are; every example is in one of them, drawn from the
    seed.

    Args:
        data: the examples.
        section: how they are dealt.
        seed: of the run.
        order: (clients, stages), when clients meet them, where somebody else says so; ``None``: as
            ``section`` does.

    Raises:
        InputError: as :func:`timetable`; no such column, or fewer values in it than experiences.
    """
    times = timetable(data.info, data.names, section, seed)
    times = times if order is None else replace(times, order=order)
    count, of_class = times.count, times.of_class
    values = _values(data, section) if section.column is not None else None

    def whole(part: str, arrays: Arrays) -> Whole:
        if values is not None and section.column is not None:
            return _of_value(arrays, section.column, values, part) * count // len(values)
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
    dealt = replace(
        data,
        train=_shifted(data.train, of_row, section, seed),
        test=staged("test", data.test),
        client_test=staged("client test", data.client_test),
    )
    return Stream(dealt, times, of_row)


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


def _values(data: FederatedData, section: Continual) -> npt.NDArray[np.integer[Any]]:
    """The values of the column, in order: those that the run file lists, or all there are."""
    name, columns = section.column or "", sorted(data.train.keys() - {"x", "y"})
    column = data.train.get(name)
    if column is None or name in ("x", "y"):
        raise InputError(
            f"data set '{data.info.name}' has no column '{name}'; it has {columns or 'none'}",
            where=WHERE,
            fix="[data] columns names the arrays of an .npz that are columns",
        )
    if column.ndim != 1 or column.dtype.kind not in "iu":
        raise InputError(
            f"column '{name}' holds {column.dtype} of shape {column.shape[1:]} an example",
            where=WHERE,
            fix="one whole number an example",
        )
    listed = section.values
    values: npt.NDArray[np.integer[Any]] = np.unique(column if listed is None else listed)
    if len(values) < section.experiences:
        raise InputError(
            f"experiences = {section.experiences}, and column '{name}' has {len(values)} values",
            where=WHERE,
            fix=f"at most experiences = {len(values)}",
        )
    return values


def _of_value(arrays: Arrays, name: str, values: npt.NDArray[np.integer[Any]], part: str) -> Whole:
    """The place of each example's value among ``values``."""
    if name not in arrays:
        raise InputError(
            f"the {part} part has no column '{name}'",
            where=WHERE,
            fix=f"an array {name}_{part.split()[-1]}, or [data] holdout = 0.2",
        )
    unknown = np.setdiff1d(arrays[name], values)
    if len(unknown):
        raise InputError(
            f"value {unknown[0]} of column '{name}' is in the {part} part, and no experience is "
            "made of it",
            where=WHERE,
            fix="examples of the values that are trained on, or name it among values",
        )
    return np.searchsorted(values, arrays[name]).astype(np.int64)


def _shifted(arrays: Arrays, at: Whole, section: Continual, seed: int) -> Arrays:
    """The arrays with every input as its experience has it."""
    if section.by in ("class", "column"):
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
