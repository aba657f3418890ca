"""Who may look, and who may do: users with a role, and tokens that stand for them in programs."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import sqlalchemy as sa

from umbel.core.errors import InputError
from umbel.deploy.provisioning import password_fits, password_hash
from umbel.server import journal
from umbel.server.database import Database, locate
from umbel.server.schema import token_table, user_table

Role: TypeAlias = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""From the least to the most: who may do more may do all that the ones before may."""

SHORTEST = 12
LONGEST = 256
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")


class User(NamedTuple):
    """A user.

    Args:
        name: of the user.
        role: what it may do.
        stamp: changes with its password: what was signed before is worth nothing.
        created: when, ISO 8601.
    """

    name: str
    role: Role
    stamp: str
    created: str

    def may(self, role: Role) -> bool:
        """Whether it may do what ``role`` may."""
        return ROLES.index(self.role) >= ROLES.index(role)


class Token(NamedTuple):
    """A token, without its secret, which is shown once."""

    id: str
    user: str
    label: str
    created: str


class Users:
    """The users of the store at ``location``; what changes is in its audit table."""

    def __init__(self, location: str) -> None:
        self._database = Database(locate(location))
        self._nobody = password_hash(secrets.token_hex(16))

    def begin(self, admin_file: Path | None) -> str | None:
        """Makes the first admin, where there are no users yet.

        Args:
            admin_file: holds the hash of the password that ``umbel server init`` showed.
        Returns:
            the password, where a new one was made: to be shown once.
        """
        if self.list():
            return None
        password: str | None = None
        if admin_file is not None and admin_file.is_file():
            hashed = str(json.loads(admin_file.read_text(encoding="utf-8"))["password"])
        else:
            password = secrets.token_urlsafe(15)
            hashed = password_hash(password)
        with self._database.write() as connection:
            if connection.execute(sa.select(sa.func.count()).select_from(user_table)).scalar_one():
                return None
            connection.execute(sa.insert(user_table), _row("admin", "admin", hashed))
            journal.note(connection, "umbel", "user added", user="admin", role="admin")
        return password

    def reset_admin(self) -> str:
        """A new password of ``admin``, who is made again where it was removed."""
        password = secrets.token_urlsafe(15)
        if self.get("admin") is None:
            self.add("umbel", "admin", "admin", password)
        else:
            self.set_password("umbel", "admin", password)
            self.set_role("umbel", "admin", "admin")
        return password

    def list(self) -> list[User]:
        """Everybody, by name."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(user_table).order_by(user_table.c.name)).all()
        return [_user(row) for row in rows]

    def get(self, name: str) -> User | None:
        """The user of this name."""
        with self._database.read() as connection:
            query = sa.select(user_table).where(user_table.c.name == name)
            row = connection.execute(query).one_or_none()
        return None if row is None else _user(row)

    def check(self, name: str, password: str) -> User | None:
        """The user, where the password is right. It takes as long where there is no such user."""
        with self._database.read() as connection:
            query = sa.select(user_table).where(user_table.c.name == name)
            row = connection.execute(query).one_or_none()
        fits = password_fits(password[:LONGEST], self._nobody if row is None else row.password)
        return _user(row) if row is not None and fits else None

    def add(self, actor: str, name: str, role: str, password: str) -> None:
        """Adds a user.

        Raises:
            InputError: the name is taken or none, the role unknown, or the password too short.
        """
        if not NAME.fullmatch(name):
            raise _wrong(f"'{name[:40]}' is no user's name", "use a-z, 0-9, '.', '_' and '-'")
        row = _row(name, _role(role), _hashed(password))
        with self._database.write() as connection:
            taken = sa.select(user_table.c.name).where(user_table.c.name == name)
            if connection.execute(taken).first():
                raise _wrong(f"there is a user '{name}' already", "choose another name")
            connection.execute(sa.insert(user_table), row)
            journal.note(connection, actor, "user added", user=name, role=role)

    def set_role(self, actor: str, name: str, role: str) -> None:
        """Changes a user's role.

        Raises:
            InputError: no such user or role, or nobody would be admin any more.
        """
        with self._database.write() as connection:
            change = sa.update(user_table).where(user_table.c.name == name)
            _one(connection.execute(change.values(role=_role(role))).rowcount, name)
            _still_governed(connection)
            journal.note(connection, actor, "role changed", user=name, role=role)

    def set_password(self, actor: str, name: str, password: str) -> None:
        """Changes a user's password: its sessions end.

        Raises:
            InputError: no such user, or the password is too short.
        """
        hashed = _hashed(password)
        with self._database.write() as connection:
            change = sa.update(user_table).where(user_table.c.name == name)
            _one(connection.execute(change.values(password=hashed)).rowcount, name)
            journal.note(connection, actor, "password changed", user=name)

    def remove(self, actor: str, name: str) -> None:
        """Removes a user with its tokens.

        Raises:
            InputError: no such user, or nobody would be admin any more.
        """
        with self._database.write() as connection:
            connection.execute(sa.delete(token_table).where(token_table.c.user == name))
            gone = sa.delete(user_table).where(user_table.c.name == name)
            _one(connection.execute(gone).rowcount, name)
            _still_governed(connection)
            journal.note(connection, actor, "user removed", user=name)

    def tokens(self, name: str) -> Sequence[Token]:
        """The tokens of a user, the oldest first."""
        columns = [token_table.c[column] for column in Token._fields]
        query = sa.select(*columns).where(token_table.c.user == name)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(token_table.c.created)).all()
        return [Token(*row) for row in rows]

    def make_token(self, name: str, label: str) -> str:
        """A new token of this user: shown once, kept as a hash."""
        token = f"umbel_{secrets.token_urlsafe(32)}"
        row = {
            "id": secrets.token_hex(6),
            "user": name,
            "label": label[:60],
            "sha256": _digest(token),
            "created": _now(),
        }
        with self._database.write() as connection:
            connection.execute(sa.insert(token_table), row)
            journal.note(connection, name, "token made", token=row["id"], label=row["label"])
        return token

    def drop_token(self, name: str, token_id: str) -> None:
        """Ends a token of this user.

        Raises:
            InputError: it has no such token.
        """
        with self._database.write() as connection:
            mine = sa.and_(token_table.c.user == name, token_table.c.id == token_id)
            if not connection.execute(sa.delete(token_table).where(mine)).rowcount:
                raise _wrong("no such token", "look at the list again")
            journal.note(connection, name, "token dropped", token=token_id)

    def bearer(self, token: str) -> User | None:
        """Whom a token stands for."""
        query = sa.select(user_table).join(token_table, token_table.c.user == user_table.c.name)
        with self._database.read() as connection:
            row = connection.execute(
                query.where(token_table.c.sha256 == _digest(token))
            ).one_or_none()
        return None if row is None else _user(row)

    def note(self, actor: str, event: str, run_id: str = "", **facts: object) -> None:
        """An entry in the store's audit table."""
        with self._database.write() as connection:
            journal.note(connection, actor, event, run_id, **facts)


def _row(name: str, role: str, hashed: str) -> dict[str, str]:
    return {"name": name, "role": role, "password": hashed, "created": _now()}


def _user(row: sa.Row[tuple[str, Role, str, str]]) -> User:
    return User(row.name, row.role, _digest(row.password)[:16], row.created)


def _role(role: str) -> Role:
    if role not in ROLES:
        raise _wrong(f"'{role[:40]}' is no role", f"use one of: {', '.join(ROLES)}")
    return role


def _hashed(password: str) -> str:
    if not SHORTEST <= len(password) <= LONGEST:
        raise _wrong(
            f"a password has {SHORTEST} to {LONGEST} characters, and this has {len(password)}",
            "four words that do not belong together are a good one",
        )
    return password_hash(password)


def _one(count: int, name: str) -> None:
    if count != 1:
        raise _wrong(f"no user '{name[:40]}'", "look at the list again")


def _still_governed(connection: sa.Connection) -> None:
    admins = sa.select(sa.func.count()).where(user_table.c.role == "admin")
    if not connection.execute(admins).scalar_one():
        raise _wrong("nobody would be admin any more", "make somebody else admin first")


def _wrong(message: str, fix: str) -> InputError:
    return InputError(message, where="users", fix=fix)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
