"""What changes something: log in and out, orders for runs, users and tokens. POST alone."""

from __future__ import annotations

import threading
import tomllib

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from umbel.core import run_file
from umbel.core.errors import InputError, RefusedError
from umbel.deploy.dashboard.guard import ANYBODY, asker_of, cookie_name, needs
from umbel.deploy.dashboard.pages import render, source_of
from umbel.deploy.dashboard.sessions import HOURS
from umbel.deploy.dashboard.users import Users
from umbel.deploy.jobs import Job, Jobs
from umbel.deploy.provisioning import note

router = APIRouter()

ORDERS = ("pause", "resume", "stop")

# A hash takes 64 MB of memory on purpose: strangers must not ask for a hundred at once.
_hashing = threading.BoundedSemaphore(2)


@router.post("/login")
@needs(ANYBODY)
def login(request: Request) -> Response:
    """Lets a user in, who knows the password; slower after five failures."""
    form, users, throttle = request.state.form, _users(request), request.app.state.throttle
    name, password = form.get("user", "")[:64], form.get("password", "")
    address = request.client.host if request.client else ""
    wait = throttle.wait(address)
    if wait > 0:
        page = render(
            request, "login.html", status=429, error=f"too many failures: wait {wait:.0f} s"
        )
        page.headers["Retry-After"] = str(int(wait) + 1)
        return page
    with _hashing:
        if throttle.wait(address) > 0:  # those who came at the same time have failed meanwhile
            return render(request, "login.html", status=429, error="too many failures: wait")
        user = users.check(name, password)
        if user is None:
            throttle.failed(address)
    if user is None:
        users.note("–", "login refused", user=name, address=address)
        return render(request, "login.html", status=401, error="this user and password do not fit")
    users.note(user.name, "login", address=address)
    _, cookie = request.app.state.sessions.begin(user.name, user.stamp)
    tls = bool(request.app.state.tls)
    answer = RedirectResponse("/", 303)
    answer.set_cookie(
        cookie_name(tls),
        cookie,
        max_age=int(3600 * HOURS),
        secure=tls,
        httponly=True,
        samesite="strict",
    )
    return answer


@router.post("/logout")
@needs("viewer")
def logout(request: Request) -> Response:
    """Ends the session."""
    session = asker_of(request).session
    if session is not None:
        request.app.state.sessions.end(session)
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(cookie_name(bool(request.app.state.tls)), httponly=True, samesite="strict")
    return answer


@router.post("/submit")
@needs("operator")
def submit(request: Request) -> Response:
    """Puts a run file into the server's queue."""
    job = enqueue(request, request.state.form.get("text", ""), request.state.form.get("sites", "0"))
    return RedirectResponse(f"/runs?submitted={job.id}", 303)


@router.post("/jobs/{job_id}/{order}")
@needs("operator")
def order(request: Request, job_id: str, order: str) -> Response:
    """Has a run paused, resumed or stopped, by the run manager."""
    job = obey(request, job_id, order)
    return RedirectResponse(f"/runs/{job.run_id}" if job.run_id else "/runs", 303)


@router.post("/users")
@needs("admin")
def add_user(request: Request) -> Response:
    """Adds a user."""
    form = request.state.form
    name, role, password = (form.get(key, "") for key in ("user", "role", "password"))
    with _hashing:
        _users(request).add(_actor(request), name, role, password)
    return RedirectResponse("/users", 303)


@router.post("/users/{name}/role")
@needs("admin")
def set_role(request: Request, name: str) -> Response:
    """Changes what a user may do."""
    _users(request).set_role(_actor(request), name, request.state.form.get("role", ""))
    return RedirectResponse("/users", 303)


@router.post("/users/{name}/password")
@needs("admin")
def set_password(request: Request, name: str) -> Response:
    """Gives a user a new password."""
    with _hashing:
        _users(request).set_password(_actor(request), name, request.state.form.get("password", ""))
    return RedirectResponse("/users", 303)


@router.post("/users/{name}/remove")
@needs("admin")
def remove_user(request: Request, name: str) -> Response:
    """Removes a user."""
    _users(request).remove(_actor(request), name)
    return RedirectResponse("/users", 303)


@router.post("/account/password")
@needs("viewer")
def own_password(request: Request) -> Response:
    """Changes one's own password, which takes the old one."""
    form, users, name = request.state.form, _users(request), _actor(request)
    with _hashing:
        if users.check(name, form.get("old", "")) is None:
            raise InputError("the old password does not fit", where="account", fix="try again")
        users.set_password(name, name, form.get("new", ""))
    return RedirectResponse("/login", 303)


@router.post("/account/tokens")
@needs("viewer")
def make_token(request: Request) -> Response:
    """Makes a token for programs, and shows it once."""
    users, name = _users(request), _actor(request)
    token = users.make_token(name, request.state.form.get("label", ""))
    return render(request, "account.html", tokens=users.tokens(name), token=token)


@router.post("/account/tokens/{token_id}/drop")
@needs("viewer")
def drop_token(request: Request, token_id: str) -> Response:
    """Ends a token."""
    _users(request).drop_token(_actor(request), token_id)
    return RedirectResponse("/account", 303)


def enqueue(request: Request, text: str, sites: str) -> Job:
    """Submits a run file for whoever asks.

    Raises:
        InputError: the run file is wrong, or there is no server.
        RefusedError: it names code or files of this machine, which takes its shell.
    """
    jobs = _jobs(request)
    try:
        table = tomllib.loads(text)
        wanted = int(sites or "0")
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise InputError(f"not a run file: {error}", where="run file", fix="mend it") from None
    run = run_file.resolve(table, "run file")
    if foreign := [*run.own_parts(), *run.files()]:
        raise RefusedError(
            f"'{foreign[0]}' is code or a file of this machine",
            where="run file",
            fix="submit it there: umbel submit",
        )
    if not 0 <= wanted <= 100_000:
        raise InputError(f"sites = {wanted}", where="sites", fix="use 0 for all members")
    job = jobs.submit(run, text, wanted)
    _noted(request, "run submitted", job)
    return job


def obey(request: Request, job_id: str, order: str) -> Job:
    """Enters an order of whoever asks.

    Raises:
        InputError: no such run or order, or the run is not in a state for it.
    """
    jobs = _jobs(request)
    if order not in ORDERS:
        raise InputError(f"'{order[:20]}' is no order", where="orders", fix=", ".join(ORDERS))
    found = next((job for job in jobs.list() if job_id in (job.id, job.run_id)), None)
    if found is None:
        raise InputError(f"no run '{job_id[:80]}'", where="queue", fix="see the list of runs")
    job = jobs.want(found, order)  # type: ignore[arg-type]
    _noted(request, f"{order} ordered", job)
    return job


def _noted(request: Request, event: str, job: Job) -> None:
    folder = source_of(request).folder
    assert folder is not None
    note(folder, event, actor=_actor(request), job=job.id, run_id=job.run_id)


def _jobs(request: Request) -> Jobs:
    jobs = source_of(request).jobs
    if jobs is None:
        raise InputError(
            "there is no server: these runs are simulations",
            where="dashboard",
            fix="umbel simulate; or umbel dashboard --folder of a server",
        )
    return jobs


def _users(request: Request) -> Users:
    users = request.app.state.users
    assert isinstance(users, Users)
    return users


def _actor(request: Request) -> str:
    return asker_of(request).user.name
