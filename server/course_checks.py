"""What a run over experiences needs, and what it does not go with."""

from __future__ import annotations

import torch

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.core.trees import Tree
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.defence import Classes, Defence
from umbel.tasks.task import Task

WHERE = "[continual]"

NO_CLASSES = Classes(torch.ones(1, 0, dtype=torch.bool), torch.ones(0, dtype=torch.bool))


def check(
    run: RunFile,
    strategy: Strategy,
    task: Task,
    classes: int | None,
    buffers: Tree,
    defence: Defence,
) -> None:
    """Passes if the run can be one over experiences.

    Args:
        run: the run file.
        strategy: what it names.
        task: the same.
        classes: of the data; ``None``: real-valued targets.
        buffers: of the model.
        defence: what the run names.

    Raises:
        InputError: what it has that experiences do not go with.
    """
    section, rule = run.continual, strategy.client
    named = section.defence if isinstance(section.defence, str) else section.defence.name
    stages = section.experiences + (section.lag if section.order == "staggered" else 0)
    known = section.head == "multi" or section.by != "class"
    found, fix = "", ""
    if run.run.rounds % stages:
        found = f"rounds = {run.run.rounds} do not divide evenly by {stages}"
        fix = f"set rounds = {stages * max(1, run.run.rounds // stages)}"
    elif run.privacy.unit != "none":
        found, fix = "the privacy of examples that come in stages is not accounted", "unit = 'none'"
    elif run.attack.kind != "none":
        found, fix = "no attack knows of experiences", "remove [attack]"
    elif run.evaluate.early_stopping is not None:
        found, fix = "a run that stops early misses experiences", "remove early_stopping"
    elif strategy.asynchronous is not None or strategy.root is not None:
        found = f"strategy '{run.strategy.name}' steps by itself or has examples of its own"
        fix = "use fedavg"
    elif classes is None or task.episodes is not None:
        found, fix = "experiences are measured by accuracy", "kind = 'classification'"
    elif (section.head != "single" or defence.outputs) and classes < 3:
        found = f"heads and defence '{named}' need one logit for each of three classes or more"
        fix = "head = 'single' and another defence"
    elif section.head != "single" and run.task.parameters().get("label_smoothing"):
        found, fix = "label_smoothing gives mass to classes outside the head", "label_smoothing = 0"
    elif rule.private is not None and (defence.measure or defence.letters({}, NO_CLASSES)):
        found = f"strategy '{run.strategy.name}' keeps tensors private that '{named}' looks after"
        fix = "another strategy, or replay"
    elif defence.replaces and rule.objective is not None:
        found = f"'{named}' and strategy '{run.strategy.name}' both replace the objective"
        fix = "another strategy, or replay"
    elif defence.model is not None and not (known and section.order == "in-step"):
        found = f"'{named}' needs to know which experience is under way, and an example is of"
        fix = "head = 'multi' and order = 'in-step'"
    elif defence.model is not None and (run.task.adapter or buffers):
        found = f"'{named}' does not go with [task.adapter], nor with running statistics"
        fix = "a model without BatchNorm, trained itself"
    if found:
        raise InputError(found, where=WHERE, fix=fix)
