"""Who is at the other end of a request: signed cookies, and a door that slows down guessing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

HOURS = 8.0
MOST_FAILURES = 5
WINDOW = 300.0
MOST_KEPT = 10_000


class Session(NamedTuple):
    """A session: ``id``, whose, the stamp of the password it began with, and until when."""

    id: str
    user: str
    stamp: str
    until: float


class Sessions:
    """Makes and reads cookies, and forgets all at a restart: the key is this process's own.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._key = secrets.token_bytes(32)
        self._clock = clock
        self._ended: OrderedDict[str, float] = OrderedDict()

    def begin(self, user: str, stamp: str) -> tuple[Session, str]:
        """A new session, and its cookie."""
        session = Session(secrets.token_hex(16), user, stamp, self._clock() + 3600 * HOURS)
        body = base64.urlsafe_b64encode(json.dumps(session).encode()).decode().rstrip("=")
        return session, f"{body}.{self._sign('session', body)}"

    def read(self, cookie: str) -> Session | None:
        """The session of a cookie that was made here, has not ended and was not changed."""
        body, _, signature = cookie.partition(".")
        try:
            if not hmac.compare_digest(signature, self._sign("session", body)):
                return None
        except TypeError:  # a signature that is not ASCII
            return None
        session = Session(*json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))))
        if session.until < self._clock() or session.id in self._ended:
            return None
        return session

    def end(self, session: Session) -> None:
        """Ends a session before its time."""
        now = self._clock()
        self._ended[session.id] = session.until
        while self._ended and next(iter(self._ended.values())) < now:
            self._ended.popitem(last=False)

    def form_token(self, session: Session) -> str:
        """What a form of this session holds, and no other page can know."""
        return self._sign("form", session.id)

    def is_form_token(self, session: Session, token: str) -> bool:
        """Whether a form was this session's."""
        return token.isascii() and hmac.compare_digest(token, self.form_token(session))

    def _sign(self, purpose: str, text: str) -> str:
        message = f"{purpose}:{text}".encode()
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()


class Throttle:
    """Counts failures by address: too many, and the door stays shut for a while.

    A success takes nothing back: else whoever has an account could guess another's for ever.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, address: str) -> float:
        """Seconds until this address may try again; 0: now."""
        now = self._clock()
        with self._lock:
            recent = self._recent(address, now)
        return WINDOW - (now - recent[0]) if len(recent) == MOST_FAILURES else 0.0

    def failed(self, address: str) -> None:
        """It has failed once more."""
        now = self._clock()
        with self._lock:
            recent = self._recent(address, now)
            self._failures.pop(address, None)
            self._failures[address] = [*recent, now][-MOST_FAILURES:]
            while len(self._failures) > MOST_KEPT:
                self._failures.popitem(last=False)

    def _recent(self, address: str, now: float) -> list[float]:
        return [t for t in self._failures.get(address, ()) if now - t < WINDOW]
