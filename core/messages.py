"""What a server and its clients say to each other over Flower: canonical JSON beside safetensors.

A request carries the run file's tables, never code, and a reply carries numbers and names. A client
that cannot answer says so with one of the codes below and the class of the exception; its text
stays at the client, for it may name a patient's file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import pydantic

from umbel.core import run_file
from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.core.settings import Natural, Settings, parse

VERSION = 1

# Message types, as Flower routes them.
HELLO, STAGES, TRAIN, EVALUATE = "query.hello", "query.stages", "train", "evaluate"

# The records of a message, and the one value that each holds.
MANIFEST, MODEL = "manifest", "model"

# Secure aggregation: its record, which also says what the round is about, and its message types,
# ``train.…`` and ``evaluate.…``, by what the server waits for.
SECURE = "secure"
SECURE_STAGES = (
    "secure_adverts",
    "secure_reveals",
    "secure_shares",
    "secure_masked",
    "secure_consents",
    "secure_unmask",
)

# Errors of a deployment's own transport, beside Flower's codes.
BROKEN_SEAL, OTHER_NAME = 100, 101

PROBLEMS = {
    "policy": "does not allow what the run asks for",
    "state": "has no place for what the strategy has clients keep",
    "request": "cannot read the request; is it the same version of Umbel?",
    "data": "cannot read its data",
    "client": "is not the client that the request names, or its data are others'",
    "task": "cannot build the task",
    "model": "was sent a model that is not the task's",
    "budget": "does not pay for that out of its privacy budget",
    "secure": "cannot take part in secure aggregation",
    "training": "failed in training",
    "evaluation": "failed in evaluation",
}
"""Code -> what it says of a client."""


Question: TypeAlias = Literal["train", "importance", "prototypes", "joint"]
"""What clients are asked in a stage of a run over experiences: to train on it; how much each
parameter counts, when they leave an experience; the sums of their classes' features; to train on
all their experiences at once, as if there were no stages."""

QUESTIONS: tuple[Question, ...] = get_args(Question)

AFTER, MEANS = "after-", "means"
"""Letters of what is sent beside a model: those that stages ended with, ``after-1/<name>`` …, and
the class means that it is evaluated by."""


class Stage(Settings):
    """Where a client is in a run over experiences, and what it is asked there.

    Which of its examples belong to an experience follows from the run file and from the examples,
    and is never told.

    Args:
        number: from 0.
        question: what it is asked.
        order: the experience that it is in at each stage.
        seen: which classes anybody has met by the end of this stage.
    """

    number: Natural
    question: Question
    order: tuple[Natural, ...] = pydantic.Field(strict=False, max_length=10_000)
    seen: tuple[bool, ...] = pydantic.Field(strict=False)

    @pydantic.model_validator(mode="after")
    def _within(self) -> Stage:
        if self.number >= len(self.order):
            raise ValueError(f"stage {self.number + 1} of {len(self.order)}")
        return self


class Request(NamedTuple):
    """What a client is asked.

    Args:
        run: the run file; a site puts its own ``[data] path`` in the place of the server's.
        round: 0 for the greeting.
        client: whom it is for; empty in the greeting.
        run_id: under which it keeps what it keeps from round to round.
        base: hash of the parameters that nobody trains or sends, of the server's model; ``None``:
            there are none, or this is the greeting.
        stage: in a run over experiences; ``None``: there are none, or this is the greeting.
    """

    run: RunFile
    round: int
    client: str
    run_id: str = ""
    base: str | None = None
    stage: Stage | None = None


class _Reply(Settings):
    client: str = pydantic.Field(min_length=1, max_length=200)


class Hello(_Reply):
    """A client's answer to the greeting: who it is, and what it holds.

    Args:
        examples: training examples, at least one.
        test_examples: of its own test part.
        info: the fields of ``datasets.federated.Info``.
        versions: name -> version.
        hardware: what its machine is, where it tells.
    """

    examples: int = pydantic.Field(ge=1)
    test_examples: Natural
    info: dict[str, Any]
    versions: dict[str, str | None]
    hardware: dict[str, str] = pydantic.Field(default_factory=dict)


class Stages(_Reply):
    """How many examples a client would answer each question with, stage after stage; 0: it would
    not be asked."""

    examples: dict[Question, Annotated[tuple[Natural, ...], pydantic.Field(strict=False)]]


class Answer(_Reply):
    """A client's answer to a round: how many examples it used, and means over them.

    Not judged here: an absurd number of examples is for the update gate, which names it.
    """

    round: Natural
    examples: float
    metrics: dict[str, float | None]

    def means(self) -> dict[str, float]:
        """The metrics; those that JSON could not write are NaN."""
        return {n: math.nan if v is None else v for n, v in self.metrics.items()}


class Problem(Settings):
    """A client's answer when it cannot give another: a code, and an exception's class name."""

    error: Literal[
        "policy",
        "state",
        "request",
        "data",
        "client",
        "task",
        "model",
        "budget",
        "secure",
        "training",
        "evaluation",
    ]
    exception: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]

    def reason(self) -> str:
        """For people."""
        return f"{PROBLEMS[self.error]} ({self.exception})"


NOT_NOW = Problem(error="policy", exception="hours").reason()
"""Why a client does not take part that would at another hour."""

TAKE, GIVE, BEAT = "/v1/fleet/take", "/v1/fleet/give", "/v1/fleet/beat"
"""A message each way in one request: what Umbel's sites use where their server has it."""


def write_frames(frames: Sequence[bytes]) -> bytes:
    """Several documents as one."""
    return b"".join(part for f in frames for part in (len(f).to_bytes(8, "big"), f))


def read_frames(document: bytes) -> list[bytes]:
    """The inverse of :func:`write_frames`.

    Raises:
        ValueError: the document was cut short.
    """
    frames, place = [], 0
    while place < len(document):
        start = place + 8
        place = start + int.from_bytes(document[place:start], "big")
        if place > len(document):
            raise ValueError("cut short")
        frames.append(document[start:place])
    return frames


R = TypeVar("R", Hello, Stages, Answer)


def write_run(run: RunFile) -> dict[str, Any]:
    """The tables of ``run`` as plain values, without where the server keeps its records."""
    return run.model_dump(mode="json", exclude={"run": {"store"}})


def write_request(
    tables: Mapping[str, Any],
    round_number: int,
    client: str,
    run_id: str = "",
    base: str | None = None,
    stage: Stage | None = None,
) -> str:
    """A request; ``tables`` are :func:`write_run`'s."""
    return _json(
        {
            "version": VERSION,
            "run": tables,
            "round": round_number,
            "client": client,
            "run_id": run_id,
            "base": base,
            "stage": None if stage is None else stage.model_dump(mode="json"),
        }
    )


def read_request(text: object) -> Request:
    """The inverse of :func:`write_request`.

    Raises:
        InputError: not a request, of another version, or with a run file that is not valid here.
    """
    table = _table(text)
    if table is None or table.get("version") != VERSION:
        raise InputError(
            "not a request of this version",
            where="server's message",
            fix="run the same version of Umbel on the server and at the sites",
        )
    run = run_file.resolve(table.get("run") or {}, "server's message")
    run_id, base = str(table.get("run_id", "")), table.get("base")
    given = table.get("stage")
    stage = None if given is None else parse(Stage, given, "server's message")
    return Request(run, int(table["round"]), str(table["client"]), run_id, base, stage)


def write_reply(reply: Hello | Stages | Answer | Problem) -> str:
    """A reply as text."""
    return _json(reply.model_dump(mode="json"))


def read_reply(text: object, kind: type[R]) -> R | Problem | None:
    """A reply of ``kind``, or the problem that its client has; ``None`` where it is neither."""
    table = _table(text)
    if table is None:
        return None
    try:
        return Problem.model_validate(table) if "error" in table else kind.model_validate(table)
    except pydantic.ValidationError:
        return None


def answer(client: str, round_number: int, examples: float, metrics: Mapping[str, float]) -> Answer:
    """A client's answer; means that are not finite are left for the reader to see as NaN."""
    written = {n: v if math.isfinite(v) else None for n, v in metrics.items()}
    return Answer(client=client, round=round_number, examples=examples, metrics=written)


def problem(code: str, error: BaseException) -> Problem:
    """What may be told of ``error``."""
    return Problem.model_validate({"error": code, "exception": type(error).__name__[:64]})


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _table(text: object) -> dict[str, Any] | None:
    try:
        table = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) else None
