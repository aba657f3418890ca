"""Flower's object store by a handful of statements: a message's parts, all at once.

Flower writes, links, reads and deletes each part by itself, with some ten statements that
SQLAlchemy builds anew: a fifth of a second of a processor for a round of three sites, whatever the
model. Here are the same rows of the same tables, so that Flower's own routes read them, too.

Each function is called within ``state.session()``: what else belongs to the message is in the same
transaction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.utils import uint64_to_int64

BELOW = (
    "WITH RECURSIVE part(id) AS (SELECT :root UNION "
    "SELECT child_id FROM object_children JOIN part ON parent_id = part.id) "
)


class Held(NamedTuple):
    """A message's parts.

    Args:
        tree: how they hang together; a part that stands twice has its children there both times.
        contents: name -> content; empty where its sender has not sent it yet.
    """

    tree: ObjectTree
    contents: dict[str, bytes]

    def whole(self) -> bool:
        """Whether every part is there."""
        return all(self.contents.values())


def store(state: LinkState, run_id: int, tree: ObjectTree, content: Callable[[str], bytes]) -> None:
    """Stores a message's parts; one that is there already is linked, and not asked for.

    Args:
        state: the link state.
        run_id: whose end they do not outlast.
        tree: how the parts hang together.
        content: name -> content.
    Raises:
        ValueError: a part is not what its name or the tree says.
    """
    children = {p.object_id: [c.object_id for c in p.children] for p in iterate_object_tree(tree)}
    named, holders = _names(children)
    rows = _query(
        state, f"SELECT object_id, is_available FROM objects WHERE object_id IN ({named})", holders
    )
    there = {row["object_id"]: row["is_available"] for row in rows}
    wanting = {
        name: _checked(name, children[name], content(name))
        for name in children
        if not there.get(name)
    }
    _many(
        state,
        "INSERT INTO objects (object_id, content, is_available, ref_count) "
        "VALUES (:name, :content, 1, 0)",
        [{"name": n, "content": held} for n, held in wanting.items() if n not in there],
    )
    _many(
        state,
        "UPDATE objects SET content = :content, is_available = 1 WHERE object_id = :name",
        [{"name": n, "content": held} for n, held in wanting.items() if n in there],
    )
    links = [
        {"parent": name, "child": child}
        for name in children
        if name not in there
        for child in children[name]
    ]
    _many(
        state,
        "INSERT INTO object_children (parent_id, child_id) VALUES (:parent, :child)",
        links,
    )
    _many(
        state,
        "UPDATE objects SET ref_count = ref_count + 1 WHERE object_id = :child",
        [{"child": link["child"]} for link in links],
    )
    _many(
        state,
        "INSERT OR IGNORE INTO run_objects (run_id, object_id) VALUES (:run, :name)",
        [{"run": uint64_to_int64(run_id), "name": name} for name in children],
    )


def _checked(name: str, children: list[str], content: bytes) -> bytes:
    if hashlib.sha256(content).hexdigest() != name:
        raise ValueError(f"part {name} has another hash")
    below = get_object_children_ids_from_object_content(content)
    if sorted(below) != sorted(children) or len(below) != len(set(below)):
        raise ValueError(f"part {name} has other parts below it")
    return content


def load(state: LinkState, root: str) -> Held | None:
    """A message's parts; ``None``: it is not there."""
    found = _query(
        state,
        BELOW + "SELECT object_id, content FROM part JOIN objects ON object_id = part.id",
        {"root": root},
    )
    contents = {row["object_id"]: row["content"] or b"" for row in found}
    if root not in contents:
        return None
    children: dict[str, list[str]] = {name: [] for name in contents}
    links = BELOW + "SELECT parent_id, child_id FROM part JOIN object_children ON parent_id = id"
    for row in _query(state, links, {"root": root}):
        children[row["parent_id"]].append(row["child_id"])

    def below(name: str) -> ObjectTree:
        return ObjectTree(object_id=name, children=[below(child) for child in children[name]])

    return Held(below(root), contents)


def discard(state: LinkState, root: str) -> None:
    """Deletes a message's parts but those that another message has, too."""
    level = {root}
    while level:
        named, holders = _names(level)
        unused = f"object_id IN ({named}) AND ref_count = 0"
        rows = _query(
            state,
            "SELECT child_id FROM objects JOIN object_children ON parent_id = object_id "
            f"WHERE {unused}",
            holders,
        )
        _query(state, f"DELETE FROM objects WHERE {unused}", holders)
        _many(
            state,
            "UPDATE objects SET ref_count = ref_count - 1 WHERE object_id = :child",
            [{"child": row["child_id"]} for row in rows],
        )
        level = {row["child_id"] for row in rows}


def _names(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    holders = {f"n{number}": name for number, name in enumerate(names)}
    return ", ".join(f":{holder}" for holder in holders), holders


def _query(state: LinkState, query: str, data: dict[str, str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = state.query(query, data)  # type: ignore[attr-defined]
    return found


def _many(state: LinkState, query: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        state.query(query, rows)  # type: ignore[attr-defined]
