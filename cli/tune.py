"""``umbel tune``."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption
from umbel.cli.simulate import RunFileArgument, SetOption, check_engine, split_arguments
from umbel.core.errors import InputError, RunError

if TYPE_CHECKING:
    from umbel.simulations.tune import Search, Trial


def tune(
    arguments: RunFileArgument = None,
    overrides: SetOption = None,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="Where clients live: `umbel list engines`.")
    ] = "vectorised",
    format: FormatOption = Format.text,
) -> None:
    """Search for the settings of [tune.space] with which a run does best; goes on if interrupted.

    Every trial is a run of the store, to be seen with `umbel runs` and `umbel compare`.
    """
    path, sets = split_arguments(arguments, overrides)
    if path is None:
        raise InputError("no run file", where="umbel tune", fix="umbel tune RUN.toml")
    check_engine(engine)
    from umbel.core import run_file
    from umbel.simulations import tune as tuning

    table = run_file.read(path, sets)
    try:
        # What a library prints must not end up in the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            search = tuning.tune(table, engine=engine, on_trial=_show, announce=_announce)
    except KeyboardInterrupt:
        raise RunError(
            "interrupted", where="umbel tune", fix="the same command goes on from the last trial"
        ) from None
    if format is Format.json:
        output.emit(search.as_json())
    else:
        _table(search)


def _show(trial: Trial, trials: int) -> None:
    settings = "  ".join(f"{key}={_brief(value)}" for key, value in trial.settings.items())
    value = "" if trial.value is None else f"  {trial.value:.4f}"
    output.note(f"trial {trial.number + 1}/{trials}  {trial.status}{value}  {settings}")


def _announce(text: str) -> None:
    output.note(f"note: {text}")


def _table(search: Search) -> None:
    columns = [*(search.trials[0].settings if search.trials else ())]
    rows = [
        (
            trial.number + 1,
            trial.status,
            "" if trial.value is None else f"{trial.value:.4f}",
            *(_brief(trial.settings.get(key, "")) for key in columns),
            trial.run_id or trial.error,
        )
        for trial in search.trials
    ]
    output.table(["trial", "status", search.metric, *columns, "run"], rows)
    if search.best is not None:
        settings = " ".join(f"{key}={value}" for key, value in search.best.settings.items())
        print(f"best: --set {settings}")
    if search.epsilon is not None:
        print(f"privacy: the trials together spent epsilon {search.epsilon:.3f} of the same data")


def _brief(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
