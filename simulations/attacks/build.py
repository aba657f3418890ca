"""From ``[attack]`` to hostile clients among, or beside, those of a federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from umbel.core import randomness, registry, run_file, settings
from umbel.core.errors import InputError
from umbel.core.payloads import Federation, Updates
from umbel.core.run_file import RunFile
from umbel.core.trees import Model, Tree
from umbel.datasets.federated import FederatedData, rows
from umbel.server.records import Scores
from umbel.server.rounds import Evaluate
from umbel.simulations.attacks.attack import Attack
from umbel.simulations.attacks.attacked import Attacked
from umbel.simulations.residents import Residents
from umbel.strategies.parts import Combiner, Strategy
from umbel.tasks.evaluate import evaluate
from umbel.tasks.task import Task

WHERE = "[attack]"

READS_ITSELF = ("flower",)
"""Engines whose workers read the data themselves, as sites do: nobody can poison them there."""


def build_attack(section: run_file.Attack) -> Attack | None:
    """The attack that ``[attack]`` names, with its parameters; ``None`` where all are honest.

    Raises:
        InputError: no such attack, a parameter that is not its own, or hostile clients that join
            and would have to train.
    """
    if section.kind == "none":
        return None
    factory = registry.find("attacks", section.kind, WHERE)
    also = run_file.Attack.model_fields
    owner = f"attack '{section.kind}'"
    table = settings.arguments(factory, section.parameters(), WHERE, owner, also=also)
    attack: Attack = factory(**table)
    trains = attack.sees == "own" or attack.poison is not None
    if section.join and trains:
        raise InputError(
            f"join = true, and a hostile client of {section.kind} trains on data of its own",
            where=WHERE,
            fix="join = false: some of the clients that hold data are hostile",
        )
    return attack


def hostile_count(section: run_file.Attack, clients: int) -> int:
    """How many are hostile.

    Raises:
        InputError: as many as there are clients, or more.
    """
    if section.kind == "none":
        return 0
    wanted = section.count or max(1, round((section.fraction or 0.0) * clients))
    if wanted >= clients and not section.join:
        raise InputError(
            f"{wanted} of {clients} clients hostile leaves nobody honest",
            where=WHERE,
            fix=f"count ≤ {clients - 1}",
        )
    return wanted


def choose_hostile(section: run_file.Attack, names: Sequence[str], seed: int) -> list[str]:
    """Who is hostile: a function of the seed and of how many clients there are."""
    count = hostile_count(section, len(names))
    if section.join:
        return [f"~hostile-{i}" for i in range(count)]
    order = randomness.permutation(randomness.key(seed, "hostile"), len(names))
    return sorted(names[int(i)] for i in order[:count])


@dataclass(frozen=True)
class Siege:
    """A run under attack; without one, nothing is changed.

    Args:
        run: the run file.
        attack: what hostile clients do, or ``None``.
        hostile: who they are.
        data: what engines shall train on.
        task: what is learned.
        strategy: what combines.
    """

    run: RunFile
    attack: Attack | None
    hostile: Sequence[str]
    data: FederatedData
    task: Task
    strategy: Strategy

    def around(self, federation: Federation, engine: str) -> Federation:
        """The federation with the hostile clients in it."""
        if self.attack is None:
            return federation
        apart = None
        if self.attack.poison is not None and engine in READS_ITSELF:
            apart = Residents(self.run, self.data, self.task, self.strategy.client)
        return Attacked(
            federation,
            self.attack,
            self.hostile,
            self.hostile if self.run.attack.join else (),
            self.run.run.seed,
            lambda model, updates: combined(self.strategy.combine, model, updates),
            apart,
        )

    def measured(self, scores: Evaluate, module: torch.nn.Module) -> Evaluate:
        """The evaluation, with ``attack_success_rate`` where the attack has a trigger."""
        test = self.data.test if self.data.test is not None else self.data.client_test
        if self.attack is None or self.attack.trigger is None or test is None:
            return scores
        wanted = self.attack.trigger(test)
        if not rows(wanted):
            return scores

        def both(round_number: int, model: Model) -> Scores:
            found = scores(round_number, model)
            module.load_state_dict(model.tensors(), strict=False)
            rate = evaluate(self.task, module, wanted)[1].get("accuracy", float("nan"))
            return found._replace(metrics={**found.metrics, "attack_success_rate": rate})

        return both


def besiege(run: RunFile, data: FederatedData, task: Task, strategy: Strategy) -> Siege:
    """The run with its hostile clients chosen and their data poisoned.

    Raises:
        InputError: as :func:`build_attack` and :func:`hostile_count`; data that cannot be poisoned.
    """
    attack = build_attack(run.attack)
    hostile = [] if attack is None else choose_hostile(run.attack, data.names, run.run.seed)
    if attack is not None and attack.poison is not None:
        held = [data.train_holdings.of_client(data.names.index(name)) for name in hostile]
        columns = attack.poison(data, np.concatenate(held).astype(np.int64), run.run.seed)
        for column in columns.values():
            column.flags.writeable = False
        data = replace(data, train=columns)
    return Siege(run, attack, hostile, data, task, strategy)


def combined(combiner: Combiner, model: Tree, updates: Updates) -> Tree:
    """What a combiner makes of updates alone."""
    return combiner.finish(combiner.add(combiner.zero(model), updates)).delta
