"""Picks the kernel: every one that can train the model trains a few clients, the fastest wins."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from umbel.core.errors import InputError, UmbelError
from umbel.core.trees import Tree, norm
from umbel.simulations import plan_cache, private_trial, trial
from umbel.simulations.kernels.build import KERNELS
from umbel.simulations.kernels.kernel import Chunk, Kernel, Obstacle, Subject
from umbel.simulations.kernels.private import Private
from umbel.simulations.plan import WHERE, Choice, EnginePlan
from umbel.simulations.residents import reason

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

LONG = 1200.0
"""Seconds of one core that a run on a CPU takes, from which on compiled steps are tried as well: to
compile one costs ten to a hundred and forty, and most gain nothing."""

AGREEMENT = 1e-2
"""Relative difference of what two kernels train, beyond which they do not compute the same."""

SHORT = 1000
"""Clients' first steps in a run, below which a model that only one kernel takes is not timed."""

TOGETHER = 8
"""Clients of a chunk where they are trained one after another anyway: what a failure repeats."""


def choose(
    subject: Subject,
    examination: trial.Examination,
    sample: Sample,
    most: int,
    pinned: EnginePlan | None,
    work: float = 0.0,
) -> tuple[Choice, AnyKernel]:
    """The plan for a model, from a pin, from an earlier run, or from a trial.

    However it was found, the kernel's gradients are compared with the plain ones.

    Args:
        subject: what is trained.
        examination: of the model.
        sample: gives chunks.
        most: the most clients that a chunk can have, by cohort and memory.
        pinned: no other is considered.
        work: how often some client takes :data:`STEPS` steps in the run.

    Raises:
        InputError: the pinned plan cannot train this model.
        Obstacle: not even the lean kernel can.
    """
    if pinned is not None:
        try:
            kernel = _make(pinned, subject, examination, sample, most)
            return Choice(pinned, "pinned", {}, {}), kernel
        except Obstacle as why:
            raise InputError(
                f"the plan '{pinned}' cannot train this model: {why}",
                where=WHERE,
                fix="leave the plan out, and one is chosen",
            ) from None
    key = plan_cache.key(subject, examination.given, most, work)
    if (known := _recall(key)) is not None:
        try:
            return known, _make(known.plan, subject, examination, sample, most)
        except Obstacle:
            pass  # the same text, another model: its code has changed
    if subject.runtime.private is None:
        choice, kernel = _compare(subject, examination, sample, most, work)
    else:
        choice, kernel = _compare_private(subject, examination, sample, most)
    if choice.source == "trial":
        plan_cache.remember(key, choice.record())
    return choice, kernel


def _make(
    plan: EnginePlan,
    subject: Subject,
    examination: trial.Examination,
    sample: Sample,
    most: int,
) -> AnyKernel:
    if subject.runtime.private is None:
        plain = trial.make(plan.kernel, subject, examination)
        return _compile(plan.kernel, plain, subject, sample, most) if plan.compiled else plain
    if plan.compiled:
        raise Obstacle("its gradients are of single examples, and these are not compiled")
    return _make_private(plan.kernel, subject, examination)


def _compile(name: str, plain: Kernel, subject: Subject, sample: Sample, most: int) -> Kernel:
    """The same kernel with its steps compiled, if it trains some clients as it does without.

    Raises:
        Obstacle: it does not, or cannot be compiled.
    """
    anchor = _anchor(subject)
    lr = subject.runtime.run.client.lr
    try:
        work = sample(min(2, most), STEPS)
        work = _evened(work) if plain.even else work
        truth = plain.train(anchor, work, lr).tensors
    except UmbelError:
        raise
    except Exception as error:  # a client's data, which that client will answer for
        raise Obstacle(f"no compiled step can be tried on its data: {reason(error)}") from error
    try:
        kernel = KERNELS[name](subject._replace(compiled=True))
        found = kernel.train(anchor, work, lr).tensors
    except (UmbelError, Obstacle):
        raise
    except Exception as error:  # whatever torch.compile does not like, or no compiler is here
        inner = getattr(error, "inner_exception", error)  # of torch.compile's own
        raise Obstacle(f"a step cannot be compiled: {reason(inner)}") from error
    moved = norm({n: truth[n] - p for n, p in anchor.items()})
    apart = norm({n: found[n] - truth[n] for n in anchor})
    if not apart <= AGREEMENT * moved:
        raise Obstacle("compiled, a step leads elsewhere")
    return kernel


def _anchor(subject: Subject) -> Tree:
    return {n: p.detach() for n, p in subject.module.named_parameters() if p.requires_grad}


def _compare(
    subject: Subject, examination: trial.Examination, sample: Sample, most: int, work: float
) -> tuple[Choice, AnyKernel]:
    refused: dict[str, str] = {}
    made: dict[str, Kernel] = {}
    on_gpu = subject.runtime.device.type == "cuda"
    for name in KERNELS:
        if name == "vmap" and made:
            continue  # its first call loads two seconds of compiler, and it was never the faster
        if name == "unfolded" and not on_gpu:
            continue  # on a CPU, what it unfolds leaves the cache
        try:
            made[name] = trial.make(name, subject, examination)
        except Obstacle as why:
            refused[name] = str(why)
    if not made:
        raise Obstacle(refused["lean"])
    anchor = _anchor(subject)
    lr = subject.runtime.run.client.lr
    lean = EnginePlan("lean", TOGETHER)
    compile_ = on_gpu or subject.runtime.run.client.compile
    if list(made) == ["lean"] and not compile_ and work < SHORT:
        return Choice(lean, "trial", {}, refused), made["lean"]
    compiled: dict[str, Kernel] = {}

    def measure(plan: EnginePlan, clients: int, best: float) -> float:
        kernel = (compiled if plan.compiled else made)[plan.kernel]
        some = sample(clients, STEPS)
        return _seconds(kernel, anchor, _evened(some) if kernel.even else some, lr, best)

    others = [name for name in made if name != "lean"]
    try:
        seconds = {lean: measure(lean, 1, float("inf"))}
        start = max(2, min(FIRST, int(SECONDS / seconds[lean])))
        for name in others:
            seconds |= _climb(EnginePlan(name), min(start, most), most, measure)
        fastest = _fastest(seconds)
        if compile_ or seconds[fastest] * work > LONG:
            for name in dict.fromkeys((fastest.kernel, "vmap")):
                try:
                    plain = made[name] if name in made else trial.make(name, subject, examination)
                    compiled[name] = _compile(name, plain, subject, sample, most)
                except Obstacle as why:
                    refused[f"{name}:compile"] = str(why)
                    continue
                plan = EnginePlan(name, compiled=True)
                if name == "lean":
                    seconds[lean._replace(compiled=True)] = measure(plan, 1, float("inf"))
                else:
                    seconds |= _climb(plan, min(start, most), most, measure)
            fastest = _fastest(seconds)
    except UmbelError:
        raise
    except Exception:  # a client's data, which that client will answer for; times say nothing
        if not others:
            return Choice(lean, "default", {}, refused), made["lean"]
        usual = EnginePlan(others[0], min(FIRST, most) if others[0] == "grouped" else None)
        return Choice(usual, "default", {}, refused), made[usual.kernel]
    figures = {str(plan): value for plan, value in seconds.items()}
    kernel = (compiled if fastest.compiled else made)[fastest.kernel]
    return Choice(fastest, "trial", figures, refused), kernel


def _fastest(seconds: dict[EnginePlan, float]) -> EnginePlan:
    """A cohort in one piece, wherever that costs nothing that a trial could tell."""
    return min(seconds, key=lambda plan: seconds[plan] * (0.9 if plan.chunk is None else 1))


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
        anchor = _anchor(subject)

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
            seconds |= _climb(EnginePlan(name), min(FIRST, most), most, measure)
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
    of: EnginePlan, start: int, most: int, measure: Callable[[EnginePlan, int, float], float]
) -> dict[EnginePlan, float]:
    """Times chunks of a kernel, each twice as large, while that pays and there is room.

    What is beyond half of ``most`` is all of it: after 80 of 100 clients comes a chunk of 20, which
    costs nearly as much again.
    """
    found: dict[EnginePlan, float] = {}
    clients, best = start, float("inf")
    while True:
        plan = of._replace(chunk=clients if clients < most else None)
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
