"""Umbel as a user gets it: a run file, ``simulate``, a store on disk, a checkpoint every round."""

from __future__ import annotations

import peer
from safetensors.numpy import load_file

from umbel.core.run_file import load
from umbel.server.store import RunStore
from umbel.simulations.simulate import simulate


def main() -> None:
    """Runs the rounds."""
    w = peer.work()
    store = w.options["store"]
    settings = [f"run.store={store}", f"run.rounds={w.rounds}", f"client.device={w.device}"]
    if plan := w.options.get("plan"):
        settings.append(f"run.engine_plan={plan}")
    if precision := w.options.get("precision"):
        settings.append(f"client.precision={precision}")
    run = load(w.options["run_file"], settings)
    notes: list[str] = []
    peer.began()
    outcome = simulate(
        run,
        engine=w.options["engine"],
        on_round=lambda record, rounds: peer.ended(record.round),
        announce=notes.append,
    )
    assert outcome.model, outcome.status
    chosen = RunStore(store).get(outcome.run_id).engine_plan
    peer.tell(notes=notes, engine_plan=dict(chosen))
    peer.finish(w, load_file(outcome.model), "umbel", "torch", "numpy")


if __name__ == "__main__":
    main()
