"""Messages' parts in Flower's object store: written in a few statements, as Flower writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import NoObjectInStoreError

from umbel.server.flower import objects
from umbel.server.flower.link import open_factory

RUN = 2**63 + 5
TABLES = ("objects", "object_children", "run_objects")


def _records(name: str) -> RecordDict:
    """Two parts: one of its own, one that all have."""
    shared = ConfigRecord({"model": b"the same for all"})
    return RecordDict({"manifest": ConfigRecord({"for": name}), "model": shared})


def _state(tmp_path: Path, name: str = "link.db") -> LinkState:
    return open_factory(tmp_path / name).state()


def _store(state: LinkState, records: RecordDict) -> str:
    parts = get_all_nested_objects(records)
    tree = get_object_tree(records)
    objects.store(state, RUN, tree, lambda name: parts[name].deflate())
    return tree.object_id


def _rows(state: LinkState) -> list[list[tuple[object, ...]]]:
    tables = []
    for table in TABLES:
        rows = state.query(f"SELECT * FROM {table}")  # type: ignore[attr-defined]
        tables.append(sorted(tuple(row.values()) for row in rows))
    return tables


def test_the_rows_are_those_that_flower_writes(tmp_path: Path) -> None:
    ours, flowers = _state(tmp_path), _state(tmp_path, "flowers.db")
    for name in ("aarhus", "basel"):
        records = _records(name)
        parts, tree = get_all_nested_objects(records), get_object_tree(records)
        _store(ours, records)
        for missing in flowers.object_store.preregister(RUN, tree):
            flowers.object_store.put(missing, parts[missing].deflate())
    assert _rows(ours) == _rows(flowers)
    root = get_object_tree(_records("aarhus")).object_id
    held = objects.load(flowers, root)
    assert held is not None
    assert held.whole()
    assert held.contents.keys() == get_all_nested_objects(_records("aarhus")).keys()
    ours.object_store.delete(root)
    objects.discard(flowers, root)
    assert _rows(ours) == _rows(flowers)


def test_a_part_goes_with_the_last_message_that_has_it(tmp_path: Path) -> None:
    state = _state(tmp_path)
    first, second = _store(state, _records("aarhus")), _store(state, _records("basel"))
    objects.discard(state, first)
    left = objects.load(state, second)
    assert left is not None
    assert left.whole()
    assert objects.load(state, first) is None
    objects.discard(state, second)
    assert _rows(state) == [[], [], []]


def test_what_is_there_is_not_asked_for(tmp_path: Path) -> None:
    state = _state(tmp_path)
    _store(state, _records("aarhus"))
    records, asked = _records("basel"), []
    parts, tree = get_all_nested_objects(records), get_object_tree(records)

    def content(name: str) -> bytes:
        asked.append(name)
        return parts[name].deflate()

    objects.store(state, RUN, tree, content)
    assert len(asked) == len(parts) - 1


def test_half_a_message_of_flowers_own_node_is_not_whole(tmp_path: Path) -> None:
    state, records = _state(tmp_path), _records("aarhus")
    state.object_store.preregister(RUN, get_object_tree(records))
    held = objects.load(state, get_object_tree(records).object_id)
    assert held is not None
    assert not held.whole()
    _store(state, records)
    held = objects.load(state, get_object_tree(records).object_id)
    assert held is not None
    assert held.whole()


def test_a_changed_part_or_tree_is_refused(tmp_path: Path) -> None:
    state, records = _state(tmp_path), _records("aarhus")
    parts, tree = get_all_nested_objects(records), get_object_tree(records)
    with pytest.raises(ValueError, match="another hash"):
        objects.store(state, RUN, tree, lambda name: parts[name].deflate() + b"!")
    del tree.children[1:]
    with pytest.raises(ValueError, match="other parts below it"):
        objects.store(state, RUN, tree, lambda name: parts[name].deflate())
    assert _rows(state) == [[], [], []]
    with pytest.raises(NoObjectInStoreError):
        state.object_store.get_object_tree(tree.object_id)
