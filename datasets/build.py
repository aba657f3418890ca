"""From ``[data]`` to a data set dealt to clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.core import registry, run_file, settings
from umbel.core.errors import InputError
from umbel.datasets.columns import strata
from umbel.datasets.deal import Deal, by_client
from umbel.datasets.federated import (
    Arrays,
    Dataset,
    FederatedData,
    Holdings,
    Info,
    Numbered,
    rows,
    take,
)
from umbel.datasets.holdout import stratified

DEFAULT_SHARE = 0.2


def load(section: run_file.Data, seed: int, site: str | None = None) -> FederatedData:
    """The data set that ``[data]`` names, dealt to clients; read-only from here on.

    ``section``, ``seed`` and the files decide the result. Where the files are a ``site``'s, no
    split is applied: they belong to the owners that they name, or else to the site alone. Test
    examples come, in this order, from

    1. ``holdout`` > 0: a stratified share of the training examples, the same for every split; the
       data set's own test part is then left out;
    2. the data set's own test part: each client's where the clients are its natural owners, else
       the global test set. With a ``client_holdout`` given, owners' test parts too are global;
    3. ``client_holdout``: a stratified share of each client's examples, which stays there. A client
       keeps one training example at least;
    4. where the data set has no test part: ``client_holdout`` 0.2 by default for natural clients,
       ``holdout`` 0.2 by default for all others.

    Raises:
        InputError: an unknown data set or split, a parameter that is not its own, a missing or
            damaged file, a split that cannot be made, a client without training examples.
    """
    data = read(section)
    if site is not None:
        data = _owned(data, site)
        section = section.model_copy(update={"split": None})
    split = section.split or run_file.Split(kind="iid" if data.owner is None else "natural")
    natural = split.kind == "natural"
    holdout, client_holdout = _shares(section, data, natural)
    if holdout:
        data = _hold_out(data, holdout, seed)
    names, holdings = _deal(data, split, seed)
    _require_examples(names, holdings)
    train, test = data.train, data.test
    client_test: Arrays | None = None
    client_test_holdings: Holdings | None = None
    if client_holdout:
        train, holdings, client_test, client_test_holdings = _keep_back(
            data.info, train, holdings, client_holdout, seed
        )
        if not rows(client_test):  # every client is too small to spare an example
            client_test = client_test_holdings = None
    elif natural and data.test_owner is not None and section.client_holdout is None:
        assert data.owner is not None
        assert test is not None
        client_test, client_test_holdings = _own_tests(names, data.owner, test, data.test_owner)
        test = None
    return _frozen(
        FederatedData(data.info, names, train, holdings, test, client_test, client_test_holdings)
    )


def read(section: run_file.Data) -> Dataset:
    """The data set that ``[data]`` names, whole.

    Raises:
        InputError: as :func:`load`.
    """
    reader = registry.find("datasets", section.name, "[data]")
    table = section.parameters()
    if section.path is not None:
        table["path"] = section.path
    owner = f"data set '{section.name}'"
    given = () if ":" in section.name else None
    data: Dataset = reader(**settings.arguments(reader, table, "[data]", owner, given))
    if not rows(data.train):
        raise InputError("no training examples", where=owner, fix="is the file empty?")
    return data


def strata_of(info: Info, arrays: Arrays) -> npt.NDArray[np.int64]:
    """What splits and stratified parts go by, shape (rows,): classes, deciles, or 0 for all."""
    if "y" not in arrays:
        return np.zeros(rows(arrays), dtype=np.int64)
    return strata(arrays["y"], info.classes)


def label_counts(data: FederatedData) -> npt.NDArray[np.int64]:
    """How many training examples of each class each client holds, shape (clients, classes).

    Real-valued targets are counted by decile.
    """
    labels = strata_of(data.info, data.train)[data.train_holdings.index]
    width = data.info.classes or int(labels.max(initial=0)) + 1
    client = np.repeat(np.arange(len(data.names)), data.train_holdings.sizes())
    counts = np.bincount(client * width + labels, minlength=len(data.names) * width)
    return counts.reshape(len(data.names), width)


def summary(data: FederatedData) -> dict[str, Any]:
    """Who holds how much, as plain values."""
    sizes = data.train_holdings.sizes()
    return {
        "dataset": data.info.name,
        "clients": len(data.names),
        "examples": int(sizes.sum()),
        "examples_per_client": {
            "min": int(sizes.min()),
            "median": float(np.median(sizes)),
            "max": int(sizes.max()),
        },
        "test_examples": rows(data.test) if data.test is not None else 0,
        "client_test_examples": rows(data.client_test) if data.client_test is not None else 0,
        "input_shape": list(data.info.input_shape),
        "classes": data.info.classes,
    }


def _shares(section: run_file.Data, data: Dataset, natural: bool) -> tuple[float, float]:
    """(holdout, client_holdout) with the defaults filled in."""
    holdout, client_holdout = section.holdout or 0.0, section.client_holdout or 0.0
    if data.test is None and not holdout:
        if natural and section.client_holdout is None:
            client_holdout = DEFAULT_SHARE
        if section.holdout is None and not (natural and client_holdout):
            holdout = DEFAULT_SHARE
    return holdout, client_holdout


def _owned(data: Dataset, site: str) -> Dataset:
    """The same, nobody else being named, as this owner's."""
    if data.owner is not None:
        return data
    test = None if data.test is None else np.full(rows(data.test), site)
    return replace(data, owner=np.full(rows(data.train), site), test_owner=test)


def _hold_out(data: Dataset, share: float, seed: int) -> Dataset:
    """Moves a share of the training examples to the global test set, in place of any of its own."""
    labels = strata_of(data.info, data.train)
    aside = stratified(labels, np.zeros(len(labels), np.int64), share, seed, "holdout")
    if not aside.any():
        raise InputError(
            f"holdout = {share} of {len(labels)} training examples is less than one",
            where="[data]",
            fix="a larger holdout, or 0 for no global test set",
        )
    keep = np.flatnonzero(~aside)
    return replace(
        data,
        train=take(data.train, keep),
        test=take(data.train, np.flatnonzero(aside)),
        owner=None if data.owner is None else data.owner[keep],
        test_owner=None,
    )


def _deal(data: Dataset, split: run_file.Split, seed: int) -> tuple[Sequence[str], Holdings]:
    """The clients' names, and which training examples they hold."""
    kind = registry.find("splits", split.kind, "[data.split]")
    own = ":" in split.kind
    given = ("deal",) if own else None
    table = settings.arguments(
        kind, split.parameters(), "[data.split]", f"split '{split.kind}'", given
    )
    deal = Deal(data.train["x"], strata_of(data.info, data.train), data.owner, seed)
    holdings: Holdings = kind(deal, **table)
    if split.kind == "natural":
        assert data.owner is not None
        first = holdings.index[holdings.offsets[:-1]]
        return [str(name) for name in data.owner[first]], holdings
    if own and not isinstance(holdings, Holdings):
        raise InputError(
            f"split '{split.kind}' gave {type(holdings).__name__}, expected Holdings",
            where="[data.split]",
            fix="return umbel.datasets.deal.by_client(client_of_each_row, clients)",
        )
    return Numbered(len(holdings)), holdings


def _require_examples(names: Sequence[str], holdings: Holdings) -> None:
    empty = np.flatnonzero(holdings.sizes() == 0)
    if len(empty):
        more = f", nor have {len(empty) - 1} others" if len(empty) > 1 else ""
        raise InputError(
            f"client '{names[int(empty[0])]}' has no training examples{more}",
            where="[data.split]",
            fix="fewer clients, or a minimum of 1 or more",
        )


def _keep_back(
    info: Info, train: Arrays, holdings: Holdings, share: float, seed: int
) -> tuple[Arrays, Holdings, Arrays, Holdings]:
    """Training part and test part of each client: arrays and holdings of both."""
    clients = len(holdings)
    client = np.repeat(np.arange(clients), holdings.sizes())
    labels = strata_of(info, train)[holdings.index]
    aside = stratified(labels, client, share, seed, "client-holdout")
    parts: list[Any] = []
    for chosen in (~aside, aside):
        # Rows of clients that were left out of a split stay in neither part.
        parts += [take(train, holdings.index[chosen]), by_client(client[chosen], clients)]
    return parts[0], parts[1], parts[2], parts[3]


def _own_tests(
    names: Sequence[str],
    owner: npt.NDArray[np.str_],
    test: Arrays,
    test_owner: npt.NDArray[np.str_],
) -> tuple[Arrays, Holdings]:
    """The owners' test parts; those of owners that the split left out are left out too."""
    stranger = np.setdiff1d(test_owner, owner)
    if len(stranger):
        raise InputError(
            f"'{stranger[0]}' owns test examples and no training examples",
            where="[data]",
            fix="give each owner of test examples training examples, or drop the test owners",
        )
    known = np.array(names)
    held = np.isin(test_owner, known)
    part = take(test, np.flatnonzero(held))
    return part, by_client(np.searchsorted(known, test_owner[held]), len(known))


def _frozen(data: FederatedData) -> FederatedData:
    columns = [c for a in (data.train, data.test, data.client_test) if a for c in a.values()]
    for held in (data.train_holdings, data.client_test_holdings):
        columns += [] if held is None else [held.offsets, held.index]
    for column in columns:
        column.flags.writeable = False
    return data
