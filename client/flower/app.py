"""Umbel's clients as a Flower ``ClientApp``.

The same app runs at a site and in Flower's own simulation. A site's operator says which client it
is and where its data lie (``--node-config 'client="a" data="/srv/a"'``; without ``data``, where the
reader looks by itself); in a simulation a node is the client at the place of its partition. No
exception leaves this module: Flower would send its text to the server.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from umbel.client.flower.secure_app import register
from umbel.client.machine import describe
from umbel.core import messages
from umbel.core.errors import InputError
from umbel.core.messages import AFTER, MEANS, Answer, Hello, Request, Stages
from umbel.core.run_file import RunFile

if TYPE_CHECKING:  # a greeting is answered without loading torch: each takes a process of its own
    from umbel.client.memory import Memory
    from umbel.client.stages import Parts as StageParts
    from umbel.client.state import ClientStates
    from umbel.client.training import ClientRuntime
    from umbel.core.payloads import Updates
    from umbel.core.trees import Model, Tree
    from umbel.datasets.federated import Arrays, FederatedData, Info
    from umbel.tasks.features import Means

log = logging.getLogger("umbel.client")

app = ClientApp()

Reply: TypeAlias = tuple[Hello | Stages | Answer, bytes]


class Refused(Exception):
    """A request that is answered with a problem.

    Args:
        code: one of ``messages.PROBLEMS``.
        cause: what went wrong; only its class is told.
    """

    def __init__(self, code: str, cause: BaseException) -> None:
        super().__init__(code)
        self.code = code
        self.cause = cause


class Site(NamedTuple):
    """A client, at home with its data."""

    name: str
    place: int
    data: FederatedData

    def train(self) -> Arrays:
        """Its training examples."""
        return self.data.train_part(self.place)

    def test(self) -> Arrays | None:
        """Its own test examples."""
        return self.data.test_part(self.place)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Says who the client is and what it holds."""

    def work(request: Request) -> Reply:
        site = _site(request.run, context)
        with _stage("data"):
            test = site.test()
            info = asdict(site.data.info)
            reply = Hello(
                client=site.name,
                # Under secure aggregation nobody's counts are shown: whether, not how many.
                examples=_shown(request.run, _rows(site.train())),
                test_examples=_shown(request.run, _rows(test)) if test is not None else 0,
                info=json.loads(json.dumps(info)),
                versions={n: _version(n) for n in ("umbel", "flwr", "torch", "numpy")},
                hardware=describe() if context.node_config.get("hardware") else {},
            )
        return reply, b""

    return _answer(message, work)


@app.query("stages")
def stages(message: Message, context: Context) -> Message:
    """Says how much the client has in each stage of a run over experiences."""

    def work(request: Request) -> Reply:
        from umbel.client.stages import sizes

        site = _site(request.run, context, request.client)
        with _stage("task"):
            memory = _memory(site, request)
        with _stage("data"):
            found = {
                question: tuple(_shown(request.run, size) for size in each)
                for question, each in sizes(memory).items()
            }
        return Stages(client=site.name, examples=found), b""

    return _answer(message, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains the model it is sent on the client's examples; answers with the delta."""

    def work(request: Request) -> Reply:
        from umbel.core.payloads import pack

        site, updates = _trained(request, context, message)
        with _stage("training"):
            metrics = {name: float(values[0]) for name, values in updates.metrics.items()}
            reply = messages.answer(site.name, request.round, float(updates.weights[0]), metrics)
            return reply, pack({name: delta[0] for name, delta in updates.delta.items()})

    return _answer(message, work)


def _trained(request: Request, context: Context, message: Message) -> tuple[Site, Updates]:
    """What the client learns in the round."""
    site = _site(request.run, context, request.client)
    simulated = "client" not in context.node_config
    runtime, model, shared = _runtime(site, request, message, seeded=simulated)
    if "client" in context.node_config:  # people's data; in a simulation a node is a place
        _pay(site, runtime, request, context)
    store, kept = _kept(request, context, runtime, site)
    with _stage("training"):
        examples, shared = _examples(site, request, shared)
        learned = runtime.learn(request.round, site.name, examples, model, shared, kept)
    if store is not None:
        from umbel.client.own import is_finite

        with _stage("state"):
            if is_finite(learned.kept):
                store.put(request.round, {site.name: learned.kept})
            store.close()
    return site, learned.updates


def _examples(
    site: Site, request: Request, shared: Mapping[str, Tree]
) -> tuple[Arrays, Mapping[str, Tree]]:
    """What the client trains on, and what the strategy sent besides."""
    if request.stage is None:
        return site.train(), shared
    from umbel.client.stages import besides, examples

    models, _ = besides(shared)
    mine = examples(_memory(site, request), request.stage, models)
    return mine, {n: tree for n, tree in shared.items() if not n.startswith((AFTER, MEANS))}


def _memory(site: Site, request: Request) -> Memory:
    """What the client remembers in a run over experiences."""
    from umbel.client.stages import memory

    assert request.stage is not None
    tables, stage = _tables(request.run), request.stage.model_dump_json()
    parts = _staged(tables, json.dumps(asdict(site.data.info)), stage)
    return memory(request.run, parts.bare, site.data, site.place, site.name, request.stage)


def _personal(
    request: Request, context: Context, runtime: ClientRuntime, site: Site, model: Model
) -> dict[str, float]:
    """How the client's own model does, where it has one."""
    from umbel.client import personal

    test = site.test()
    if test is None or not personal.wanted(runtime):
        return {}
    store, _ = _kept(request, context, runtime, site)
    kept = None if store is None else store.get(request.round + 1, [site.name])[0]
    if store is not None:
        store.close()
    return personal.scores(runtime, request.round, site.name, model, kept, site.train(), test)


def _kept(
    request: Request, context: Context, runtime: ClientRuntime, site: Site
) -> tuple[ClientStates | None, Tree | None]:
    """Where the client keeps what it keeps, and what it has of it before the round."""
    from umbel.client import own

    if not own.keeps(runtime.rule, runtime.task):
        return None, None
    with _stage("state"):
        from umbel.client.flower.kept import states

        store = states(request, context, own.algorithm(request.run, runtime.task))
        if "client" in context.node_config:  # a server of sites commits every round
            store.settle(request.round - 1)
        return store, store.get(request.round, [site.name])[0]


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates the model it is sent on the client's own test part; zero examples where none."""

    def work(request: Request) -> Reply:
        site = _site(request.run, context, request.client)
        site = _dealt(site, request)
        with _stage("data"):
            test = site.test()
        if test is None:
            return messages.answer(site.name, request.round, 0, {}), b""
        seeded = "client" not in context.node_config  # the very runtime that trains
        runtime, model, _ = _runtime(site, request, message, seeded)
        with _stage("evaluation"):
            examples, metrics = runtime.evaluate(test, model)
            metrics |= _personal(request, context, runtime, site, model)
            return messages.answer(site.name, request.round, examples, metrics), b""

    return _answer(message, work)


def _dealt(site: Site, request: Request) -> Site:
    """The client, with its examples as their experiences have them."""
    if request.stage is None:
        return site
    with _stage("data"):
        return site._replace(data=_memory(site, request).stream.data)


def _answer(message: Message, work: Callable[[Request], Reply]) -> Message:
    try:
        with _stage("request"):
            request = messages.read_request(message.content[messages.MANIFEST][messages.MANIFEST])
        reply, document = work(request)
        text = messages.write_reply(reply)
    except Refused as refused:
        text, document = messages.write_reply(messages.problem(refused.code, refused.cause)), b""
    manifest = ConfigRecord({messages.MANIFEST: text})
    tensors = ConfigRecord({messages.MODEL: document})
    content = RecordDict({messages.MANIFEST: manifest, messages.MODEL: tensors})
    return Message(content, reply_to=message)


@contextmanager
def _stage(code: str) -> Iterator[None]:
    """Turns whatever goes wrong into a problem of this code, in full in the local log alone."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:  # whatever it is, its text must not travel
        log.exception("%s", messages.PROBLEMS[code])
        raise Refused(code, error) from error


def _site(run: RunFile, context: Context, asked: str | None = None) -> Site:
    """The client that lives on this node; ``asked`` must be its name."""
    section, owner = run.data, None
    if "client" in context.node_config:  # a site never opens a path that a server names
        _allow(run, str(context.node_config.get("allow", "")))
        path = context.node_config.get("data")
        section = section.model_copy(update={"path": None if path is None else str(path)})
        owner = None if path is None else str(context.node_config["client"])
    with _stage("data"):
        data = _load(section.model_dump_json(), run.run.seed, owner)
    with _stage("client"):
        site = _find(data, context)
        if asked is not None and asked != site.name:
            raise InputError(f"asked for '{asked}'", where=f"client '{site.name}'")
    return site


def _allow(run: RunFile, allowed: str) -> None:
    """Refuses parts that are not Umbel's own, unless the site's operator named them.

    A name such as ``subprocess:run`` would otherwise be code that the server chooses.
    """
    with _stage("policy"):
        for name in [*run.own_parts(), *run.files()]:
            if name not in allowed.split():
                raise InputError(
                    f"'{name}' is not a part of Umbel, and the site does not allow it",
                    where="server's message",
                    fix=f"--node-config 'allow=\"{name}\"' where you trust it",
                )


def _find(data: FederatedData, context: Context) -> Site:
    name = context.node_config.get("client")
    if name is None:
        place = context.node_config.get("partition-id")
        if not isinstance(place, int) or not 0 <= place < len(data.names):
            raise InputError(
                f"partition-id = {place!r}, and the data have {len(data.names)} clients",
                where="node config",
                fix="start the node with --node-config 'client=\"NAME\"'",
            )
        return Site(data.names[place], place, data)
    name = str(name)
    if name in data.names:
        return Site(name, data.names.index(name), data)
    if len(data.names) == 1:  # the site's files hold nobody else's examples, by whatever name
        return Site(name, 0, data)
    raise InputError(
        f"client = {name!r} is none of the {len(data.names)} clients of the data",
        where="node config",
        fix=f"the first is '{data.names[0]}'",
    )


def _pay(site: Site, runtime: ClientRuntime, request: Request, context: Context) -> None:
    """Writes a private round into the site's own ledger, which refuses what its budget does not
    cover, before anything is learnt."""
    from umbel.client import site_ledger
    from umbel.client.private_model import check_model
    from umbel.tasks.evaluate import tensor_of

    if not site_ledger.needed(request.run):
        return
    with _stage("budget"):
        examples = site.train()
        batch = {name: tensor_of(column[:2]) for name, column in examples.items()}
        check_model(request.run, runtime.task, runtime.module().cpu(), batch)
        mine = site_ledger.account(site.name, context.node_config)
        job = str(context.node_config.get("job", context.run_id))
        site_ledger.debit(mine, request.run, job, request.round, _rows(examples))


def _runtime(
    site: Site, request: Request, message: Message, seeded: bool = False
) -> tuple[ClientRuntime, Model, Mapping[str, Tree]]:
    """What trains and evaluates, the model that the server sent, and what it sent besides."""
    from umbel.core.payloads import unpack
    from umbel.core.trees import Model, unflatten

    with _stage("task"):
        tables, info = _tables(request.run), json.dumps(asdict(site.data.info))
        stage = "" if request.stage is None else request.stage.model_dump_json()
        runtime, own, shared, base = _build(tables, info, seeded, stage)
    with _stage("model"):
        if request.base != base:
            raise InputError(
                "what is frozen differs from the server's",
                where="server's message",
                fix="do both sides read the same files of [task] init_from and model.path?",
            )
        document = message.content[messages.MODEL][messages.MODEL]
        if not isinstance(document, bytes):
            raise InputError("no tensors", where="server's message")
        sent, _ = unpack(document, "server's message")
        more = {name: sent[name] for name in sent if name.startswith((AFTER, MEANS))}
        asked = any("/" in name for name in sent.keys() - more.keys())
        besides = shared if asked else {}  # not for an evaluation
        for name, tensor in {**own.tensors(), **besides}.items():
            if sent[name].shape != tensor.shape or sent[name].dtype != tensor.dtype:
                raise InputError(f"'{name}' differs from the task's", where="server's message")
        params = {name: sent[name] for name in own.params}
        extra = unflatten({**{name: sent[name] for name in besides}, **more})
        if f"{MEANS}/known" in more:
            runtime = _by_means(tables, info, seeded, stage, extra)
        return runtime, Model(params, {name: sent[name] for name in own.buffers}), extra


# A process that lives for more than one message, as in a simulation, reads and builds once.


@functools.lru_cache(maxsize=1)
def _load(section: str, seed: int, owner: str | None = None) -> FederatedData:
    from umbel.core.run_file import Data
    from umbel.datasets.build import load

    return load(Data.model_validate_json(section), seed, owner)


@functools.lru_cache(maxsize=1)
def _build(
    tables: str, info: str, seeded: bool, stage: str
) -> tuple[ClientRuntime, Model, Tree, str | None]:
    """The runtime, the initial model and what is sent besides, and the hash of what is frozen."""
    from umbel.client.training import ClientRuntime
    from umbel.core import run_file
    from umbel.core.trees import flatten
    from umbel.privacy.sources import seeded_sources
    from umbel.strategies.build import build_strategy
    from umbel.tasks.begin import base_hash
    from umbel.tasks.build import build_task, initial_module, model_of

    run = run_file.resolve(json.loads(tables))
    if stage:
        task, strategy, _ = _staged(tables, info, stage)
    else:
        task, strategy = build_task(run.task, _info(info)), build_strategy(run.strategy)
    sources = seeded_sources(run.run.seed) if seeded else None  # at a site never
    module = initial_module(task, run.run.seed)
    own = strategy.travelling(model_of(module))
    shared: Tree = {}
    if strategy.broadcast is not None:
        shared = flatten(strategy.broadcast(own.params, strategy.init(own.params)))
    return ClientRuntime(run, task, strategy.client, sources), own, shared, base_hash(module)


@functools.lru_cache(maxsize=1)
def _staged(tables: str, info: str, stage: str, means: Means | None = None) -> StageParts:
    """What the client does in a stage."""
    from umbel.client.stages import parts
    from umbel.core import run_file
    from umbel.tasks.build import build_task

    run, about = run_file.resolve(json.loads(tables)), _info(info)
    told = messages.Stage.model_validate_json(stage)
    return parts(run, build_task(run.task, about), about, told, means)


def _by_means(
    tables: str, info: str, seeded: bool, stage: str, shared: Mapping[str, Tree]
) -> ClientRuntime:
    """The runtime whose model tells classes by the means that were sent."""
    from umbel.client.stages import besides
    from umbel.client.training import ClientRuntime
    from umbel.core import run_file
    from umbel.privacy.sources import seeded_sources

    run = run_file.resolve(json.loads(tables))
    task, strategy, _ = _staged.__wrapped__(tables, info, stage, besides(shared)[1])
    sources = seeded_sources(run.run.seed) if seeded else None
    return ClientRuntime(run, task, strategy.client, sources)


def _info(text: str) -> Info:
    from umbel.datasets.federated import Info

    fields = json.loads(text)
    return Info(**{**fields, "input_shape": tuple(fields["input_shape"])})


def _tables(run: RunFile) -> str:
    return json.dumps(messages.write_run(run), sort_keys=True)


def _shown(run: RunFile, count: int) -> int:
    return min(count, 1) if run.secure_aggregation.enabled else count


def _rows(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


class _Parts:
    """What the stages of secure aggregation have from here."""

    answer = staticmethod(_answer)
    stage = staticmethod(_stage)

    def trained(
        self, request: Request, context: Context, message: Message
    ) -> tuple[Updates, frozenset[str]]:
        """What the client learns in the round, and which of its tensors are buffers."""
        site, updates = _trained(request, context, message)
        model = _runtime(site, request, message, "client" not in context.node_config)[1]
        return updates, frozenset(model.buffers)

    def tested(
        self, request: Request, context: Context, message: Message
    ) -> tuple[int, dict[str, float]]:
        """How many test examples the client has, and the model's figures on them."""
        site = _dealt(_site(request.run, context, request.client), request)
        with _stage("data"):
            test = site.test()
        if test is None:
            return 0, {}
        found = _runtime(site, request, message, "client" not in context.node_config)
        with _stage("evaluation"):
            return found[0].evaluate(test, found[1])

    def names(self, run: RunFile, context: Context) -> list[str]:
        """The clients of a simulation."""
        return list(_load(run.data.model_dump_json(), run.run.seed).names)


register(app, _Parts())
