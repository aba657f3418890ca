"""Whether a run may go on: only as what it began as."""

from __future__ import annotations

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.server.entries import RunEntry


def same_run(given: RunFile, stored: RunFile, run_id: str) -> None:
    """Refuses to go on with another configuration; ``rounds`` and how it is run may differ.

    Raises:
        InputError: the first key that differs.
    """
    left, right = given.model_dump(mode="json"), stored.model_dump(mode="json")
    for table in (left, right):
        for key in ("store", "checkpoint_seconds", "processes", "engine_plan", "ray_address"):
            table["run"].pop(key)
    growing = left["run"].pop("rounds") != right["run"].pop("rounds")
    if growing and given.client.model_dump()["schedule"] != "constant":
        raise InputError(
            "rounds differ from the stored run, and the learning rate schedule depends on them",
            where=f"--resume {run_id}",
            fix=f"set rounds = {stored.run.rounds}",
        )
    if growing and given.privacy.correlated:
        raise InputError(
            f"rounds differ from the stored run, and the noise of mechanism = "
            f"'{given.privacy.mechanism}' was planned for all of them together",
            where=f"--resume {run_id}",
            fix=f"set rounds = {stored.run.rounds}",
        )
    for section, table in left.items():
        for key, value in table.items():
            if value != right[section].get(key):
                raise InputError(
                    f"{key} = {value!r} in [{section}], and the stored run has "
                    f"{right[section].get(key)!r}",
                    where=f"--resume {run_id}",
                    fix="resume with the stored configuration (leave the run file out)",
                )


def same_stages(run: RunFile, entry: RunEntry) -> None:
    """Passes if the run goes on with experiences of the length that they had.

    Raises:
        InputError: it does not.
    """
    if run.continual.experiences > 1 and run.run.rounds != entry.run.run.rounds:
        raise InputError(
            "rounds differ from the stored run, and they are those of its experiences",
            where=f"--resume {entry.run_id}",
            fix=f"set rounds = {entry.run.run.rounds}",
        )
