"""Every request passes here first: which route, who asks, and whether that may be.

A route that does not say who may use it may be used by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, NamedTuple, TypeAlias, TypeVar
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from umbel.core.errors import UmbelError
from umbel.deploy.dashboard.sessions import Session, Sessions
from umbel.deploy.dashboard.users import ROLES, User, Users

LARGEST_BODY = 256_000
MACHINES = ("/api/", "/metrics")
"""Beginnings of paths that programs ask for: errors are JSON there."""

SAFE = ("GET", "HEAD", "OPTIONS")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}

Form: TypeAlias = Mapping[str, str]
F = TypeVar("F", bound=Callable[..., Any])
_NEEDS = "umbel_needs"
ANYBODY = "anybody"


def needs(role: str) -> Callable[[F], F]:
    """Says who may use a route: a role, or :data:`ANYBODY`."""
    if role not in (*ROLES, ANYBODY):
        raise ValueError(role)

    def mark(endpoint: F) -> F:
        setattr(endpoint, _NEEDS, role)
        return endpoint

    return mark


def needed(endpoint: object) -> str | None:
    """Who may use the route of ``endpoint``; ``None``: nobody."""
    role = getattr(endpoint, _NEEDS, None)
    return role if isinstance(role, str) else None


class Asker(NamedTuple):
    """Who asks: a user, by a session or by a token."""

    user: User
    session: Session | None


class Guard:
    """The outermost layer of the dashboard.

    Args:
        app: what is guarded.
        find: (scope) -> the endpoint that would answer; ``None``: there is none.
        users: who there is.
        sessions: who is in.
        hosts: names by which the dashboard may be addressed.
        tls: whether the connection is, so that the cookie is for such alone.
    """

    def __init__(
        self,
        app: ASGIApp,
        find: Callable[[Scope], object | None],
        users: Users,
        sessions: Sessions,
        hosts: frozenset[str],
        tls: bool,
    ) -> None:
        self._app = app
        self._find = find
        self._users = users
        self._sessions = sessions
        self._hosts = hosts
        self._tls = tls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers by itself, or passes the request on with ``asker`` and ``form`` in its state."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        with_headers = _hardened(send, self._tls)
        try:
            refused = await self._refusal(scope, receive)
        except UmbelError as error:  # the store, where the users are
            as_page = not scope["path"].startswith(MACHINES)
            refused = _no(503, error.message, as_page)
        if refused is not None:
            await refused(scope, receive, with_headers)
        else:
            await self._app(scope, receive, with_headers)

    async def _refusal(self, scope: Scope, receive: Receive) -> Response | None:
        from starlette.concurrency import run_in_threadpool

        headers = Headers(scope=scope)
        if host_name(headers.get("host", "")) not in self._hosts:
            return PlainTextResponse("unknown host\n", 421)
        state = scope.setdefault("state", {})
        state["asker"], state["form"] = None, {}
        as_page = not scope["path"].startswith(MACHINES)
        if not _is_same_origin(headers):
            return _no(403, "this request comes from another site", as_page)
        if scope["method"] not in SAFE:
            body = await _body(receive)
            if body is None:
                return _no(413, f"at most {LARGEST_BODY} bytes", as_page)
            state["form"] = _form(body)
        endpoint = self._find(scope)
        role = needed(endpoint)
        bearer = headers.get("authorization", "")
        state["asker"] = asker = await run_in_threadpool(
            self._asker, bearer, _cookie(headers.get("cookie", ""), cookie_name(self._tls))
        )
        if endpoint is not None and role == ANYBODY:
            return None
        if asker is None:
            if as_page and scope["method"] in SAFE:
                return RedirectResponse("/login", 303)
            return _no(401, "log in, or send a token", as_page)
        if endpoint is None:
            return None  # 404 or 405, by whoever is in
        if role not in ROLES or not asker.user.may(role):
            return _no(403, f"this needs the role '{role}'", as_page)
        if scope["method"] not in SAFE and asker.session is not None:
            token = state["form"].get("csrf", "") or headers.get("x-csrf-token", "")
            if not self._sessions.is_form_token(asker.session, token):
                return _no(403, "this form is of another session: load the page again", as_page)
        return None

    def _asker(self, bearer: str, cookie: str) -> Asker | None:
        kind, _, token = bearer.partition(" ")
        if kind.lower() == "bearer":
            user = self._users.bearer(token.strip())
            return None if user is None else Asker(user, None)
        session = self._sessions.read(cookie) if cookie else None
        if session is None:
            return None
        user = self._users.get(session.user)
        return Asker(user, session) if user is not None and user.stamp == session.stamp else None


def asker_of(request: Request) -> Asker:
    """Who asks, where the guard let somebody through."""
    asker = request.state.asker
    assert isinstance(asker, Asker)
    return asker


def cookie_name(tls: bool) -> str:
    """Of the session's cookie; ``__Host-`` makes browsers refuse it from anybody else."""
    return "__Host-umbel" if tls else "umbel"


def host_name(header: str) -> str:
    """The host without its port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _is_same_origin(headers: Headers) -> bool:
    origin = headers.get("origin")
    if origin is not None:
        try:
            return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
        except ValueError:
            return False
    return headers.get("sec-fetch-site", "none") in ("none", "same-origin") or (
        headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    )


async def _body(receive: Receive) -> bytes | None:
    chunks, size = [], 0
    while True:
        message: Message = await receive()
        if message["type"] != "http.request":
            return b""
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > LARGEST_BODY:
            return None
        if not message.get("more_body"):
            return b"".join(chunks)


def _form(body: bytes) -> dict[str, str]:
    try:
        found = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=50)
    except (ValueError, UnicodeDecodeError):
        return {}
    return {name: values[-1] for name, values in found.items()}


def _cookie(header: str, name: str) -> str:
    try:
        jar = SimpleCookie(header)
    except CookieError:
        return ""
    return jar[name].value if name in jar else ""


def _no(status: int, text: str, as_page: bool) -> Response:
    if as_page:
        return PlainTextResponse(f"{text}\n", status)
    return JSONResponse({"error": {"message": text}}, status)


def _hardened(send: Send, tls: bool) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            known = {name.lower() for name, _ in message["headers"]}
            extra = dict(HEADERS)
            if tls:
                extra["Strict-Transport-Security"] = "max-age=31536000"
            message["headers"] = [
                *message["headers"],
                *(
                    (name.lower().encode(), value.encode())
                    for name, value in extra.items()
                    if name.lower().encode() not in known
                ),
            ]
        await send(message)

    return with_headers
