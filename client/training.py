"""Local training of one client, the plain way: what every faster engine must agree with."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from umbel.client import batches, compiling, devices, optimizers, own
from umbel.client.local_privacy import release
from umbel.client.passes import objective
from umbel.client.private import PrivateSteps
from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, Tree, flatten, map_tree
from umbel.datasets.federated import Arrays, rows
from umbel.privacy.sources import Sources, system_sources
from umbel.strategies.parts import ClientRule, Local, Trees
from umbel.strategies.parts.rule import NONE, clip_gradient
from umbel.strategies.parts.strategy import private_names
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.collect import collected
from umbel.tasks.evaluate import add_sums, evaluate, per_example, tensor_of
from umbel.tasks.task import Batch, Task


class Learned(NamedTuple):
    """What a client's round leaves.

    Args:
        updates: what travels.
        kept: what the client keeps, ``letter/name`` -> tensor on the CPU; never sent.
    """

    updates: Updates
    kept: dict[str, Tensor]


class ClientRuntime:
    """Trains and evaluates one client after another on this machine's device.

    Clients share nothing: each trains a fresh copy of the task's module. Parameters that do not
    require gradients stay as the run's seed initialised them.

    Args:
        run: the run file.
        task: what is learned.
        rule: what clients do besides.
        sources: of the randomness that protects people; ``None``: the operating system.

    Raises:
        InputError: the device, precision or a compiler is not here, the model has nothing to
            train, it cannot be trained privately where ``[privacy]`` asks for that, or the strategy
            does not go with the optimizer.
    """

    def __init__(
        self, run: RunFile, task: Task, rule: ClientRule, sources: Sources | None = None
    ) -> None:
        self.run = run
        self.task = task
        self.rule = with_clipping(rule, run.client.max_grad_norm)
        self.device = devices.choose(run.client)
        self._module = initial_module(task, run.run.seed).to(self.device)
        if not model_of(self._module).params:
            raise InputError(
                "the model has no parameter that requires a gradient",
                where="[task]",
                fix="unfreeze what shall be trained",
            )
        whole = model_of(self._module)
        self.at_home = private_names(rule, whole)
        _check(run, rule, whole, self.at_home)
        if run.client.compile:
            compiling.check(run, self.device)
        self.sources = sources or system_sources()
        self.private: PrivateSteps | None = None
        if run.privacy.unit == "example":
            self.private = PrivateSteps(run, task, self.rule, self.module(), self.sources)

    def module(self, model: Model | None = None) -> nn.Module:
        """A fresh module in training mode that holds ``model``, or the run's initial model.

        Raises:
            InputError: as :func:`load`.
        """
        module = copy.deepcopy(self._module).train()
        if model is not None:
            load(module, model, self.at_home)
        return module

    def train(self, round_number: int, client: str, examples: Arrays, model: Model) -> Updates:
        """:meth:`learn` for a client that has just begun: its updates alone."""
        return self.learn(round_number, client, examples, model).updates

    def learn(
        self,
        round_number: int,
        client: str,
        examples: Arrays,
        model: Model,
        shared: Trees = NONE,
        kept: Tree | None = None,
    ) -> Learned:
        """Trains ``model`` on the client's examples for the local epochs or steps of the run.

        Args:
            round_number: 1 … rounds.
            client: its name.
            examples: at least one.
            model: the global model, without what is private.
            shared: what the strategy broadcasts besides.
            kept: what the client kept, ``letter/name`` -> tensor; ``None``: this is its first time.

        Returns:
            one client's updates, on the device of ``model``. The metrics are means over the
            examples of all steps, each as the model was when it saw it.
        Raises:
            InputError: ``model`` does not fit the task; the losses have the wrong shape.
            RunError: what the client kept does not fit the model.
        """
        if self.private is not None:
            return self._privately(
                self.private, round_number, client, examples, model, shared, kept
            )
        section, seed, n = self.run.client, self.run.run.seed, rows(examples)
        module = self.module(model)
        if section.compile:
            compiling.compile_calls(module)
        params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        mine = self.own(module, client, kept)
        shared = {letter: self._here(tree) for letter, tree in shared.items()}
        anchor = map_tree(lambda p: p.detach().clone(), params)
        loss = self._loss(module, examples) if self.rule.initial_loss else 0.0
        made = self.made(module, round_number, client, examples, kept)
        trained = _leaves(params, own.start(self.rule, anchor, shared, mine), anchor)
        lr = optimizers.learning_rate(section, round_number, self.run.run.rounds)
        optimizer = optimizers.optimizer(section, trained.values(), lr)
        scaler = torch.amp.GradScaler(self.device.type, enabled=section.precision == "float16")
        columns = {name: tensor_of(c).to(self.device) for name, c in made.items()}
        length = self.run.round_length
        if self.task.episodes is None:
            size = section.batch_size
            schedule = batches.schedule(seed, round_number, client, rows(made), size, *length)
        else:
            labels, episodes = made["y"], self.task.episodes
            schedule = batches.episodic(seed, round_number, client, labels, episodes, *length)
        totals: dict[str, Tensor] = {}
        local = Local(trained, anchor, shared, mine, 0, len(schedule))
        with devices.seeded(
            self.device, randomness.torch_seed(seed, "dropout", round_number, client)
        ):
            for step, batch in enumerate(schedule):
                if self.task.follow is not None:
                    self.task.follow(module, step)
                parts = np.array_split(batch, min(section.accumulation, len(batch)))
                self._step(
                    module,
                    local._replace(step=step),
                    optimizer,
                    scaler,
                    [{k: c[torch.from_numpy(p)] for k, c in columns.items()} for p in parts],
                    totals,
                )
        with torch.no_grad():
            ended = map_tree(torch.Tensor.detach, trained)
            taken = own.Taken.of(len(schedule), n, loss)
            left = own.end(
                self.rule, ended, local._replace(params=ended), taken, lr, section.momentum
            )
        after = model_of(module)
        delta = {**_difference(after, model), **left.delta, **left.uploads}
        seen = sum(map(len, schedule))
        updates = Updates(
            round_number,
            [client],
            {name: d.to(_device(model))[None] for name, d in delta.items()},
            torch.tensor([n], dtype=torch.float64),
            {name: (total / seen).cpu().double()[None] for name, total in totals.items()},
        )
        keeps = {**self._keeps(left.own, after), **own.left_over(self.task, made)}
        return Learned(self.released(updates, model), keeps)

    def made(
        self,
        module: nn.Module,
        round_number: int,
        client: str,
        held: Arrays,
        kept: Tree | None = None,
    ) -> Arrays:
        """What a client trains on: what it holds, or what the task makes of that with ``module``
        and of what it kept.

        Raises:
            InputError: the task makes nothing, or other than it declares.
        """
        if self.task.collect is None:
            return held
        seed, rounds = self.run.run.seed, self.run.run.rounds
        old = own.remembered(kept)
        found = collected(self.task.collect, module, held, seed, round_number, rounds, client, old)
        if self.task.collects_apart and rows(found) != rows(held):
            raise InputError(
                f"client '{client}', round {round_number}: the task made {rows(found)} examples "
                f"from {rows(held)}, and declares one from each",
                where="[task]",
                fix="leave collects_apart out, or make one from each",
            )
        return found

    def own(self, module: nn.Module, client: str, kept: Tree | None) -> Trees:
        """What a client has at the start of a round; its private tensors go into ``module``."""
        told = {letter: self._here(tree) for letter, tree in own.told(self.rule, client).items()}
        if not self.rule.keeps:
            return told
        model = model_of(module)
        whole = Model(map_tree(torch.clone, model.params), map_tree(torch.clone, model.buffers))
        found = own.restored(kept, own.first(self.rule, whole), client)
        found = {letter: self._here(tree) for letter, tree in found.items()}
        for name, tensor in found.get(own.PRIVATE, {}).items():
            model.tensors()[name].copy_(tensor)
        return {**found, **told}

    def _here(self, tree: Tree) -> dict[str, Tensor]:
        return map_tree(lambda t: t.to(self.device), tree)

    def _loss(self, module: nn.Module, examples: Arrays) -> float:
        return evaluate(self.task, module, examples, device=self.device)[1]["loss"]

    def released(self, updates: Updates, model: Model) -> Updates:
        """What of ``updates`` leaves the clients: all, but under local privacy."""
        section = self.run.privacy
        if section.unit != "client" or section.place != "client":
            return updates
        return release(updates, section, set(model.buffers), self.sources)

    def _privately(
        self,
        private: PrivateSteps,
        round_number: int,
        client: str,
        examples: Arrays,
        model: Model,
        shared: Trees,
        kept: Tree | None,
    ) -> Learned:
        """As :meth:`learn`, by DP-SGD; no metrics, which would be a release of their own."""
        module, n = private.module, rows(examples)
        here, first = model_of(module), model_of(self._module).tensors()
        for name in self.at_home:  # another client's may be in it
            here.tensors()[name].copy_(first[name])
        load(module, model, self.at_home)
        mine = self.own(module, client, kept)
        made = self.made(module, round_number, client, examples)
        shared = {letter: self._here(tree) for letter, tree in shared.items()}
        anchor = map_tree(lambda p: p.detach().clone(), here.params)
        for name, tensor in own.start(self.rule, anchor, shared, mine).items():
            here.params[name].copy_(tensor)
        lr = optimizers.learning_rate(self.run.client, round_number, self.run.run.rounds)
        columns = {name: tensor_of(c).to(self.device) for name, c in made.items()}
        seed = randomness.torch_seed(self.run.run.seed, "dropout", round_number, client)
        with devices.seeded(self.device, seed):
            local = private.train(round_number, client, columns, anchor, lr, shared, mine)
        with torch.no_grad():
            taken = own.Taken.of(local.step, n, 0.0)
            ended = map_tree(torch.clone, local.params)
            momentum = self.run.client.momentum
            left = own.end(self.rule, ended, local._replace(params=ended), taken, lr, momentum)
        after = model_of(module)
        # What a buffer learnt of the data was never privatised: it stays at home.
        still = {name: torch.zeros_like(t) for name, t in model.buffers.items()}
        delta = {**_difference(after, model), **still, **left.delta, **left.uploads}
        updates = Updates(
            round_number,
            [client],
            {name: d.to(_device(model))[None] for name, d in delta.items()},
            torch.tensor([n], dtype=torch.float64),
        )
        return Learned(updates, self._keeps(left.own, after))

    def _keeps(self, letters: Trees, model: Model) -> dict[str, Tensor]:
        """What a client keeps, its tensors of ``model`` that never travel included."""
        keeps = dict(letters)
        if self.at_home:
            keeps[own.PRIVATE] = {n: t for n, t in model.tensors().items() if n in self.at_home}
        return {name: t.detach().cpu().clone() for name, t in flatten(keeps).items()}

    def evaluate(self, examples: Arrays, model: Model) -> tuple[int, dict[str, float]]:
        """How many examples, and the means of loss and metrics over them, in float32.

        Raises:
            InputError: as :meth:`train`.
        """
        return evaluate(self.task, self.module(model), examples, device=self.device)

    def _step(
        self,
        module: nn.Module,
        local: Local,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        micro_batches: Sequence[Batch],
        totals: dict[str, Tensor],
    ) -> None:
        optimizer.zero_grad()
        sizes = [len(next(iter(part.values()))) for part in micro_batches]
        for part, size in zip(micro_batches, sizes, strict=True):
            value, figures = self.objective(module, local, part)
            # The shares add up to one, and with them the terms of the rule.
            scaler.scale(value * (size / sum(sizes))).backward()  # type: ignore[no-untyped-call]
            add_sums(totals, figures, lambda v: v.sum())
        scaler.unscale_(optimizer)
        with torch.no_grad():
            # A parameter that the loss does not touch has a zero gradient, not none: weight decay
            # applies to it, as it does where gradients are computed for many clients at once.
            gradient = map_tree(
                lambda p: torch.zeros_like(p) if p.grad is None else p.grad, local.params
            )
            transformed = self.rule.gradient(gradient, local)
            before = None if self.rule.after is None else map_tree(torch.clone, local.params)
            for name, p in local.params.items():
                p.grad = transformed[name]
        scaler.step(optimizer)
        scaler.update()
        if self.rule.after is not None and before is not None:
            with torch.no_grad():
                stepped = map_tree(torch.clone, local.params)
                settled = self.rule.after(stepped, transformed, local._replace(params=before))
                for name, p in local.params.items():
                    p.copy_(settled[name])

    def objective(
        self, module: nn.Module, local: Local, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What one client minimises over a batch, a scalar, and the batch's figures (B,)."""
        if self.rule.objective is not None:
            with devices.autocast(self.device, self.run.client):
                return objective(self.task, module, self.rule, local, batch)
        with devices.autocast(self.device, self.run.client):
            losses, figures = per_example(self.task, module, batch)
        return self.rule.loss(losses.mean(), local), figures


def with_clipping(rule: ClientRule, max_grad_norm: float | None) -> ClientRule:
    """The rule with ``max_grad_norm`` of ``[client]`` as its last gradient transform.

    Last, because it bounds what the optimizer is given: a control variate that were added to a
    clipped gradient could make it as long as it likes.
    """
    if max_grad_norm is None:
        return rule
    return rule._replace(grad_transforms=(*rule.grad_transforms, clip_gradient(max_grad_norm)))


def load(module: nn.Module, model: Model, private: Collection[str] = ()) -> None:
    """Copies the tensors of ``model`` into ``module``; ``private`` ones of that stay as they are.

    Raises:
        InputError: a name or a shape differs.
    """
    fill(model_of(module), model, private)


def fill(mine: Model, model: Model, private: Collection[str] = ()) -> None:
    """:func:`load`, given the module's own tensors.

    Raises:
        InputError: a name or a shape differs.
    """
    here, given = mine.tensors(), model.tensors()
    if here.keys() - private != given.keys():
        names = sorted((here.keys() - private) ^ given.keys())
        raise InputError(
            f"the global model and the task's model differ in {names[0]!r}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            where="[task]",
            fix="do both sides have the same version of the model?",
        )
    for name in given:
        tensor = here[name]
        if tensor.shape != given[name].shape:
            raise InputError(
                f"{name!r} has shape {tuple(given[name].shape)} in the global model, expected "
                f"{tuple(tensor.shape)}",
                where="[task]",
                fix="do both sides have the same version of the model?",
            )
        tensor.copy_(given[name])


def _difference(local: Model, model: Model) -> dict[str, Tensor]:
    given: Tree = model.tensors()
    here = local.tensors()
    moved = {name: here[name].to(tensor.device) for name, tensor in given.items()}
    return {
        name: tensor ^ given[name] if tensor.dtype is torch.bool else tensor - given[name]
        for name, tensor in moved.items()
    }


def _device(model: Model) -> torch.device:
    return next(iter(model.tensors().values())).device


def _leaves(params: Tree, start: Tree, anchor: Tree) -> dict[str, Tensor]:
    """What is trained: ``params`` moved to where training starts, and what is trained along."""
    leaves = dict(params)
    with torch.no_grad():
        for name, tensor in start.items():
            if name not in leaves:
                leaves[name] = tensor.clone().requires_grad_()
            elif tensor is not anchor[name]:
                leaves[name].copy_(tensor)
    return leaves


def _check(run: RunFile, rule: ClientRule, model: Model, private: Collection[str]) -> None:
    section = run.client
    found = str(section.optimizer) if section.optimizer != "sgd" else ""
    if rule.plain_sgd and section.momentum:
        found = f"momentum = {section.momentum}"
    elif (rule.sgd or rule.plain_sgd) and section.nesterov:
        found = "nesterov = true"
    if found and (rule.sgd or rule.plain_sgd):
        plain = "plain SGD" if rule.plain_sgd else "SGD"
        raise InputError(
            f"strategy '{run.strategy.name}' assumes {plain} at the clients, and [client] has "
            f"{found}",
            where="[client]",
            fix="set optimizer = 'sgd'" + (" and momentum = 0" if rule.plain_sgd else ""),
        )
    if rule.private is not None and not private:
        raise InputError(
            f"strategy '{run.strategy.name}' finds nothing in the model to keep private: it has "
            f"{', '.join(list(model.tensors())[:6])} …",
            where="[strategy]",
            fix="name the client's own tensors, or use fedavg",
        )
    if model.params.keys() <= set(private):
        raise InputError(
            f"strategy '{run.strategy.name}' keeps all {len(model.params)} parameters private",
            where="[strategy]",
            fix="leave some to be learned together",
        )
