"""The verbs that read the run store: ``runs``, ``show``, ``compare`` and ``export``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption, StoreOption
from umbel.core.errors import InputError

# What fits a screen; the JSON form is whole.
CLIENTS_SHOWN = 20
ROUNDS_SHOWN = 20

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Its id, the beginning of it, or `latest`.")
]


def runs(store: StoreOption = "runs", format: FormatOption = Format.text) -> None:
    """List the runs of a store, the newest first."""
    from umbel.server.store import RunStore

    found = RunStore(store).list()
    if format is Format.json:
        output.emit({"runs": [entry.as_json() for entry in found]})
        return
    if not found:
        print(f"no runs in {store}")
        return
    rows = []
    for entry in found:
        figures = "  ".join(f"{n} {output.number(v)}" for n, v in entry.metrics.items())
        rounds = f"{entry.rounds_done}/{entry.rounds_planned}"
        seconds = output.duration(entry.seconds)
        rows.append((entry.run_id, entry.status, figures, rounds, seconds))
    output.table(["run", "status", "last metrics", "rounds", "time"], rows, left=3)


def show(run: RunArgument, store: StoreOption = "runs", format: FormatOption = Format.text) -> None:
    """Show one run: status, results, configuration, versions and every round."""
    from umbel.server import summary
    from umbel.server.store import RunStore

    opened = RunStore(store)
    entry = opened.get(run)
    history = opened.history_json(entry.run_id)
    model = opened.model_path(entry.run_id)
    last = summary.last(history)
    spent = opened.privacy(entry.run_id)
    if format is Format.json:
        output.emit(
            {
                **entry.as_json(),
                "metrics": last["metrics"],
                "per_client": last.get("per_client", {}),
                "model": str(model) if model.is_file() else None,
                "configuration": entry.configuration,
                "versions": entry.versions,
                "engine_plan": entry.engine_plan,
                "privacy": spent,
                "history": history,
            }
        )
        return
    rounds = f"{entry.rounds_done} of {entry.rounds_planned} rounds"
    print(f"{entry.run_id}  {entry.status}: {rounds} in {output.duration(entry.seconds)}")
    print(f"started {entry.started}, {entry.engine} engine, on {entry.host}")
    if entry.error:
        print(f"error: {entry.error}")
    print()
    show_results(history, last.get("per_client", {}))
    _show_history(history)
    if spent:
        rows = [(k.replace("_", " "), _toml(v)) for k, v in spent.items() if v not in (None, [])]
        output.table(["privacy", ""], rows, left=2)
    rows = [(k, v) for k, v in summary.flat(entry.configuration).items() if v is not None]
    output.table(["configuration", ""], [(k, _toml(v)) for k, v in rows], left=2)
    output.table(["version", ""], list(entry.versions.items()), left=2)
    if plan := entry.engine_plan:
        output.table(["engine plan", ""], list(summary.flat(plan).items()), left=2)
    if model.is_file():
        print(f"model: {model}")
    elif entry.status != "running" and entry.rounds_done < entry.rounds_planned:
        command = f"umbel simulate --resume {entry.run_id} --store {shlex.quote(store)}"
        print(f"go on with: {command}")


def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN …", help="Two runs or more.")],
    store: StoreOption = "runs",
    format: FormatOption = Format.text,
) -> None:
    """Compare the final metrics of runs, and where their configurations differ."""
    from umbel.server import summary
    from umbel.server.store import RunStore

    opened = RunStore(store)
    entries = [opened.get(name) for name in dict.fromkeys(names)]
    if len({entry.run_id for entry in entries}) < 2:
        raise InputError("two runs or more are wanted", where="umbel compare", fix="umbel runs")
    histories = {entry.run_id: opened.history_json(entry.run_id) for entry in entries}
    final = {run_id: summary.last(history)["metrics"] for run_id, history in histories.items()}
    best = {
        run_id: {name: summary.best(history, name) for name in summary.metrics(history)}
        for run_id, history in histories.items()
    }
    differences = summary.difference({e.run_id: e.configuration for e in entries})
    if format is Format.json:
        rows = [
            {
                **entry.as_json(),
                "metrics": final[entry.run_id],
                "best": {
                    name: {"round": point.round, "value": point.value}
                    for name, point in best[entry.run_id].items()
                    if point
                },
            }
            for entry in entries
        ]
        output.emit({"runs": rows, "differences": differences})
        return
    metrics = list(dict.fromkeys(n for h in histories.values() for n in summary.metrics(h)))
    table = []
    for entry in entries:
        cells: list[Any] = [entry.run_id, entry.status, entry.rounds_done]
        for name in metrics:
            point = best[entry.run_id].get(name)
            cells += [final[entry.run_id].get(name), point and f"{point.value:.4g} @{point.round}"]
        table.append(cells)
    heads = [head for name in metrics for head in (name, "best")]
    output.table(["run", "status", "rounds", *heads], table, left=2)
    if differences:
        ids = list(histories)
        rows_ = [(key, *(_toml(v[i]) for i in ids)) for key, v in differences.items()]
        output.table(["differs", *ids], rows_, left=len(ids) + 1)
    else:
        print("the configurations are the same")


def export(
    run: RunArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors|FOLDER", help="Where to.")],
    store: StoreOption = "runs",
    merged: Annotated[
        bool, typer.Option("--merged", help="FOLDER: the base model with the adapter merged in.")
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Write a run's last committed model: its tensors, or its adapter as a PEFT folder."""
    from umbel.server.store import RunStore

    opened = RunStore(store)
    if file.suffix == ".safetensors" and not merged:
        entry = opened.get(run)
        number = entry.rounds_done
        if not opened.export(entry.run_id, file):
            raise InputError(
                f"run {entry.run_id} has no model: no round was committed",
                where=f"run store {store}",
                fix=f"umbel simulate --resume {entry.run_id} --store {store}",
            )
        size = file.stat().st_size
    elif file.suffix:
        raise InputError(
            f"cannot write a '{file.suffix}' file",
            where=str(file),
            fix="name a folder" if merged else "name it *.safetensors, or a folder for an adapter",
        )
    else:
        from umbel.simulations.export import export_adapter

        entry = opened.get(run)
        number = export_adapter(opened, entry.run_id, file, merged=merged)
        size = sum(path.stat().st_size for path in file.rglob("*") if path.is_file())
    if format is Format.json:
        output.emit({"run_id": entry.run_id, "file": str(file), "round": number, "bytes": size})
    else:
        print(f"{entry.run_id}: model after round {number} written to {file}")


def show_results(
    history: Sequence[Mapping[str, Any]], per_client: Mapping[str, Mapping[str, float]]
) -> None:
    """Prints the last and best metrics, each client's own where they fit, and who failed."""
    from umbel.server import summary

    last = summary.last(history)
    rows = []
    for name in summary.metrics(history):
        point = summary.best(history, name)
        best = f"{point.value:.4f} (round {point.round})" if point else None
        value = last["metrics"].get(name)
        rows.append((name, None if value is None else f"{value:.4f}", best))
    if rows:
        output.table(["metric", f"round {last['round']}", "best"], rows)
    if 0 < len(per_client) <= CLIENTS_SHOWN:
        names = sorted(dict.fromkeys(n for m in per_client.values() for n in m))
        cells = [(c, *(m.get(n) for n in names)) for c, m in per_client.items()]
        output.table(["client", *names], cells)
    elif per_client:
        print(f"{len(per_client)} clients have figures of their own: --format json shows them\n")
    if failed := summary.failures(history):
        output.table(["failed because", "times"], failed.most_common())


def _show_history(history: Sequence[Mapping[str, Any]]) -> None:
    from umbel.server import summary

    names = summary.metrics(history)
    step = max(1, -(-len(history) // ROUNDS_SHOWN))
    shown = [r for r in history if r["round"] % step == 0 or r is history[-1]]
    rows = [
        (
            r["round"],
            *(r["metrics"].get(n) for n in names),
            len(r["participants"]),
            len(r["failures"]),
            output.duration(r["seconds"]),
        )
        for r in shown
    ]
    if rows:
        output.table(["round", *names, "clients", "failed", "time"], rows, left=0)
        if step > 1:
            print(f"every {step}th of {len(history)} rounds; --format json has them all\n")


def _toml(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
