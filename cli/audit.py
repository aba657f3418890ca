"""``umbel audit``: attacks that try to break what a run promises."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption
from umbel.cli.simulate import SetOption
from umbel.core.errors import InputError, suggest

if TYPE_CHECKING:
    from umbel.core.run_file import RunFile

app = typer.Typer(
    help="Attack what a run sends and keeps: do its privacy promises hold?",
    no_args_is_help=True,
)

ATTACKS = ("auto", "linear", "matching", "dlg")

RunFileOption = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN.toml]",
        help="The run file; without one, digits with example-level privacy.",
        show_default=False,
    ),
]
OutOption = Annotated[
    str | None, typer.Option("--out", metavar="FILE", help="Draw the findings (png, pdf or svg).")
]
ConfidenceOption = Annotated[float, typer.Option(help="Of bounds and intervals, in (0, 1).")]
EngineOption = Annotated[
    str, typer.Option(metavar="NAME", help="Where clients live: `umbel list engines`.")
]


@app.command()
def inversion(
    run_file: RunFileOption = None,
    overrides: SetOption = None,
    out: OutOption = None,
    images: Annotated[int, typer.Option(help="Pictures that are attacked.")] = 6,
    clients: Annotated[int, typer.Option(help="Clients in the secure sum, 3 or more.")] = 20,
    attack: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="linear reads the first layer off; matching (cosine) and dlg search; auto: linear "
            "where it can.",
        ),
    ] = "auto",
    steps: Annotated[int, typer.Option(help="Of a search.")] = 300,
    format: FormatOption = Format.text,
) -> int:
    """Read pictures off an update: alone, in a secure sum, and with privacy."""
    if attack not in ATTACKS:
        raise InputError(
            f"unknown attack '{attack}'", where="--attack", fix=suggest(attack, ATTACKS)
        )
    run, path = _load(run_file, overrides), _path(out)
    from umbel.simulations.audits.inversion import invert

    found = invert(run, images=images, clients=clients, attack=attack, steps=steps)  # type: ignore[arg-type]
    if path is not None:
        from umbel.simulations.audits.pictures import draw_inversion

        draw_inversion(found, path)
    payload = found.as_json()
    rows = [(name, c["psnr"], c["ssim"]) for name, c in payload["columns"].items()]
    return _answer(payload, path, format, [("update", "PSNR, dB", "SSIM"), *rows], False)


@app.command()
def membership(
    run_file: RunFileOption = None,
    overrides: SetOption = None,
    out: OutOption = None,
    shadows: Annotated[int, typer.Option(help="Shadow models besides the target.")] = 8,
    confidence: ConfidenceOption = 0.95,
    engine: EngineOption = "vectorised",
    format: FormatOption = Format.text,
) -> int:
    """Tell from the final model who was in the training data."""
    run, path = _load(run_file, overrides), _path(out)
    _check(confidence)
    if shadows < 0:
        raise InputError(f"{shadows} shadow models", where="--shadows", fix="give 0 or more")
    from umbel.simulations.audits.membership import attack

    found = attack(run, shadows=shadows, confidence=confidence, engine=engine, announce=output.note)
    if path is not None:
        from umbel.simulations.audits.pictures import draw_membership

        draw_membership(found, path)
    rows: list[tuple[Any, ...]] = []
    for name, curve in found.curves.items():
        rates = [f"{p.rate:.2%} [{p.low:.2%}, {p.high:.2%}]" for p in curve.points]
        rows.append((name, curve.roc.auc, *rates, curve.bound, found.theory))
    head = ("attack", "AUC", "TPR at 0.1 % FPR", "TPR at 1 % FPR", "proven ε", "stated ε")
    return _answer(found.as_json(), path, format, [head, *rows], found.violated)


@app.command()
def canary(
    run_file: RunFileOption = None,
    overrides: SetOption = None,
    out: OutOption = None,
    canaries: Annotated[int, typer.Option(help="Of which half take part, by fair coins.")] = 1000,
    confidence: ConfidenceOption = 0.95,
    engine: EngineOption = "vectorised",
    format: FormatOption = Format.text,
) -> int:
    """Run once with canaries; fails where more is proven than the ledger states."""
    run, path = _load(run_file, overrides), _path(out)
    _check(confidence)
    if canaries < 10:
        raise InputError(f"{canaries} canaries", where="--canaries", fix="give 10 or more")
    from umbel.simulations.audits.canary import audit

    found = audit(
        run, canaries=canaries, confidence=confidence, engine=engine, announce=output.note
    )
    if path is not None:
        from umbel.simulations.audits.pictures import draw_canary

        draw_canary(found, path)
    guessed = f"{found.bound.correct} of {found.bound.guesses}"
    head = ("unit", "stated ε", "proven ε", "estimate", "guessed right")
    row = (found.unit, found.theory, found.bound.epsilon, found.estimate.epsilon, guessed)
    return _answer(found.as_json(), path, format, [head, row], found.violated)


def _load(path: str | None, overrides: list[str] | None) -> RunFile:
    from umbel.core import run_file

    recipe = files("umbel.simulations.recipes").joinpath("audit.toml")
    return run_file.load(path or str(recipe), overrides or ())


def _path(out: str | None) -> Path | None:
    if out is None:
        return None
    from umbel.server.plots import check_format

    check_format(Path(out))
    if not Path(out).absolute().parent.is_dir():
        raise InputError(f"no folder for '{out}'", where="--out", fix="make the folder first")
    return Path(out)


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(
            f"confidence {confidence} is not in (0, 1)", where="--confidence", fix="such as 0.95"
        )


def _answer(
    payload: Mapping[str, Any],
    path: Path | None,
    format: Format,
    table: list[tuple[Any, ...]],
    violated: bool,
) -> int:
    if format is Format.json:
        output.emit({**payload, "file": None if path is None else str(path)})
    else:
        output.table(table[0], table[1:])
        if path is not None:
            print(f"drawn: {path}")
    if violated:
        output.note(
            "PRIVACY VIOLATION: the audit proves a larger epsilon than the ledger states. Do not "
            "use this build on anybody's data; report it with the run file and the seed."
        )
    return int(violated)
