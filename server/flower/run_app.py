"""Runs another project's Flower ``ServerApp`` in this process."""

from __future__ import annotations

import secrets
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.server_app import LoadServerAppError
from flwr.supercore.object_ref import load_app
from flwr.supercore.task_identity import TaskIdentity

from umbel.core.errors import InputError, RunError, UmbelError
from umbel.core.places import place_in
from umbel.server.flower.project import Project


class LoadFailure(NamedTuple):
    """Why an app could not be loaded.

    Args:
        part: ``serverapp`` or ``clientapp``.
        reference: ``module:attribute``.
        error: the exception's class and first line.
        where: file and line in the app; empty: not in the app.
        missing: the module that was not found; empty: that is not what failed.
    """

    part: str
    reference: str
    error: str
    where: str
    missing: str

    def as_error(self) -> InputError:
        """What the app's author is told."""
        fix = "Flower would not load it either: mend the app"
        if self.missing:
            package = self.missing.partition(".")[0]
            fix = f"install what the app needs: pip install {package}, or pip install -e its folder"
        where = self.where or f"{self.part} = '{self.reference}'"
        return InputError(f"the {self.part} cannot be loaded: {self.error}", where=where, fix=fix)


@contextmanager
def loaded(project: Project) -> Iterator[ServerApp]:
    """The app's ServerApp, its folder on ``sys.path``; afterwards neither is there.

    Raises:
        InputError: it cannot be loaded; with the place.
    """
    before = list(sys.path)
    try:
        try:
            app = load_app(project.serverapp, LoadServerAppError, project.folder)
        except (Exception, SystemExit) as error:
            place = place_in(project.folder, error)
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
            failure = LoadFailure("serverapp", project.serverapp, text, place, missing)
            raise failure.as_error() from error
        if not isinstance(app, ServerApp):
            text = f"it is a {type(app).__name__}, not a ServerApp"
            raise LoadFailure("serverapp", project.serverapp, text, "", "").as_error()
        yield app
    finally:
        sys.path[:] = before
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and Path(file).is_relative_to(project.folder):
                del sys.modules[name]


def run(project: Project, app: ServerApp, grid: Grid) -> None:
    """Runs a ServerApp to its end.

    Raises:
        RunError: it raised; with the place. The traceback is on stderr.
    """
    context = Context(
        grid.run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), dict(project.run_config)
    )
    try:
        app(grid=grid, context=context)
    except (UmbelError, KeyboardInterrupt):
        raise
    except SystemExit as end:
        if end.code:
            raise RunError(f"the serverapp ended with {end.code!r}", where=project.name) from end
    except Exception as error:
        traceback.print_exc()
        raise RunError(
            f"the serverapp raised {type(error).__name__}: {error}",
            where=place_in(project.folder, error) or project.serverapp,
            fix="its traceback is above",
        ) from error


def new_identity() -> int:
    """A new run's id, as Flower's are; this process is its server from now on."""
    run_id = secrets.randbits(63) | 1
    TaskIdentity.task_id, TaskIdentity.run_id = secrets.randbits(63) | 1, run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    return run_id
