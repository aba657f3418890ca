"""Local training of one client, the plain way: what every faster engine must agree with."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from umbel.client import batches, devices, optimizers
from umbel.client.local_privacy import release
from umbel.client.private import PrivateSteps
from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, Tree, map_tree
from umbel.datasets.federated import Arrays, rows
from umbel.privacy.sources import Sources, system_sources
from umbel.strategies.parts import ClientRule, Local
from umbel.strategies.parts.rule import clip_gradient
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.evaluate import add_sums, evaluate, per_example, tensor_of
from umbel.tasks.task import Batch, Task


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
        InputError: the device or precision is not here, the model has nothing to train, or it
            cannot be trained privately where ``[privacy]`` asks for that.
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
            load(module, model)
        return module

    def train(self, round_number: int, client: str, examples: Arrays, model: Model) -> Updates:
        """Trains ``model`` on the client's examples for the local epochs or steps of the run.

        Args:
            round_number: 1 … rounds.
            client: its name.
            examples: at least one.
            model: the global model.

        Returns:
            one client's updates, on the device of ``model``. The metrics are means over the
            examples of all steps, each as the model was when it saw it.
        Raises:
            InputError: ``model`` does not fit the task; the losses have the wrong shape.
        """
        if self.private is not None:
            return self._train_privately(self.private, round_number, client, examples, model)
        section, seed, n = self.run.client, self.run.run.seed, rows(examples)
        module = self.module(model)
        params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        anchor = map_tree(lambda p: p.detach().clone(), params)
        lr = optimizers.learning_rate(section, round_number, self.run.run.rounds)
        optimizer = optimizers.optimizer(section, params.values(), lr)
        scaler = torch.amp.GradScaler(self.device.type, enabled=section.precision == "float16")
        columns = {name: tensor_of(c).to(self.device) for name, c in examples.items()}
        schedule = batches.schedule(
            seed, round_number, client, n, section.batch_size, *self.run.round_length
        )
        totals: dict[str, Tensor] = {}
        with devices.seeded(
            self.device, randomness.torch_seed(seed, "dropout", round_number, client)
        ):
            for batch in schedule:
                parts = np.array_split(batch, min(section.accumulation, len(batch)))
                self._step(
                    module,
                    Local(params, anchor),
                    optimizer,
                    scaler,
                    [{k: c[torch.from_numpy(p)] for k, c in columns.items()} for p in parts],
                    totals,
                )
        seen = sum(map(len, schedule))
        return self.released(
            Updates(
                round_number,
                [client],
                {name: d[None] for name, d in _difference(model_of(module), model).items()},
                torch.tensor([n], dtype=torch.float64),
                {name: (total / seen).cpu().double()[None] for name, total in totals.items()},
            ),
            model,
        )

    def released(self, updates: Updates, model: Model) -> Updates:
        """What of ``updates`` leaves the clients: all, but under local privacy."""
        section = self.run.privacy
        if section.unit != "client" or section.place != "client":
            return updates
        return release(updates, section, set(model.buffers), self.sources)

    def _train_privately(
        self,
        private: PrivateSteps,
        round_number: int,
        client: str,
        examples: Arrays,
        model: Model,
    ) -> Updates:
        """As :meth:`train`, by DP-SGD; no metrics, which would be a release of their own."""
        load(private.module, model)
        anchor = {
            name: p.detach().clone()
            for name, p in private.module.named_parameters()
            if p.requires_grad
        }
        lr = optimizers.learning_rate(self.run.client, round_number, self.run.run.rounds)
        columns = {name: tensor_of(c).to(self.device) for name, c in examples.items()}
        seed = randomness.torch_seed(self.run.run.seed, "dropout", round_number, client)
        with devices.seeded(self.device, seed):
            private.train(round_number, client, columns, anchor, lr)
        delta = _difference(model_of(private.module), model)
        # What a buffer learnt of the data was never privatised: it stays at home.
        delta |= {name: torch.zeros_like(delta[name]) for name in model.buffers}
        weights = torch.tensor([rows(examples)], dtype=torch.float64)
        return Updates(round_number, [client], {n: d[None] for n, d in delta.items()}, weights)

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
            with devices.autocast(self.device, self.run.client):
                losses, figures = per_example(self.task, module, part)
            # The shares add up to one, and with them the terms of the rule.
            objective = self.rule.loss(losses.mean(), local) * (size / sum(sizes))
            scaler.scale(objective).backward()  # type: ignore[no-untyped-call]
            add_sums(totals, figures, lambda v: v.sum())
        scaler.unscale_(optimizer)
        with torch.no_grad():
            # A parameter that the loss does not touch has a zero gradient, not none: weight decay
            # applies to it, as it does where gradients are computed for many clients at once.
            gradient = map_tree(
                lambda p: torch.zeros_like(p) if p.grad is None else p.grad, local.params
            )
            gradient = dict(self.rule.gradient(gradient, local))
            for name, p in local.params.items():
                p.grad = gradient[name]
        scaler.step(optimizer)
        scaler.update()


def with_clipping(rule: ClientRule, max_grad_norm: float | None) -> ClientRule:
    """The rule with ``max_grad_norm`` of ``[client]`` as its last gradient transform.

    Last, because it bounds what the optimizer is given: a control variate that were added to a
    clipped gradient could make it as long as it likes.
    """
    if max_grad_norm is None:
        return rule
    return rule._replace(grad_transforms=(*rule.grad_transforms, clip_gradient(max_grad_norm)))


def load(module: nn.Module, model: Model) -> None:
    """Copies the tensors of ``model`` into ``module``.

    Raises:
        InputError: a name or a shape differs.
    """
    own, given = model_of(module).tensors(), model.tensors()
    if own.keys() != given.keys():
        names = sorted(own.keys() ^ given.keys())
        raise InputError(
            f"the global model and the task's model differ in {names[0]!r}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            where="[task]",
            fix="do both sides have the same version of the model?",
        )
    for name, tensor in own.items():
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
    moved = {name: tensor.to(given[name].device) for name, tensor in local.tensors().items()}
    return {
        name: tensor ^ given[name] if tensor.dtype is torch.bool else tensor - given[name]
        for name, tensor in moved.items()
    }
