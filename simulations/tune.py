"""Searches the settings with which a run does best, a trial a run, with Optuna."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbel.core import randomness, run_file
from umbel.core.errors import InputError, UmbelError
from umbel.core.run_file import RunFile, Sought
from umbel.server.records import RoundRecord
from umbel.server.stopping import lower_is_better
from umbel.simulations.simulate import ignore, simulate

if TYPE_CHECKING:
    import optuna

PRUNED = "pruned: worse than the median of the earlier trials at this round"


@dataclass(frozen=True)
class Trial:
    """One run of the search.

    Args:
        number: 0 …, in the order that they were begun.
        status: ``finished``, ``pruned``, or ``failed``: by its settings, such as a diverging rate.
        value: of the metric after its last evaluated round; ``None`` where there is none.
        settings: key of the run file -> value.
        run_id: in the run store; ``None`` where no run was begun.
        error: why it failed.
    """

    number: int
    status: str
    value: float | None
    settings: Mapping[str, Any]
    run_id: str | None = None
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """The trial as plain values."""
        return {**vars(self), "settings": dict(self.settings)}


@dataclass(frozen=True)
class Search:
    """What a search came to.

    Args:
        study: the file that it goes on from.
        metric: what decided.
        best: the best finished trial; ``None`` where none has a value.
        trials: all of them, those of earlier calls too.
        epsilon: an upper bound on what all trials together spent of each unit's privacy: trials
            look at the same data, so their budgets add up. ``None`` where runs have none.
    """

    study: str
    metric: str
    best: Trial | None
    trials: list[Trial]
    epsilon: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The search as plain values."""
        best = None if self.best is None else self.best.as_json()
        trials = [trial.as_json() for trial in self.trials]
        return {**vars(self), "best": best, "trials": trials}


def tune(
    table: Mapping[str, Any],
    *,
    engine: str = "vectorised",
    on_trial: Callable[[Trial, int], None] = ignore,
    announce: Callable[[str], None] = ignore,
) -> Search:
    """Makes the trials that are left of a search; each is a run of the run file's store.

    The study is one SQLite file beside the runs. A search that was interrupted, or killed, goes on
    with what its file holds and makes the trial that was cut off anew, by other settings; one that
    is whole is only shown. Suggestions follow from the run's
    seed and the trials before.

    Args:
        table: the run file's tables, ``[tune]`` among them, after ``--set``.
        engine: where clients live.
        on_trial: called after each trial, with the number of trials planned.
        announce: called with what a user should know.

    Raises:
        InputError: nothing to search, a key or value that the run file refuses, no Optuna, another
            search in the same file, or no trial that could begin.
    """
    run = run_file.resolve(table)
    optuna = _optuna()
    section = run.tune
    if not section.space:
        raise InputError(
            "there is nothing to search",
            where="[tune.space]",
            fix='add "client.lr" = { low = 0.001, high = 1.0, log = true }',
        )
    _at_its_ends(table, run)
    lower = lower_is_better(section.metric) if section.better is None else section.better == "lower"
    study = _study(optuna, run, lower)
    done = sum(not _interrupted(trial) for trial in study.get_trials(deepcopy=False))
    for nth in range(done, section.trials):
        made = _trial(optuna, study, table, run, engine, announce)
        on_trial(made, section.trials)
        if made.status == "failed" and nth == 0:
            raise InputError(
                f"the first trial failed: {made.error}",
                where="[tune]",
                fix="does `umbel simulate` run this file? Narrow [tune.space]",
            )
    trials = [_seen(trial) for trial in study.get_trials(deepcopy=False)]
    finished = {t.value: t for t in reversed(trials) if t.status == "finished"}
    values = [value for value in finished if value is not None]
    best = finished[min(values) if lower else max(values)] if values else None
    spent = [t.user_attrs["epsilon"] for t in study.get_trials() if "epsilon" in t.user_attrs]
    return Search(str(_file(run)), section.metric, best, trials, sum(spent) if spent else None)


def _trial(
    optuna: Any,
    study: optuna.Study,
    table: Mapping[str, Any],
    run: RunFile,
    engine: str,
    announce: Callable[[str], None],
) -> Trial:
    section = run.tune
    # Another seed each time, so that a search that is resumed does not repeat its first draws.
    begun = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(
        seed=randomness.torch_seed(run.run.seed, "tune", begun, "") % 2**32
    )
    trial = study.ask()
    settings = {key: _suggest(trial, key, where) for key, where in section.space.items()}

    def until(record: RoundRecord) -> str:
        value = record.metrics.get(section.metric)
        if value is None:
            return ""
        trial.report(value, record.round)
        return PRUNED if section.prune and trial.should_prune() else ""

    states = optuna.trial.TrialState
    try:
        chosen = _with(table, settings, f"{run.run.name[:56]}-t{trial.number}")
        outcome = simulate(chosen, engine=engine, announce=announce, until=until)
    except UmbelError as error:  # a diverging rate is an answer, too
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=states.FAIL)
        return _seen(study.get_trials()[trial.number])
    except BaseException:
        study.tell(trial, state=states.FAIL)
        raise
    trial.set_user_attr("run_id", outcome.run_id)
    if outcome.privacy is not None:
        trial.set_user_attr("epsilon", outcome.privacy["epsilon"])
    if outcome.status == "interrupted":
        study.tell(trial, state=states.FAIL)
        raise KeyboardInterrupt
    value = outcome.metrics.get(section.metric)
    if value is None and outcome.metrics:
        trial.set_user_attr("error", f"there is no metric '{section.metric}'")
        study.tell(trial, state=states.FAIL)
        raise InputError(
            f"unknown metric '{section.metric}'",
            where="[tune]",
            fix=f"known: {', '.join(outcome.metrics)}",
        )
    if outcome.history and outcome.history[-1].note.endswith(PRUNED):
        study.tell(trial, state=states.PRUNED)
    elif value is None or not math.isfinite(value):
        trial.set_user_attr("error", f"{section.metric} = {value}")
        study.tell(trial, state=states.FAIL)
    else:
        study.tell(trial, value)
    return _seen(study.get_trials()[trial.number])


def _seen(trial: optuna.trial.FrozenTrial) -> Trial:
    status = {"COMPLETE": "finished", "PRUNED": "pruned"}.get(trial.state.name, "failed")
    reported = trial.intermediate_values
    value = trial.value if trial.value is not None else reported.get(max(reported, default=-1))
    attributes = trial.user_attrs
    error = "interrupted" if _interrupted(trial) else attributes.get("error", "")
    return Trial(trial.number, status, value, trial.params, attributes.get("run_id"), error)


def _interrupted(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether it was cut off, and so does not count: what fails by itself says why."""
    return trial.state.name == "FAIL" and "error" not in trial.user_attrs


def _suggest(trial: optuna.Trial, key: str, where: Sought) -> Any:
    if where.choices is not None:
        return trial.suggest_categorical(key, where.choices)
    low, high, step = where.low, where.high, where.step
    assert low is not None
    assert high is not None
    if isinstance(low, int) and isinstance(high, int) and isinstance(step or 1, int):
        return trial.suggest_int(key, low, high, step=int(step or 1), log=where.log)
    return trial.suggest_float(key, low, high, step=step, log=where.log)


def _at_its_ends(table: Mapping[str, Any], run: RunFile) -> None:
    """Tries the run file with the first and last value of each key, so that a typo costs no run."""
    for key, where in run.tune.space.items():
        ends = (where.low, where.high) if where.choices is None else where.choices
        for value in ends:
            try:
                _with(table, {key: value}, run.run.name)
            except InputError as error:
                raise InputError(
                    f"{key} = {value!r}: {error.message}",
                    where=f'[tune.space] "{key}"',
                    fix=error.fix,
                ) from None


def _with(table: Mapping[str, Any], settings: Mapping[str, Any], name: str) -> RunFile:
    copied: dict[str, Any] = _copy(table)
    copied.pop("tune", None)
    copied.setdefault("run", {})["name"] = name
    for key, value in settings.items():
        run_file.put(copied, key.split("."), value, f'[tune.space] "{key}"')
    return run_file.resolve(copied)


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _file(run: RunFile) -> Path:
    return Path(run.run.store.removeprefix("sqlite:///")) / f"tune-{run.run.name}.sqlite"


def _study(optuna: Any, run: RunFile, lower: bool) -> Any:
    """The study of this run file: new, or as an earlier call left it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = _file(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    section = run.tune
    study = optuna.create_study(
        storage=f"sqlite:///{file}",
        study_name=run.run.name,
        load_if_exists=True,
        direction="minimize" if lower else "maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=section.prune_after),
    )
    sought = section.model_dump_json(include={"space", "metric", "better"})
    if study.user_attrs.setdefault("sought", sought) != sought:
        raise InputError(
            f"{file} holds another search",
            where="[tune]",
            fix="give the run another name, or remove that file",
        )
    study.set_user_attr("sought", sought)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # its process was killed
    return study


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise InputError(
            "umbel tune needs Optuna", where="umbel tune", fix="pip install 'umbel[tune]'"
        ) from None
    return optuna
