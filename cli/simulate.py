"""``umbel simulate`` and ``umbel check``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption
from umbel.core.errors import InputError, RunError, UmbelError, suggest

if TYPE_CHECKING:
    from umbel.core.run_file import RunFile

# A budget that stops a run is a refusal; an interrupted run can be resumed.
EXIT_CODES = {"finished": 0, "budget_exhausted": 3, "interrupted": 1, "failed": 1}

UNPLANNED = ("sequential", "flower")
"""Engines that train one client after another, whatever the plan."""

RunFileArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="RUN.toml", help="The run file.", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key, e.g. client.lr=0.1."),
]


def simulate(
    arguments: RunFileArgument = None,
    overrides: SetOption = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where clients live: `umbel list engines`."),
    ] = None,
    engine_plan: Annotated[
        str | None,
        typer.Option(
            "--engine-plan",
            metavar="PLAN",
            help="How the engine computes, e.g. grouped:chunk=5; default: a trial tells.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Go on with this run; RUN.toml may be left out."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="S", help="The run store; default: run.store of the run file."),
    ] = None,
    format: FormatOption = Format.text,
) -> int:
    """Run a federation on this machine."""
    path, sets = split_arguments(arguments, overrides)
    if path is None and resume is None:
        raise InputError(
            "no run file", where="umbel simulate", fix="name one, or --resume RUN to go on"
        )
    if engine is not None:
        check_engine(engine)
    if engine_plan is not None:
        if engine in UNPLANNED:
            raise InputError(
                f"engine '{engine}' has no plan", where="--engine-plan", fix="leave one of them out"
            )
        sets.append(f"run.engine_plan={engine_plan}")
    from umbel.cli.progress import progress
    from umbel.core import run_file
    from umbel.server.store import RunStore

    if path is not None:
        run = run_file.load(path, sets)
        location = store or run.run.store
        resume = resume and RunStore(location).get(resume).run_id
    else:
        location = store or "runs"
        entry = RunStore(location).get(resume or "")
        resume, engine = entry.run_id, engine or entry.engine
        table = json.loads(json.dumps(entry.configuration))
        run = run_file.resolve(run_file.overridden(table, sets), f"run {resume}")
    run = _in_store(run, location)
    text = None if path is None else Path(path).read_text(encoding="utf-8")

    from umbel.simulations.simulate import simulate as start

    try:
        # What a library prints must not end up in the JSON.
        with progress() as display, contextlib.redirect_stdout(sys.stderr):
            outcome = start(
                run,
                engine=engine or "vectorised",
                resume=resume,
                text=text,
                on_round=display.on_round,
                announce=display.announce,
            ).as_json()
    except KeyboardInterrupt:
        hint = _hint(location)
        fix = hint or "nothing was committed; start it again"
        raise RunError("interrupted", where="umbel simulate", fix=fix) from None
    except UmbelError:
        if hint := _hint(location):
            output.note(f"note: committed rounds are kept; {hint}")
        raise
    if format is Format.json:
        output.emit(outcome)
    else:
        show_outcome(outcome, location)
    if outcome["status"] == "interrupted":
        output.note(f"interrupted; {_resume(outcome['run_id'], location)}")
    return EXIT_CODES[outcome["status"]]


def check(
    arguments: RunFileArgument = None,
    overrides: SetOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Check a run file, its data and its model, and print the plan without running it."""
    path, sets = split_arguments(arguments, overrides)
    if path is None:
        raise InputError("no run file", where="umbel check", fix="umbel check RUN.toml")
    from umbel.core import run_file
    from umbel.simulations.simulate import check as plan

    table = plan(run_file.load(path, sets))
    if format is Format.json:
        output.emit(table)
    else:
        output.table(["plan", path], [(k.replace("_", " "), v) for k, v in _readable(table)])


def split_arguments(
    arguments: Sequence[str] | None, overrides: Sequence[str] | None
) -> tuple[str | None, list[str]]:
    """The run file and the overrides; ``--set a.b=1 c.d=2`` may share one ``--set``."""
    sets = list(overrides or ())
    paths: list[str] = []
    for argument in arguments or ():
        is_override = sets and "=" in argument and not Path(argument).exists()
        (sets if is_override else paths).append(argument)
    if len(paths) > 1:
        raise InputError(
            f"one run file is wanted, not {len(paths)}: {', '.join(paths)}",
            where="command line",
            fix="give --set before a key=value",
        )
    return (paths[0] if paths else None), sets


def check_engine(name: str) -> None:
    """Refuses an engine that does not exist, before anything is loaded.

    Raises:
        InputError: unknown.
    """
    from umbel.core import registry

    engines = registry.known("engines")
    if name in engines or ":" in name:
        return
    raise InputError(f"unknown engine '{name}'", where="--engine", fix=suggest(name, engines))


def _in_store(run: RunFile, location: str) -> RunFile:
    return run.model_copy(update={"run": run.run.model_copy(update={"store": location})})


def _hint(location: str) -> str:
    """How to go on with the run that this process began, if it began one."""
    from umbel.server.store import RunStore

    mine = [r for r in RunStore(location).list() if r.pid == os.getpid()]
    if not mine or mine[0].status == "finished" or not mine[0].rounds_done:
        return ""
    return _resume(mine[0].run_id, location)


def _resume(run_id: str, location: str) -> str:
    store = "" if location == "runs" else f" --store {location}"
    return f"go on with: umbel simulate --resume {run_id}{store}"


def show_outcome(outcome: Mapping[str, Any], location: str) -> None:
    """How a run ended, as text."""
    from umbel.cli.runs import show_results

    seconds = output.duration(outcome["seconds"])
    rounds = outcome["rounds"]
    print(f"\n{outcome['run_id']}  {outcome['status']}: {rounds} rounds in {seconds}\n")
    show_results(outcome["history"], outcome["per_client"])
    if outcome["privacy"]:
        output.table(["privacy", ""], list(outcome["privacy"].items()))
    if outcome["model"]:
        print(f"model: {outcome['model']}")
        store = "" if location == "runs" else f" --store {location}"
        print(f"curve: umbel plot {outcome['run_id']} FILE.png{store}")


def _readable(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            rows += _readable(value, f"{prefix}{key} ")
        elif "bytes" in key:
            name = key.replace("_bytes", "").replace("bytes_per", "traffic per")
            rows.append((prefix + name, output.size(value)))
        elif key == "notes":
            rows += [("note", text) for text in value]
        elif isinstance(value, list | tuple):
            rows.append((prefix + key, ", ".join(map(str, value))))
        elif isinstance(value, int) and not isinstance(value, bool):
            rows.append((prefix + key, f"{value:,}"))
        else:
            rows.append((prefix + key, value))
    return rows
