"""A client between two messages, for processes that do not live that long.

What comes out holds every secret that the round still needs: it belongs in memory that only the
client reads, and away with it when the round is over.
"""

from __future__ import annotations

import json
from typing import Any

from umbel.privacy.secure_aggregation import graph
from umbel.privacy.secure_aggregation.agreement import KeyPair
from umbel.privacy.secure_aggregation.boxes import Contents
from umbel.privacy.secure_aggregation.client import Client, Edge, Setup
from umbel.privacy.secure_aggregation.messages import KINDS, Advert, Roster, Survivors
from umbel.privacy.secure_aggregation.refusals import Reason
from umbel.privacy.secure_aggregation.wire import Reader


def freeze(client: Client) -> bytes:
    """What ``client`` knows, to go on from."""
    state = client.state
    table: dict[str, Any] = {
        "over": None if state.over is None else int(state.over),
        "expects": [kind.KIND for kind in state.expects],
        "pair": None if state.pair is None else state.pair.private_bytes().hex(),
        "chain": None if state.chain is None else [link.hex() for link in state.chain.links],
        "commitment": None if state.chain is None else state.chain.commitment.hex(),
        "seed": state.seed.hex(),
        "edges": {
            str(them): [edge.mine.hex(), edge.box_in.hex(), edge.tags.hex()]
            + [part.hex() for part in edge.theirs]
            for them, edge in state.edges.items()
        },
        "advert": _body(state.advert),
        "roster": _body(state.roster),
        "members": list(state.members),
        "neighbours": list(state.neighbours),
        "graph": state.graph_digest.hex(),
        "survivors": _body(state.survivors),
        "consent": state.consent_digest.hex(),
    }
    if client.setup is not None:
        table["setup"] = freeze_setup(client.setup).decode("ascii")
    return json.dumps(table, separators=(",", ":")).encode("ascii")


def thaw(data: bytes, client: Client) -> None:
    """Makes a fresh ``client`` the one that was frozen; it was made with the same arguments."""
    table = json.loads(data)
    state = client.state
    state.over = None if table["over"] is None else Reason(table["over"])
    state.expects = tuple(KINDS[number] for number in table["expects"])
    state.pair = None if table["pair"] is None else KeyPair(bytes.fromhex(table["pair"]))
    if table["chain"] is not None:
        links = [bytes.fromhex(link) for link in table["chain"]]
        state.chain = graph.Chain(links, bytes.fromhex(table["commitment"]))
    state.seed = bytearray.fromhex(table["seed"])
    state.edges = {int(them): _edge(parts) for them, parts in table["edges"].items()}
    state.advert = _read(Advert, table["advert"])
    state.roster = _read(Roster, table["roster"])
    state.members = tuple(table["members"])
    state.neighbours = tuple(table["neighbours"])
    state.graph_digest = bytes.fromhex(table["graph"])
    state.survivors = _read(Survivors, table["survivors"])
    state.consent_digest = bytes.fromhex(table["consent"])
    if kept := table.get("setup"):
        client.setup = thaw_setup(kept.encode("ascii"))


def freeze_setup(setup: Setup) -> bytes:
    """What a client keeps for later rounds; as secret as all of them."""
    table = {
        "roster": setup.roster.body().hex(),
        "members": list(setup.members),
        "neighbours": list(setup.neighbours),
        "digest": setup.digest.hex(),
        "secrets": {str(them): secret.hex() for them, secret in setup.secrets.items()},
    }
    return json.dumps(table, separators=(",", ":")).encode("ascii")


def thaw_setup(data: bytes) -> Setup:
    """The inverse of :func:`freeze_setup`."""
    table = json.loads(data)
    return Setup(
        Roster.read(Reader(bytes.fromhex(table["roster"]))),
        tuple(table["members"]),
        tuple(table["neighbours"]),
        bytes.fromhex(table["digest"]),
        {int(them): bytes.fromhex(secret) for them, secret in table["secrets"].items()},
    )


def _edge(parts: list[str]) -> Edge:
    mine, box_in, tags, seed, root, half = map(bytes.fromhex, parts)
    return Edge(mine, box_in, tags, Contents(seed, root, half))


def _body(message: Advert | Roster | Survivors | None) -> str | None:
    return None if message is None else message.body().hex()


def _read(kind: Any, body: str | None) -> Any:
    return None if body is None else kind.read(Reader(bytes.fromhex(body)))
