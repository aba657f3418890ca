"""What a site's worker runs: Umbel's ClientApp, as it is installed, on one message after the other.

The same app as in Flower's own processes, but loaded once: torch, the data and the model stay where
they are from round to round.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity

from umbel.client import worker
from umbel.client.machine import Allowance, Bounds

CONTEXTS = 4
"""Runs whose state is kept in memory; what must outlive them is in files."""


class Work(NamedTuple):
    """What the worker is asked, beside the message.

    Args:
        allow: the user's own code that the site lets runs name.
        maximum_epsilon: of all runs on the site's data; ``None``: no bound.
        job: what the server calls the run.
        share: how much of the machine it may use, as :class:`~umbel.client.machine.Allowance`.
    """

    allow: tuple[str, ...]
    maximum_epsilon: float | None
    job: str
    share: tuple[int | None, int | None, float | None]


def write_work(work: Work, message: Message) -> bytes:
    """A request for the worker."""
    head = json.dumps(work._asdict()).encode()
    return len(head).to_bytes(4, "big") + head + write_message(message)


def write_message(message: Message) -> bytes:
    """A message with its content."""
    document: bytes = message_to_proto(message).SerializeToString()
    return document


def read_message(document: bytes) -> Message:
    """The inverse of :func:`write_message`."""
    return message_from_proto(ProtoMessage.FromString(document))


def make(settings: dict[str, Any]) -> Callable[[bytes], bytes]:
    """What answers: ``settings`` say who the site is and where its data are."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("flwr").setLevel(logging.ERROR)
    import torch._dynamo  # noqa: F401  # seconds, which the first optimizer would take

    import umbel.client.training  # noqa: F401
    from umbel.client.flower.app import app

    bounds = Bounds(settings.get("threads"))
    contexts: dict[str, Context] = {}

    def answer(document: bytes) -> bytes:
        size = int.from_bytes(document[:4], "big")
        work = Work(**json.loads(document[4 : 4 + size]))
        message = read_message(document[4 + size :])
        metadata = message.metadata
        TaskIdentity.task_id, TaskIdentity.run_id = metadata.src_task_id or 0, metadata.run_id
        TaskIdentity.node_id = metadata.dst_node_id
        context = contexts.pop(work.job, None)
        if context is None:
            context = Context(metadata.run_id, metadata.dst_node_id, {}, RecordDict(), {})
        context.run_id = metadata.run_id
        context.node_config = _node_config(settings, work)
        contexts[work.job] = context
        while len(contexts) > CONTEXTS:
            contexts.pop(next(iter(contexts)))
        bounds.keep(Allowance(*work.share))
        reply = app(message=message, context=context)
        gc.collect(0)
        return write_message(reply)

    return answer


def _node_config(settings: dict[str, Any], work: Work) -> UserConfig:
    config: UserConfig = {
        "client": str(settings["name"]),
        "allow": " ".join(work.allow),
        "folder": str(settings["folder"]),
        "job": work.job,
        "hardware": bool(settings.get("hardware")),
    }
    if settings.get("data") is not None:
        config["data"] = str(settings["data"])
    if work.maximum_epsilon is not None:
        config["epsilon"] = work.maximum_epsilon
    return config


if __name__ == "__main__":
    worker.serve(make)
