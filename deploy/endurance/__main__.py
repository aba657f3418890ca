"""``python -m umbel.deploy.endurance kill|partition|locked|full|load``."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from umbel.deploy.endurance import trouble
from umbel.deploy.endurance.kill import PHASES, VICTIMS, kill_matrix
from umbel.deploy.endurance.load import load

TROUBLES = {
    "partition": (trouble.partition, 90.0),
    "locked": (trouble.locked, 30.0),
    "full": (trouble.full, 30.0),
}


def main() -> None:
    """Carries out a trial, prints one JSON object, and exits with 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    trials = parser.add_subparsers(dest="trial", required=True)
    kill = trials.add_parser("kill", help="SIGKILL at every phase of a round")
    kill.add_argument("--victims", nargs="*", choices=VICTIMS, default=VICTIMS)
    kill.add_argument("--phases", nargs="*", type=int, default=range(PHASES))
    kill.add_argument("--seeds", nargs="*", type=int, default=(0, 1, 2))
    for name, (_, seconds) in TROUBLES.items():
        trials.add_parser(name).add_argument("--seconds", type=float, default=seconds)
    many = trials.add_parser("load", help="hundreds of idle sites beside some that train")
    many.add_argument("--idle", type=int, default=300)
    many.add_argument("--training", type=int, default=20)
    many.add_argument("--seconds", type=float, default=300.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="umbel-endurance-") as name:
        folder = Path(name) / "network"
        result: dict[str, Any]
        if given.trial == "kill":
            cells = kill_matrix(folder, given.victims, given.phases, given.seeds)
            result = {"cells": [cell._asdict() for cell in cells]}
            wrong = any(cell.faults for cell in cells)
        elif given.trial == "load":
            loaded = load(folder, given.idle, given.training, given.seconds)
            result, wrong = loaded._asdict(), bool(loaded.faults)
        else:
            found = TROUBLES[given.trial][0](folder, given.seconds)
            result, wrong = found._asdict(), bool(found.faults)
    print(json.dumps({"trial": given.trial, **result, "passed": not wrong}, indent=2))
    raise SystemExit(int(wrong))


if __name__ == "__main__":
    main()
