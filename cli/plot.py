"""``umbel plot``: curves of runs, who holds what, what was kept of each experience, samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption, StoreOption
from umbel.core.errors import InputError

OTHER_PICTURES = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".eps", ".ps")


def plot(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN… [FILE.png]",
            help="One run or several, then the picture (png, pdf or svg).",
        ),
    ],
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="What to draw; default: score and loss.")
    ] = None,
    split: Annotated[
        bool, typer.Option("--split", help="Draw who holds what: umbel plot --split RUN.toml FILE.")
    ] = False,
    matrix: Annotated[
        bool,
        typer.Option("--matrix", help="Draw what was kept of each experience: RUN FILE."),
    ] = False,
    samples: Annotated[
        bool, typer.Option("--samples", help="Draw what a run's model makes: RUN FILE.")
    ] = False,
    store: StoreOption = "runs",
    format: FormatOption = Format.text,
) -> None:
    """Draw a run's curves, several runs in one picture, a run's matrix or samples, or a split."""
    from umbel.server.plots import FORMATS, check_format

    # Only a picture's suffix tells: the id of a run may hold a dot, too.
    path = Path(names[-1]) if names[-1].lower().endswith((*FORMATS, *OTHER_PICTURES)) else None
    wanted = names[:-1] if path else names
    if not wanted:
        raise InputError("no run is named", where="umbel plot", fix="umbel plot RUN FILE.png")
    if path:
        check_format(path)
    if samples:
        payload = _samples(wanted, path, store)
    elif matrix:
        payload = _matrix(wanted, path, store)
    else:
        payload = _split(wanted, path) if split else _runs(wanted, path, metric, store)
    if format is Format.json:
        output.emit(payload)
    else:
        print(f"drawn: {payload['file']}")


def _runs(
    wanted: list[str], path: Path | None, metric: str | None, store: str
) -> dict[str, object]:
    from umbel.server.plots import Drawn, draw_run
    from umbel.server.store import RunStore

    opened = RunStore(store)
    entries = {entry.run_id: entry for entry in (opened.get(name) for name in wanted)}
    runs = [Drawn(entry, opened.history_json(run_id)) for run_id, entry in entries.items()]
    path = path or Path(f"{runs[0].entry.run_id if len(runs) == 1 else 'compare'}.png")
    metrics = draw_run(runs, path, metric)
    return {"file": str(path), "runs": list(entries), "metrics": metrics}


def _samples(wanted: list[str], path: Path | None, store: str) -> dict[str, object]:
    if len(wanted) != 1:
        raise InputError(
            f"one run is wanted, not {len(wanted)}: {', '.join(wanted)}",
            where="umbel plot --samples",
            fix="umbel plot --samples RUN FILE.png",
        )
    from umbel.server.store import RunStore
    from umbel.simulations.pictures import draw_samples

    opened = RunStore(store)
    entry = opened.get(wanted[0])
    saved = opened.latest(entry.run_id)
    if saved is None:
        raise InputError("no round is committed", where=entry.run_id, fix="let it run first")
    path = path or Path(f"{entry.run_id}-samples.png")
    rows, columns = draw_samples(entry.run, saved.model, path)
    return {"file": str(path), "runs": [entry.run_id], "rows": rows, "columns": columns}


def _matrix(wanted: list[str], path: Path | None, store: str) -> dict[str, object]:
    if len(wanted) != 1:
        raise InputError(
            f"one run is wanted, not {len(wanted)}: {', '.join(wanted)}",
            where="umbel plot --matrix",
            fix="umbel plot --matrix RUN FILE.png",
        )
    from umbel.server.continual import kept_report
    from umbel.server.continual_plot import draw_matrix
    from umbel.server.store import RunStore

    opened = RunStore(store)
    entry = opened.get(wanted[0])
    report = kept_report(opened.folder / entry.run_id)
    path = path or Path(f"{entry.run_id}-matrix.png")
    draw_matrix(report, path, f"{entry.name}\n{entry.run_id}")
    return {"file": str(path), "runs": [entry.run_id], "matrix": report["matrix"]}


def _split(wanted: list[str], path: Path | None) -> dict[str, object]:
    if len(wanted) != 1:
        raise InputError(
            f"one run file is wanted, not {len(wanted)}: {', '.join(wanted)}",
            where="umbel plot --split",
            fix="umbel plot --split RUN.toml FILE.png",
        )
    from umbel.core import run_file
    from umbel.datasets.build import load
    from umbel.datasets.plots import draw_split

    run = run_file.load(wanted[0])
    data = load(run.data, run.run.seed)
    path = path or Path(f"{run.run.name}-split.png")
    kind = run.data.split.kind if run.data.split else "natural"
    draw_split(data, path, f"{run.data.name}, {kind} split over {len(data.names)} clients")
    examples = int(data.train_holdings.sizes().sum())
    return {"file": str(path), "clients": len(data.names), "examples": examples}
