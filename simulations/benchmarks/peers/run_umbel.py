"""Umbel as a user gets it: a run file, ``simulate``, a store on disk, a checkpoint every round."""

from __future__ import annotations

import inspect
import sys

import peer
from safetensors.numpy import load_file

from umbel.core.run_file import load
from umbel.simulations import simulate as door


def main() -> None:
    """Runs the rounds."""
    w = peer.work()
    settings = [f"run.store={w.options['store']}", f"run.rounds={w.rounds}"]
    run = load(w.options["run_file"], [*settings, f"client.device={w.device}"])
    pinned = {}
    if plan := w.options.get("plan"):
        known = inspect.signature(door.simulate).parameters
        name = next((n for n in ("plan", "engine_plan") if n in known), None)
        if name is None:
            peer.tell(refused="this version of Umbel cannot pin a plan")
            return
        pinned = {name: plan}
    notes: list[str] = []
    peer.began()
    outcome = door.simulate(
        run,
        engine=w.options["engine"],
        on_round=lambda record, rounds: peer.ended(record.round),
        announce=notes.append,
        **pinned,
    )
    assert outcome.model, outcome.status
    for note in notes:
        print(note, file=sys.stderr)
    peer.tell(notes=notes)
    peer.finish(w, load_file(outcome.model), "umbel", "torch", "numpy")


if __name__ == "__main__":
    main()
