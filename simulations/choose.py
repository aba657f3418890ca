"""Picks the kernel: every one that can train the model trains a few clients, the fastest wins."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from umbel.core.errors import InputError, UmbelError
from umbel.core.trees import Tree
from umbel.simulations import plan_cache, private_trial, trial
from umbel.simulations.kernels.build import KERNELS
from umbel.simulations.kernels.kernel import Chunk, Kernel, Obstacle, Subject
from umbel.simulations.kernels.private import Private
from umbel.simulations.plan import WHERE, Choice, EnginePlan

AnyKernel: TypeAlias = Kernel | Private

Sample: TypeAlias = Callable[[int, int], Any]
"""(clients, steps) -> a chunk of so many with their first batches of round 1, private or not."""

STEPS = 2
"""Steps that a client takes in the trial."""

FIRST = 5
"""Clients of the smallest chunk that is tried; from there it doubles while that pays."""

SECONDS = 0.2
"""About how long one repetition of a candidate may take: no larger chunk is tried beyond."""

CHUNK = 5e-4
"""Seconds that the engine itself spends on a chunk: its batches, its sums."""

GAIN = 0.95
"""A larger chunk must take this share of the time for one client, or less."""

TOGETHER = 8
"""Clients of a chunk where they are trained one after another anyway: what a failure repeats."""


def choose(
    subject: Subject,
    examination: trial.Examination,
    sample: Sample,
    most: int,
    pinned: EnginePlan | None,
) -> tuple[Choice, AnyKernel]:
    """The plan for a model, from a pin, from an earlier run, or from a trial.

    However it was found, the kernel's gradients are compared with the plain ones.

    Args:
        subject: what is trained.
        examination: of the model.
        sample: gives chunks.
        most: the most clients that a chunk can have, by cohort and memory.
        pinned: no other is considered.

    Raises:
        InputError: the pinned plan cannot train this model.
        Obstacle: not even the lean kernel can.
    """
    make = trial.make if subject.runtime.private is None else _make_private
    if pinned is not None:
        try:
            return Choice(pinned, "pinned", {}, {}), make(pinned.kernel, subject, examination)
        except Obstacle as why:
            raise InputError(
                f"the plan '{pinned}' cannot train this model: {why}",
                where=WHERE,
                fix="leave the plan out, and one is chosen",
            ) from None
    key = plan_cache.key(subject, examination.given, most)
    if (known := _recall(key)) is not None:
        try:
            return known, make(known.plan.kernel, subject, examination)
        except Obstacle:
            pass  # the same text, another model: its code has changed
    compare = _compare if subject.runtime.private is None else _compare_private
    choice, kernel = compare(subject, examination, sample, most)
    if choice.source == "trial":
        plan_cache.remember(key, choice.record())
    return choice, kernel


def _compare(
    subject: Subject, examination: trial.Examination, sample: Sample, most: int
) -> tuple[Choice, AnyKernel]:
    refused: dict[str, str] = {}
    made: dict[str, Kernel] = {}
    for name in KERNELS:
        if name == "vmap" and made:
            continue  # its first call loads two seconds of compiler, and it was never the faster
        try:
            made[name] = trial.make(name, subject, examination)
        except Obstacle as why:
            refused[name] = str(why)
    if not made:
        raise Obstacle(refused["lean"])
    anchor = {n: p.detach() for n, p in subject.module.named_parameters() if p.requires_grad}
    lr = subject.runtime.run.client.lr
    lean = EnginePlan("lean", TOGETHER)
    if list(made) == ["lean"]:
        return Choice(lean, "trial", {}, refused), made["lean"]

    def measure(plan: EnginePlan, clients: int, best: float) -> float:
        kernel, work = made[plan.kernel], sample(clients, STEPS)
        return _seconds(kernel, anchor, _evened(work) if kernel.even else work, lr, best)

    others = [name for name in made if name != "lean"]
    try:
        seconds = {lean: measure(lean, 1, float("inf"))}
        start = max(2, min(FIRST, int(SECONDS / seconds[lean])))
        for name in others:
            seconds |= _climb(name, min(start, most), most, measure)
    except UmbelError:
        raise
    except Exception:  # a client's data, which that client will answer for; times say nothing
        usual = EnginePlan(others[0], min(FIRST, most) if others[0] == "grouped" else None)
        return Choice(usual, "default", {}, refused), made[usual.kernel]
    # A cohort in one piece, wherever that costs nothing that a trial could tell.
    whole = [EnginePlan(name) for name in others if EnginePlan(name) in seconds]
    fastest = min(seconds, key=lambda plan: seconds[plan] * (0.9 if plan in whole else 1))
    figures = {str(plan): value for plan, value in seconds.items()}
    return Choice(fastest, "trial", figures, refused), made[fastest.kernel]


def _make_private(name: str, subject: Subject, examination: trial.Examination) -> AnyKernel:
    """A private kernel; ``lean`` stands for the runtime itself, one client after another."""
    if name == "lean":
        return trial.make(name, subject, examination)
    if subject.runtime.task.collect is not None:
        raise Obstacle("its examples are made anew each round")
    return private_trial.make(name, subject, examination)


def _compare_private(
    subject: Subject, examination: trial.Examination, sample: Sample, most: int
) -> tuple[Choice, AnyKernel]:
    refused: dict[str, str] = {}
    for name in private_trial.KERNELS:
        try:
            kernel = _make_private(name, subject, examination)
        except Obstacle as why:
            refused[name] = str(why)
            continue
        anchor = {n: p.detach() for n, p in subject.module.named_parameters() if p.requires_grad}

        def measure(
            plan: EnginePlan,
            clients: int,
            best: float,
            kernel: AnyKernel = kernel,
            anchor: Tree = anchor,
        ) -> float:
            lr = subject.runtime.run.client.lr
            return _seconds(kernel, anchor, sample(clients, STEPS), lr, best)

        try:
            # One client at a time is what is best where two already leave the cache.
            seconds = {EnginePlan(name, 1): measure(EnginePlan(name, 1), 1, float("inf"))}
            seconds |= _climb(name, min(FIRST, most), most, measure)
        except UmbelError:
            raise
        except Exception:  # a client's data, which that client will answer for
            usual = EnginePlan(name, min(FIRST, most))
            return Choice(usual, "default", {}, refused), kernel
        fastest = min(seconds, key=lambda plan: seconds[plan])
        figures = {str(plan): value for plan, value in seconds.items()}
        return Choice(fastest, "trial", figures, refused), kernel
    lean = EnginePlan("lean", TOGETHER)
    return Choice(lean, "trial", {}, refused), trial.make("lean", subject, examination)


def _climb(
    name: str, start: int, most: int, measure: Callable[[EnginePlan, int, float], float]
) -> dict[EnginePlan, float]:
    """Times chunks of a kernel, each twice as large, while that pays and there is room.

    What is beyond half of ``most`` is all of it: after 80 of 100 clients comes a chunk of 20, which
    costs nearly as much again.
    """
    found: dict[EnginePlan, float] = {}
    clients, best = start, float("inf")
    while True:
        plan = EnginePlan(name, clients if clients < most else None)
        found[plan] = measure(plan, clients, best) + CHUNK / clients
        if found[plan] > GAIN * best or clients == most or found[plan] * clients > SECONDS:
            return found
        best = found[plan]
        clients = 2 * clients if 4 * clients <= most else most


def _evened(work: Chunk) -> Chunk:
    """The same, as if padding were examples: the largest clients may differ in size."""
    widths = torch.tensor(work.widths, device=work.counts.device)[:, None]
    counts = torch.where(work.counts > 0, widths, 0)
    return work._replace(counts=counts, full=[True] * len(work.full))


def _seconds(kernel: AnyKernel, anchor: Tree, work: Any, lr: float, best: float) -> float:
    """The least time for one client; one run alone if it is far behind ``best``."""
    found = []
    for repetition in range(4):
        start = time.perf_counter()
        trained = kernel.train(anchor, work, lr)
        next(iter(trained.tensors.values())).sum().item()  # waits for a GPU to finish
        found.append((time.perf_counter() - start) / work.clients())
        # The first run sets torch up, so that only much more than the best tells something.
        if repetition == 1 and min(found) > 2 * best:
            break
    return float(min(found))


def _recall(key: str) -> Choice | None:
    found: dict[str, Any] | None = plan_cache.recall(key)
    try:
        if found is None:
            return None
        plan = EnginePlan.parse(found["plan"])
        return Choice(plan, "cache", dict(found["seconds_per_client"]), dict(found["refused"]))
    except (InputError, KeyError, TypeError, ValueError):
        return None  # written by another version, or by hand
