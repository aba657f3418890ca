"""The same for programs: JSON with a bearer token, and figures for Prometheus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.utils import get_openapi
from starlette.responses import JSONResponse, Response

from umbel import __version__
from umbel.core.errors import InputError
from umbel.deploy.dashboard.actions import enqueue, obey
from umbel.deploy.dashboard.figures import exposition
from umbel.deploy.dashboard.guard import needs
from umbel.deploy.dashboard.pages import source_of
from umbel.deploy.dashboard.source import alerts, budget

router = APIRouter()

SUBMITTED = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-www-form-urlencoded": {
                "schema": {
                    "type": "object",
                    "required": ["text"],
                    "properties": {
                        "text": {"type": "string", "description": "the run file"},
                        "sites": {"type": "string", "description": "how many to wait for; 0: all"},
                    },
                }
            }
        },
    }
}


@router.get("/api/openapi.json")
@needs("viewer")
def description(request: Request) -> Response:
    """This API, for programs."""
    table = get_openapi(title="Umbel's dashboard", version=__version__, routes=router.routes)
    token = {"type": "http", "scheme": "bearer"}
    table.setdefault("components", {})["securitySchemes"] = {"token": token}
    return _json({**table, "security": [{"token": []}]})


@router.get("/api/runs")
@needs("viewer")
def runs(request: Request) -> Response:
    """All runs, the newest first."""
    return _json({"runs": [entry.as_json() for entry in source_of(request).runs()]})


@router.get("/api/runs/{run_id}")
@needs("viewer")
def run(request: Request, run_id: str, after: int = 0) -> Response:
    """A run with its rounds after round ``after``."""
    source = source_of(request)
    entry = source.run(run_id)
    history = source.store.history_json(run_id, max(0, min(after, 2**31 - 1)))
    spent = budget(entry, history)
    model = source.model(entry)
    return _json(
        {
            **entry.as_json(),
            "configuration": entry.configuration,
            "privacy": None if spent is None else spent._asdict(),
            "sha256": None if model is None else model.sha256,
            "history": history,
        }
    )


@router.get("/api/clients")
@needs("viewer")
def clients(request: Request) -> Response:
    """Who takes part, and how they fare."""
    found = []
    for client in source_of(request).clients():
        table = client._asdict()
        table["site"] = None if client.site is None else {"approved": client.site.approved}
        found.append(table)
    return _json({"clients": found})


@router.get("/api/queue")
@needs("viewer")
def queue(request: Request) -> Response:
    """The server's queue, the newest first."""
    return _json({"jobs": [job.as_json() for job in source_of(request).queue()]})


@router.get("/api/alerts")
@needs("viewer")
def now(request: Request) -> Response:
    """What somebody should look at."""
    return _json({"alerts": [alert._asdict() for alert in alerts(source_of(request))]})


@router.get("/api/audit")
@needs("operator")
def audit(request: Request) -> Response:
    """Who did what."""
    lines, wrong = source_of(request).audit()
    return _json({"entries": [line._asdict() for line in lines], "broken": wrong})


@router.post("/api/runs", status_code=201, openapi_extra=SUBMITTED)
@needs("operator")
def submit(request: Request) -> Response:
    """Puts the run file in the field ``text`` into the queue; ``sites`` as in ``umbel submit``."""
    form = request.state.form
    if "text" not in form:
        raise InputError("no run file", where="text", fix="send it as a form's field")
    return _json(enqueue(request, form["text"], form.get("sites", "0")).as_json(), 201)


@router.post("/api/jobs/{job_id}/{order}")
@needs("operator")
def order(request: Request, job_id: str, order: str) -> Response:
    """Has a run paused, resumed or stopped."""
    return _json(obey(request, job_id, order).as_json())


@router.get("/metrics")
@needs("viewer")
def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    text, kind = exposition(source_of(request))
    return Response(text, media_type=kind)


def _json(table: Mapping[str, Any], status: int = 200) -> JSONResponse:
    return JSONResponse(_finite(table), status)


def _finite(value: Any) -> Any:
    """``value`` with null for what JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
