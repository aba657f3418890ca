"""Computes the groups of a round in Ray actors: the same sums, in the same order, anywhere."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from umbel.client import own
from umbel.core.errors import InputError, RunError, UmbelError
from umbel.core.payloads import TrainPlan
from umbel.datasets.federated import FederatedData
from umbel.simulations.dispatch import Dispatch
from umbel.simulations.groups import Group
from umbel.simulations.parcels import Parcel, pack, unpack
from umbel.simulations.ray_cluster import Cluster, Kind, free, total
from umbel.simulations.ray_worker import Greeting, Subject, Worker, greeting

WHERE = "--engine ray"

LOSSES = 3
"""A group that was lost with this many workers is not tried again."""

FALSE_STARTS = 5
"""So many workers in a row may be lost before they are ready."""

PATIENCE = 30.0
"""Seconds without any news of any worker, after which one looks whether the cluster has a CPU, or
a GPU."""


@dataclass(eq=False)
class _Actor:
    """A worker, what it said of itself, and whether it has ever said anything."""

    handle: Any
    greeting: Greeting | None = None


class RayDispatch:
    """A :class:`Dispatcher` whose workers are Ray actors of one thread and one CPU or GPU each.

    Data and task go to the cluster once, the global model once a round, and one folded sum a group
    comes back. A worker holds nothing that is missed: where one is lost, or its node, its group is
    computed elsewhere, to the same bits on the same kind of CPU.

    Args:
        cluster: closed with this.
        local: computes cohorts of so few clients that each takes all cores, in this process.
        plan: the engine's plan as text, once the first round has found one.
        subject: what workers are told.
        data: who holds what; test examples stay here.
        kind: what each worker has to itself.
        most: workers, at most; ``None``: one for each of those that the cluster has free, now or
            later.
        early: how many to start at once, while this process looks for a plan.
        announce: told what a user should know.

    Raises:
        InputError: the user's own parts cannot be sent.
        RunError: the cluster has no such processor.
    """

    def __init__(
        self,
        cluster: Cluster,
        local: Dispatch,
        plan: Callable[[], str],
        subject: Subject,
        data: FederatedData,
        kind: Kind,
        most: int | None,
        early: int,
        announce: Callable[[str], None],
    ) -> None:
        self._cluster, self._local, self._plan, self._announce = cluster, local, plan, announce
        self._here = greeting(subject.run)
        self._keeps = own.keeps(subject.rule, subject.task)
        self._said: set[str] = set()
        self._number = 0
        self._false_starts = 0
        self._asked: dict[Any, _Actor] = {}
        self._idle: list[_Actor] = []
        self._busy: dict[Any, tuple[_Actor, int, int]] = {}
        self._kind: Kind = kind
        gpus = int(kind == "GPU")
        self._remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Worker)
        self._most, self._grows = most or 1, most is None
        self._need_one()
        self._told = [ray.put(_pickled(subject)), ray.put(data)]
        self._folders = _folders()
        self._grow()
        self._staff(early)

    def threads(self, clients: int) -> AbstractContextManager[None]:
        """As in one process: where clients are trained, shall not matter."""
        return self._local.threads(clients)

    def pids(self) -> list[int]:
        """The process ids of the workers that are ready, each on its node."""
        actors = [*self._idle, *(actor for actor, _, _ in self._busy.values())]
        return [actor.greeting.pid for actor in actors if actor.greeting is not None]

    def run(self, plan: TrainPlan, groups: Sequence[Group]) -> Iterator[Any]:
        """The results of the groups, in their order.

        Raises:
            RunError: workers are lost again and again, or no processor is left.
            InputError: a worker cannot load the run's parts, or has another version of Umbel.
            Exception: what a worker raised, with its traceback as a note.
        """
        clients = sum(len(chunk) for group in groups for chunk in group.chunks)
        if self._local.wide(clients):
            yield from self._local.run(plan, groups)
            return
        # Until the last result was used: threads of a sum, spinning, would take workers' cores.
        with self.threads(clients):
            yield from self._run(plan, groups)

    def _run(self, plan: TrainPlan, groups: Sequence[Group]) -> Iterator[Any]:
        self._number += 1
        self._grow()
        # A group's plan names its own clients, so no worker needs the others.
        shared = ray.put(pack((self._plan(), plan.part(plan.clients[:1]))))
        waiting, lost = set(range(len(groups))), Counter[int]()
        done: dict[int, Parcel] = {}
        for wanted in range(len(groups)):
            while wanted not in done:
                self._staff(len(groups))
                self._hand_out(shared, groups, waiting, wanted)
                self._listen(waiting, done, lost)
            yield unpack(done.pop(wanted))

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started for them."""
        for actor in [*self._asked.values(), *self._idle, *(a for a, _, _ in self._busy.values())]:
            ray.kill(actor.handle)
        self._asked, self._idle, self._busy, self._told = {}, [], {}, []
        self._cluster.close()

    def _grow(self) -> None:
        """Takes note of processors that became free, or came with a node."""
        # What a worker that is still starting will take may count as free.
        if self._grows and not self._asked:
            there = len(self._idle) + len(self._busy)
            self._most = max(self._most, there + free(self._kind))

    def _staff(self, groups: int) -> None:
        """Starts workers until there is one for each group, or as many as there may be."""
        there = len(self._asked) + len(self._idle) + len(self._busy)
        for _ in range(min(self._most, groups) - there):
            actor = _Actor(self._remote.remote())
            self._asked[actor.handle.ready.remote(self._folders, self._told)] = actor

    def _hand_out(
        self, shared: Any, groups: Sequence[Group], waiting: set[int], wanted: int
    ) -> None:
        """Gives each idle worker the most costly group whose result may wait for its turn."""
        # Twice as many results as workers, at most, wait for an earlier one.
        near = wanted + 2 * (len(self._idle) + len(self._busy))
        while self._idle and (open_ := [t for t in waiting if t < near]):
            task = max(open_, key=lambda t: (groups[t].cost, -t))
            actor = self._idle.pop()
            answer = actor.handle.compute.remote(self._number, [shared], groups[task].chunks)
            self._busy[answer] = (actor, self._number, task)
            waiting.discard(task)

    def _listen(self, waiting: set[int], done: dict[int, Parcel], lost: Counter[int]) -> None:
        """Waits for news of any worker, and takes it in."""
        news, _ = ray.wait([*self._busy, *self._asked], num_returns=1, timeout=PATIENCE)
        if not news and not self._busy:
            self._need_one()
            self._say(f"waiting for a {self._kind} of the Ray cluster")
        for answer in news:
            if answer in self._asked:
                self._welcome(answer)
                continue
            actor, number, task = self._busy.pop(answer)
            try:
                found = ray.get(answer)
            except RayTaskError as error:
                self._idle.append(actor)
                if number == self._number:  # else of a round that was given up
                    raise _cause(error) from None
            except RayError as error:
                self._lose(error)
                if number == self._number:
                    waiting.add(task)
                    lost[task] += 1
                    if lost[task] == LOSSES:
                        raise _dying(error) from error
            else:
                self._idle.append(actor)
                if number == self._number:
                    done[task] = found

    def _welcome(self, answer: Any) -> None:
        """A worker is ready, or never will be."""
        actor = self._asked.pop(answer)
        try:
            said: Greeting = ray.get(answer)
        except RayTaskError as error:
            raise _cause(error) from None
        except RayError as error:
            if actor.greeting is not None:
                return  # it was lost with one that was announced
            if "failed to import" in str(error):  # so Ray says where the actor's class is missing
                raise InputError(
                    f"a Ray worker cannot import umbel: {str(error).strip().splitlines()[-1]}",
                    where=WHERE,
                    fix=f"install umbel {self._here.versions['umbel']} on every node",
                ) from None
            self._false_starts += 1
            if self._false_starts == FALSE_STARTS:
                raise _dying(error) from error
            return
        self._false_starts = 0
        if actor.greeting is None:
            self._compare(said)
        actor.greeting = said
        self._idle.append(actor)

    def _lose(self, error: RayError) -> None:
        self._say(f"a Ray worker was lost ({_brief(error)}); its work is redone elsewhere")
        # Its node may have taken others along: who is idle has to say that it is there.
        for actor in self._idle:
            self._asked[actor.handle.hello.remote()] = actor
        self._idle = []

    def _compare(self, there: Greeting) -> None:
        """Refuses a worker of another Umbel; says what else may round otherwise."""
        here = self._here
        mine, theirs = here.versions, there.versions
        if theirs["umbel"] != mine["umbel"]:
            raise InputError(
                f"node {there.host} has umbel {theirs['umbel']}, this process {mine['umbel']}",
                where=WHERE,
                fix="install the same version on every node",
            )
        if self._keeps and there.host != here.host:
            raise InputError(
                f"clients keep tensors, in a file on {here.host}, and a worker is on {there.host}",
                where=WHERE,
                fix="use the workers of this machine alone (ray_address unset), or a strategy "
                "and a task without client state",
            )
        others = [(n, theirs[n], mine[n]) for n in ("torch", "numpy") if theirs[n] != mine[n]]
        others += (
            [(self._kind, there.processor, here.processor)]
            if there.processor != here.processor
            else []
        )
        for what, other, mine_is in others:
            self._say(
                f"{what} is {other} on node {there.host} and {mine_is} here: the last bits of the "
                "result depend on where clients are trained"
            )

    def _need_one(self) -> None:
        if not total(self._kind):
            raise RunError(
                f"no node of the Ray cluster has a {self._kind}",
                where=WHERE,
                fix="add a node with `ray start --address=…`; a run that had begun can be resumed",
            )

    def _say(self, message: str) -> None:
        if message.partition("(")[0] not in self._said:
            self._said.add(message.partition("(")[0])
            self._announce(message)


def _folders() -> list[str]:
    """Where this process imports from, besides the installation: a user's own parts."""
    fixed = [Path(os.__file__).parent, Path(sys.prefix), Path(sys.base_prefix)]
    found = [Path(folder).absolute() for folder in sys.path]
    return [str(f) for f in found if not any(f.is_relative_to(root) for root in fixed)]


def _pickled(subject: Subject) -> bytes:
    try:
        document: bytes = ray.cloudpickle.dumps(subject)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever a user's object does not like about being pickled
        raise InputError(
            f"the run's parts cannot be sent to Ray's workers: {error}",
            where=WHERE,
            fix="keep files, locks and connections out of tasks and models",
        ) from error
    return document


def _cause(error: RayTaskError) -> Exception:
    """What the worker raised; a user's error stays one."""
    cause = error.cause
    if not isinstance(cause, Exception):
        return RuntimeError(str(error))
    if not isinstance(cause, UmbelError):
        cause.add_note(f"in a Ray worker:\n{error.traceback_str}")
    return cause


def _dying(error: RayError) -> RunError:
    return RunError(
        f"Ray workers are lost again and again: {_brief(error)}",
        where=WHERE,
        fix="Ray's logs say why; where memory ran out, set [run] processes or [client] batch_size "
        "lower",
    )


def _brief(error: RayError) -> str:
    """The first line of Ray's many."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
