"""The dashboard as an ASGI application: routes, the guard around them, and what a failure shows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope

from umbel.core.errors import UmbelError
from umbel.deploy.dashboard import actions, api, pages
from umbel.deploy.dashboard.guard import ANYBODY, MACHINES, Guard, needs
from umbel.deploy.dashboard.sessions import Sessions, Throttle
from umbel.deploy.dashboard.source import Source
from umbel.deploy.dashboard.users import Users

HERE = Path(__file__).parent

ROUTERS = (pages.router, actions.router, api.router)

STATUS = {1: 503, 2: 400, 3: 403}
"""Exit code of an error on the command line -> what a browser is told."""

log = logging.getLogger("umbel.dashboard")


def routes_app(source: Source, users: Users, sessions: Sessions) -> FastAPI:
    """The routes alone: unguarded, and served by nobody."""
    # No schema and no documentation pages: nobody who is not let in learns what there is.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.source, app.state.users = source, users
    app.state.sessions, app.state.throttle = sessions, Throttle()
    for router in ROUTERS:
        app.include_router(router)
    static = StaticFiles(directory=HERE / "static")
    app.mount("/static", needs(ANYBODY)(static))
    app.add_exception_handler(UmbelError, _wrong)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _defect)
    return app


def make_app(source: Source, users: Users, hosts: Sequence[str], *, tls: bool) -> ASGIApp:
    """The guarded dashboard.

    Args:
        source: what it shows.
        users: who may see it.
        hosts: names by which it may be addressed.
        tls: whether it is served over TLS.
    """
    sessions = Sessions()
    app = routes_app(source, users, sessions)
    app.state.tls = tls

    mounted = [route for route in app.routes if isinstance(route, Mount)]
    routes = [*(route for router in ROUTERS for route in router.routes), *mounted]

    def find(scope: Scope) -> object | None:
        for route in routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return route.app if isinstance(route, Mount) else getattr(route, "endpoint", None)
        return None

    return Guard(app, find, users, sessions, frozenset(h.lower() for h in hosts), tls)


def _wrong(request: Request, error: Exception) -> Response:
    assert isinstance(error, UmbelError)
    status = STATUS[error.exit_code]
    return _failure(request, status, error.message, error.where, error.fix)


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _failure(request, error.status_code, str(error.detail))


def _defect(request: Request, error: Exception) -> Response:
    log.error("a page failed: %s", request.url.path, exc_info=error)
    return _failure(request, 500, "this page failed; the dashboard's log says why")


def _failure(
    request: Request, status: int, message: str, where: str = "", fix: str = ""
) -> Response:
    table: dict[str, Any] = {"message": message, "where": where, "fix": fix}
    if request.url.path.startswith(MACHINES):
        return JSONResponse({"error": table}, status)
    return pages.render(request, "error.html", status=status, error=table)
