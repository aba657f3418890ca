from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from umbel.client.flower import host
from umbel.core.errors import RunError
from umbel.server.flower.local_grid import Died, LocalGrid, Work
from umbel.server.flower.run_app import new_identity

app = ClientApp()


@app.query()
def place(message: Message, context: Context) -> Message:
    content = RecordDict({"m": MetricRecord({"place": int(context.node_config["partition-id"])})})
    return Message(content, reply_to=message)


def grid(nodes: int, finish: Callable[[list[Work]], None] = lambda works: None) -> LocalGrid:
    """A grid whose crew holds its works back until there are as many as nodes."""
    works: list[Work] = []

    def submit(work: Work) -> None:
        works.append(work)
        if len(works) == nodes:
            finish(works)
            works.clear()

    return LocalGrid(new_identity(), nodes, submit)


def answer(work: Work) -> tuple[bytes, bytes]:
    """What a worker, which this process is not, would answer."""
    head = work.head()
    assert head is not None
    try:
        return host.answer(app, host.Settings("", "", {}), head, work.content)
    finally:
        TaskIdentity.node_id = SUPERLINK_NODE_ID


def do(work: Work) -> None:
    work.done(answer(work))


def queries(where: LocalGrid) -> list[Message]:
    content = RecordDict()
    return [Message(content, node, "query") for node in where.get_node_ids()]


def places(replies: list[Message]) -> list[int]:
    return [r.content["m"]["place"] for r in replies]  # type: ignore[index, misc]


def test_replies_come_in_the_order_of_their_messages() -> None:
    where = grid(5, lambda works: [do(work) for work in reversed(works)] and None)
    assert places(list(where.send_and_receive(queries(where)))) == [0, 1, 2, 3, 4]
    ids = list(where.push_messages(queries(where)))
    assert places(list(where.pull_messages(ids[::-1]))) == [0, 1, 2, 3, 4]
    assert where.counts == {"query": 10}


def test_one_record_for_all_is_pickled_once() -> None:
    seen: list[int] = []

    def finish(works: list[Work]) -> None:
        seen.extend(id(work.content) for work in works)
        for work in works:
            do(work)

    list((where := grid(4, finish)).send_and_receive(queries(where)))
    assert len(seen) == 4
    assert len(set(seen)) == 1


def test_a_worker_that_died_is_an_error_of_its_node() -> None:
    def finish(works: list[Work]) -> None:
        works[1].done(Died("ended by signal 9"))
        do(works[0])

    where = grid(2, finish)
    fine, died = where.send_and_receive(queries(where))
    assert fine.has_content()
    assert (died.error.code, died.error.reason) == (8, "ended by signal 9")
    assert died.metadata.src_node_id == list(where.get_node_ids())[1]
    assert where.errors == 1


def test_a_reply_to_something_else_is_an_error() -> None:
    def finish(works: list[Work]) -> None:
        for work in works:
            reply, context = answer(work)
            message = pickle.loads(reply)
            message.metadata.__dict__["_reply_to_message_id"] = "another"
            work.done((pickle.dumps(message), context))

    where = grid(1, finish)
    (reply,) = where.send_and_receive(queries(where))
    assert reply.error.code == 0


def test_who_waits_is_told_that_the_crew_cannot_go_on() -> None:
    where = grid(2, lambda works: where.fail(RunError("no more workers")))
    with pytest.raises(RunError, match="no more workers"):
        where.send_and_receive(queries(where))


def test_invalid_messages_are_refused_as_flower_does_it() -> None:
    where = grid(1)
    (message,) = queries(where)
    message.metadata.delivered_at = "yesterday"
    with pytest.raises(ValueError, match="Invalid message"):
        where.push_messages([message])


def test_ids_look_random_and_are_the_same_in_every_run() -> None:
    ids = list(grid(1000).get_node_ids())
    assert ids == list(grid(1000).get_node_ids())
    assert len(set(ids)) == 1000
    assert 2**32 < min(ids) < 2**60 < max(ids) < 2**63
