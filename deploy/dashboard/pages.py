"""The pages: each reads, draws and answers; none changes anything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from fastapi import APIRouter, Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

import umbel
from umbel.core.errors import InputError
from umbel.deploy.dashboard import charts
from umbel.deploy.dashboard.guard import ANYBODY, Asker, asker_of, needs
from umbel.deploy.dashboard.source import Source, alerts, budget
from umbel.deploy.dashboard.users import ROLES
from umbel.deploy.jobs import OVER
from umbel.server import summary
from umbel.server.entries import RunEntry

HEAT_ROUNDS, HEAT_CLIENTS = 50, 60
TIMELINE_ROUNDS = 12
CURVES = 6

router = APIRouter()


@router.get("/login")
@needs(ANYBODY)
def login(request: Request) -> Response:
    """The form to log in."""
    if request.state.asker is not None:
        return RedirectResponse("/", 303)
    return render(request, "login.html")


@router.get("/healthz")
@needs(ANYBODY)
def health() -> dict[str, str]:
    """That the dashboard answers; nothing else."""
    return {"status": "ok"}


@router.get("/")
@needs("viewer")
def overview(request: Request) -> Response:
    """Server, runs and alerts at a glance."""
    source = source_of(request)
    runs = source.runs()
    return render(
        request,
        "overview.html",
        server=source.server(),
        queue=[job for job in source.queue() if job.state not in OVER],
        runs=runs[:15],
        total=len(runs),
        counts={s: sum(r.status == s for r in runs) for s in dict.fromkeys(r.status for r in runs)},
        alerts=alerts(source),
    )


@router.get("/runs")
@needs("viewer")
def runs(request: Request) -> Response:
    """All runs, to look at or to compare."""
    source = source_of(request)
    return render(request, "runs.html", runs=source.runs(), queue=source.queue())


@router.get("/runs/{run_id}")
@needs("viewer")
def run(request: Request, run_id: str) -> Response:
    """One run: figures, clients, time, privacy."""
    source = source_of(request)
    entry = source.run(run_id)
    history = source.store.history_json(run_id)
    first = max(0, entry.rounds_done - TIMELINE_ROUNDS)
    asked = source.dispatches(run_id, first)
    spent = budget(entry, history)
    epsilon = [summary.Point(r["round"], r["epsilon"]) for r in history if "epsilon" in r]
    names = summary.metrics(history)[:CURVES]
    return render(
        request,
        "run.html",
        entry=entry,
        job=source.job_of(run_id),
        last=summary.last(history),
        history=history,
        graphs={name: charts.curves({name: summary.curve(history, name)}) for name in names},
        budget=spent,
        epsilon=charts.curves({"ε": epsilon}, spent.limit) if spent and epsilon else None,
        heat=heat_grid(history),
        timeline=_timeline(history[-TIMELINE_ROUNDS:], asked),
        traffic=_traffic(asked),
        reasons=summary.failures(history).most_common(8),
        notes=[(r["round"], r["note"]) for r in history if r.get("note")][-8:],
        configuration=summary.flat(entry.configuration),
        report=source.store.privacy(run_id),
        model=source.model(entry),
    )


@router.get("/clients")
@needs("viewer")
def clients(request: Request) -> Response:
    """Who takes part, and how they fare."""
    source = source_of(request)
    return render(request, "clients.html", clients=source.clients(), server=source.server())


@router.get("/compare")
@needs("viewer")
def compare(request: Request) -> Response:
    """The curves of several runs in one picture, and where their run files differ."""
    source = source_of(request)
    chosen = list(dict.fromkeys(request.query_params.getlist("run")))[: charts.COLOURS]
    entries = [source.run(run_id) for run_id in chosen]
    histories = {entry.run_id: source.store.history_json(entry.run_id) for entry in entries}
    names = dict.fromkeys(n for h in histories.values() for n in summary.metrics(h))
    graphs = {
        name: charts.curves({r: summary.curve(h, name) for r, h in histories.items()})
        for name in list(names)[:CURVES]
    }
    return render(
        request,
        "compare.html",
        runs=source.runs(),
        entries=entries,
        graphs=graphs,
        metrics=list(names),
        final={r: summary.last(h)["metrics"] for r, h in histories.items()},
        best={r: {n: summary.best(h, n) for n in names} for r, h in histories.items()},
        differences=summary.difference({e.run_id: e.configuration for e in entries}),
    )


@router.get("/models")
@needs("viewer")
def models(request: Request) -> Response:
    """The models of ended runs, with their hashes."""
    return render(request, "models.html", models=source_of(request).models())


@router.get("/models/{run_id}")
@needs("operator")
def model(request: Request, run_id: str) -> Response:
    """A model's file."""
    source = source_of(request)
    found = source.model(source.run(run_id))
    if found is None:
        raise InputError(
            f"run '{run_id}' has no model yet", where="models", fix="wait until it has ended"
        )
    users = request.app.state.users
    users.note(asker_of(request).user.name, "model downloaded", run_id, sha256=found.sha256)
    return FileResponse(
        found.path,
        media_type="application/octet-stream",
        filename=f"{run_id}.safetensors",
        headers={"X-SHA256": found.sha256},
    )


@router.get("/audit")
@needs("operator")
def audit(request: Request) -> Response:
    """Who did what."""
    lines, wrong = source_of(request).audit()
    return render(request, "audit.html", lines=lines, wrong=wrong)


@router.get("/users")
@needs("admin")
def users(request: Request) -> Response:
    """Who may log in, and what they may do."""
    return render(request, "users.html", users=request.app.state.users.list(), roles=ROLES)


@router.get("/account")
@needs("viewer")
def account(request: Request) -> Response:
    """One's own password and tokens."""
    name = asker_of(request).user.name
    return render(request, "account.html", tokens=request.app.state.users.tokens(name))


def source_of(request: Request) -> Source:
    """What is shown."""
    source = request.app.state.source
    assert isinstance(source, Source)
    return source


def heat_grid(history: summary.History) -> dict[str, Any]:
    """The last rounds by client, those who failed most first; how many are left out."""
    recent = history[-HEAT_ROUNDS:]
    cells: dict[tuple[str, int], charts.Cell] = {}
    failed: dict[str, int] = {}
    for record in recent:
        number, capped = record["round"], set(record.get("capped", ()))
        for client in record["participants"]:
            state = "capped" if client in capped else "done"
            text = "took part; its weight was capped" if client in capped else "took part"
            cells[client, number] = charts.Cell(state, text)
            failed.setdefault(client, 0)
        for failure in record["failures"]:
            client = failure["client"]
            cells[client, number] = charts.Cell("failed", failure["reason"])
            failed[client] = failed.get(client, 0) + 1
    names = sorted(failed, key=lambda c: (-failed[c], c))
    shown = sorted(names[:HEAT_CLIENTS])
    grid = charts.heat(shown, [r["round"] for r in recent], cells)
    return {"grid": grid, "shown": len(shown), "all": len(names), "rounds": len(recent)}


def _timeline(history: summary.History, asked: Sequence[Any]) -> Any:
    """Rounds one after the other; where real sites were asked, their time in each."""
    known = [d for d in asked if d.sent is not None and d.done is not None]
    rows: dict[str, list[charts.Bar]] = {}
    if known:
        origin = min(d.sent for d in known)
        for d in known:
            text = f"round {d.round}, {d.client}: {d.done - d.sent:.2f} s"
            state = "failed" if d.status == "failed" else f"s{d.round % 2}"
            bar = charts.Bar(d.sent - origin, d.done - origin, state, text)
            rows.setdefault(d.client, []).append(bar)
        return charts.timeline(dict(sorted(rows.items())[:HEAT_CLIENTS]))
    at = 0.0
    for record in history:
        text = f"round {record['round']}: {record['seconds']:.3g} s"
        state = "failed" if record["failures"] else f"s{record['round'] % 2}"
        rows.setdefault("rounds", []).append(charts.Bar(at, at + record["seconds"], state, text))
        at += record["seconds"]
    return charts.timeline(rows)


def _traffic(asked: Sequence[Any]) -> list[tuple[int, int, int, float | None]]:
    """Round -> bytes to the sites, from them, and the slowest site's seconds."""
    rounds: dict[int, list[Any]] = {}
    for d in asked:
        if d.sent is not None:
            rounds.setdefault(d.round, []).append(d)
    return [
        (
            number,
            sum(d.bytes_down or 0 for d in found),
            sum(d.bytes_up or 0 for d in found),
            max((d.done - d.sent for d in found if d.done is not None), default=None),
        )
        for number, found in sorted(rounds.items())
    ]


def render(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page for whoever asks."""
    asker: Asker | None = getattr(request.state, "asker", None)
    token = ""
    if asker is not None and asker.session is not None:
        token = request.app.state.sessions.form_token(asker.session)
    source = request.app.state.source
    text = _templates.get_template(template).render(
        user=None if asker is None else asker.user,
        csrf=token,
        path=request.url.path,
        has_server=source.folder is not None,
        version=umbel.__version__,
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        **values,
    )
    return HTMLResponse(text, status)


def number(value: Any) -> str:
    """A figure for a cell: four significant digits; a dash for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(count: float) -> str:
    """Bytes in a readable unit (decimal)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def moment(text: str) -> str:
    """An ISO time without its zone, which is UTC everywhere here."""
    return text[:19].replace("T", " ")


def facts(table: Mapping[str, Any]) -> str:
    """Plain values in one line."""
    shown = (v if isinstance(v, str) else json.dumps(v) for v in table.values())
    return ", ".join(f"{k} {v}" for k, v in zip(table, shown, strict=True) if v not in ("", '""'))


def can(entry: RunEntry, job: Any, order: str) -> bool:
    """Whether an order makes sense for a run in the queue."""
    if job is None or entry is None:
        return False
    states = {
        "pause": ("queued", "running"),
        "stop": ("queued", "running", "paused"),
        "resume": ("paused", "stopped", "failed"),
    }
    return job.state in states[order]


_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_templates.filters |= {
    "number": number,
    "size": size,
    "duration": duration,
    "moment": moment,
    "facts": facts,
}
_templates.tests["allowed"] = can
