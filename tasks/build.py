"""From ``[task]`` to a task and its initial model."""

from __future__ import annotations

import torch
from torch import nn

from umbel.core import randomness, registry, run_file, settings
from umbel.core.trees import Model
from umbel.datasets.federated import Info
from umbel.tasks.begin import begun
from umbel.tasks.curriculum import paced
from umbel.tasks.task import Task


def build_task(section: run_file.Task, info: Info) -> Task:
    """The task that ``[task]`` names, for data such as ``info`` describes.

    Raises:
        InputError: no such task or model, a parameter that is not its own, or a curriculum for a
            task that chooses its examples itself.
    """
    factory = registry.find("tasks", section.kind, "[task]")
    owner = f"task '{section.kind}'"
    also = run_file.Task.model_fields
    table = settings.arguments(factory, section.parameters(), "[task]", owner, also=also)
    task: Task = factory(info, section.model, **table)
    build, around = begun(task.build, section), task.around
    task = task._replace(build=build if around is None else lambda: around(build()))
    return task if section.curriculum is None else paced(task, section.curriculum, info)


def initial_module(task: Task, seed: int) -> nn.Module:
    """The task's model with the initial parameters that ``seed`` gives, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.torch_seed(seed, "init"))
        return task.build().train()


def model_of(module: nn.Module) -> Model:
    """The tensors of ``module``, shared with it: trained parameters, and persistent buffers.

    Frozen parameters do not travel.
    """
    params = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    state = module.state_dict(keep_vars=False)
    buffers = dict(module.named_buffers(remove_duplicate=False))
    # A quantised layer's state has more than its parameters and buffers.
    return Model(params, {n: t for n, t in state.items() if n in buffers})
