"""A site's own account of its patients' privacy: written before it trains, whatever a server says.

One ledger for each data set that the site names, and unit of privacy, over all runs and servers.
The budget and the delta are the site's own. A record in two of its data sets is protected by the
sum of both budgets.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.core.versions import versions
from umbel.privacy.entries import Entry
from umbel.privacy.ledger import Ledger, Spent
from umbel.privacy.mechanisms import Unit
from umbel.privacy.participation import release

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a data set may be called."""

DELTA = 1e-5


class Account(NamedTuple):
    """Where and how strictly a site keeps its ledger.

    Args:
        folder: of the ledgers.
        site: its name.
        dataset: what the site calls the data; another name is another ledger.
        budget: the most epsilon over all runs; ``None``: no limit.
        delta: at which epsilon is counted.
    """

    folder: Path
    site: str
    dataset: str = "data"
    budget: float | None = None
    delta: float = DELTA


def account(site: str, config: Mapping[str, Any]) -> Account:
    """From a node's configuration: ``folder`` or ``ledger``, ``dataset``, ``epsilon``, ``delta``.

    Raises:
        InputError: there is no place for the ledger, or a value is wrong.
    """
    if "ledger" in config:
        folder = Path(str(config["ledger"]))
    elif "folder" in config:
        folder = Path(str(config["folder"])) / "ledger"
    else:
        raise InputError(
            "a private run, and this site has no place for its ledger",
            where="node config",
            fix="start the node with --node-config 'ledger=\"/srv/ledger\"'",
        )
    dataset = str(config.get("dataset", "data"))
    if not NAME.fullmatch(dataset):
        raise InputError(
            f"dataset = '{dataset}' is no name", where="node config", fix="such as data"
        )
    budget = config.get("epsilon")
    delta = float(config.get("delta", DELTA))
    return Account(folder, site, dataset, None if budget is None else float(budget), delta)


def needed(run: RunFile) -> bool:
    """Whether a site itself pays for taking part: it adds the noise, or a share of it."""
    section = run.privacy
    return section.unit == "example" or (
        section.unit == "client" and (section.place == "client" or section.distributed)
    )


def debit(mine: Account, run: RunFile, job: str, round_number: int, n: int) -> Spent:
    """Writes down a round of training, durably, before it begins.

    Each call is another release, a repeated round too: its noise is drawn anew. A run that declares
    an epsilon is held to it, by the site's own count of its own examples and at the site's delta,
    whatever noise its server says that needs.

    Args:
        mine: the site's account.
        run: as the server sent it; what is trained follows from it and from the site's data alone.
        job: what the server calls the run.
        round_number: 1 … rounds.
        n: how many examples the site trains on.

    Raises:
        RefusedError: it would pass the site's budget, or what the run declares. Nothing is spent.
        InputError: the run states no noise, or another relation than the ledger's.
        RunError: the ledger cannot be written: nothing may be released.
    """
    section = run.privacy
    if section.noise_multiplier is None:
        raise InputError("the run states no noise", where="[privacy]", fix="ask its server")
    found = release(run, section.noise_multiplier, n, 1.0)
    unit: Unit = "client" if section.unit == "client" else "example"
    mine.folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(
        mine.folder / f"{mine.dataset}-{unit}.db",
        owner=f"{mine.site}/{mine.dataset}",
        unit=unit,
        relation=section.neighbouring,
        delta=mine.delta,
        budget=mine.budget,
    )
    made_with = versions()
    return ledger.debit(
        Entry(
            run=job,
            round=round_number,
            client=mine.site,
            unit=unit,
            relation=section.neighbouring,
            mechanism=found.mechanism,
            steps=found.steps,
            clip_norm=section.clip_norm,
            delta=section.delta,
            generator="os",
            attempt=secrets.token_hex(8),
            versions={name: str(made_with.get(name)) for name in ("umbel", "torch")},
        ),
        run_budget=section.epsilon,
    )


def read(folder: Path) -> list[dict[str, Any]]:
    """What each ledger of a site says, at the delta that sites count with by default.

    Raises:
        InputError: there is no ledger, or one is not a ledger.
    """
    found = []
    for path in sorted(folder.glob("*.db")):
        ledger = Ledger.opened(path, DELTA)
        lines = [
            {
                "seconds": line.seconds,
                "run": line.entry.run,
                "round": line.entry.round,
                "purpose": line.entry.purpose,
                "steps": line.entry.steps,
                "mechanism": line.entry.mechanism.table(),
            }
            for line in ledger.lines()
        ]
        ledger.verify()
        found.append({"file": str(path), **ledger.report(), "lines": lines})
    if not found:
        raise InputError(
            "no ledger: nothing was spent yet, or it is elsewhere",
            where=str(folder),
            fix="name the folder that the node was started with",
        )
    return found
