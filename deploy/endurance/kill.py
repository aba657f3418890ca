"""SIGKILL at every phase of a round, to every process of a federation.

A round is cut into eight phases of equal length, as rounds last here; in the second round of a run
the victim is killed in that phase and, where nobody else does so, started again. Afterwards rounds
must be gapless and committed once, the model that of an undisturbed run with the same participants,
and each site's ledger at or above what it took part in.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from umbel.deploy.endurance import parts
from umbel.deploy.network import SERVER, Network
from umbel.deploy.state import server_state

VICTIMS = ("server", "run", "site", "worker")
PHASES = 8
ROUNDS = 5
SITE = "aarhus"


class Cell(NamedTuple):
    """What one kill did.

    Args:
        victim: whose.
        phase: 0 to 7.
        seed: of where within the phase.
        absences: rounds that lacked a site.
        seconds: from the kill to the end of the run.
        faults: what was not as it must be; empty: nothing.
    """

    victim: str
    phase: int
    seed: int
    absences: int
    seconds: float
    faults: tuple[str, ...]


def kill_matrix(
    folder: Path,
    victims: Sequence[str] = VICTIMS,
    phases: Sequence[int] = range(PHASES),
    seeds: Sequence[int] = (0,),
    report: Callable[[str], None] = print,
) -> list[Cell]:
    """Runs the matrix on one federation, and says what came of each cell."""
    cells = []
    with Network(folder, parts.two_sites(folder)) as network:
        length = _round_seconds(network)
        report(f"a round takes {length:.2f} s")
        for seed in seeds:
            for phase in phases:
                for victim in victims:
                    cell = _cell(network, victim, phase, seed, length)
                    cells.append(cell)
                    state = "; ".join(cell.faults) or "as it must be"
                    report(f"{victim} in phase {phase}, seed {seed}: {state}")
    return cells


def _round_seconds(network: Network) -> float:
    job = network.finish(network.submit(parts.run_file(ROUNDS)))
    seconds = [record.seconds for record in parts.ended(network, job).history]
    return statistics.median(seconds[1:])


def _cell(network: Network, victim: str, phase: int, seed: int, length: float) -> Cell:
    # Half of the cells watch ledgers, half models.
    private = bool((phase + seed + VICTIMS.index(victim)) % 2)
    job = network.submit(parts.run_file(ROUNDS, private=private))
    network.wait_for(lambda: network.job(job).round >= 1, "the first round")
    within = (phase + random.Random(f"{victim} {phase} {seed}").random()) / PHASES
    time.sleep(within * length)
    began = time.monotonic()
    _kill(network, victim)
    done = network.finish(job, seconds=600)
    seconds = time.monotonic() - began
    faults = []
    if (done.state, done.error) != ("finished", ""):
        faults.append(f"{done.state}: {done.error}")
        return Cell(victim, phase, seed, 0, seconds, tuple(faults))
    found = parts.ended(network, done)
    absences = sum(len(parts.NAMES) - len(record.participants) for record in found.history)
    if private:
        for name in parts.NAMES:
            took = sum(name in record.participants for record in found.history)
            if (paid := parts.debits(network, name, done)) < took:
                faults.append(f"{name} took part in {took} rounds and paid for {paid}")
    elif not parts.same(found.model, parts.undisturbed(network, found)):
        faults.append("another model than undisturbed")
    return Cell(victim, phase, seed, absences, seconds, tuple(faults))


def _kill(network: Network, victim: str) -> None:
    if victim in ("server", "site"):
        name = SERVER if victim == "server" else SITE
        network.kill(name)
        network.start(name)
        return
    if victim == "run":
        pid = server_state(network.server).run_pid
    else:
        pid = next(iter(_children(network.pid(SITE))), None)
    if pid is not None:
        _send(pid)


def _send(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]
