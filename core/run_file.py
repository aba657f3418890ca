"""The run file: TOML, strict, frozen. One file says what a run is, wherever it runs."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from umbel.core.errors import InputError, suggest
from umbel.core.settings import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Settings,
    Share,
    parse,
)


class Open(Settings):
    """A table with a name (or kind) whose further keys belong to the part of that name."""

    model_config = pydantic.ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    def parameters(self) -> dict[str, Any]:
        """The keys that belong to the named part."""
        return dict(self.__pydantic_extra__ or {})


class Run(Settings):
    """``[run]``: what the run is called, how long it is and where it is kept."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What the run is called in lists; letters, digits, ``.``, ``_`` and ``-``."""
    seed: Natural = 0
    """Every draw of the run follows from it: split, sample, batches, initial model."""
    rounds: Count = 10
    """How many."""
    store: str = "runs"
    """Where runs are kept: a directory, or a database URL."""
    checkpoint_seconds: NonNegative = 1.0
    """Simulation: at least this long between commits; 0 commits every round. A run that is killed
    repeats, bit for bit, what came after the last; Ctrl-C and the end commit all. A server of real
    sites commits every round."""
    processes: Natural | None = None
    """Simulation: worker processes, 0 for none; ``None``: one for each core where rounds are long
    enough. The result is the same."""
    engine_plan: str | None = None
    """Simulation: how the vectorised engine computes, such as ``grouped:chunk=5``; ``None``: the
    fastest in a short trial. It decides the last bits of the result, so it stands in the run's
    record and a resumed run keeps it."""
    ray_address: str | None = None
    """``--engine ray``: a cluster to join, such as ``10.0.0.1:6379``, or ``auto`` for one on this
    machine; ``None``: the environment's ``RAY_ADDRESS``, else a cluster of this machine's cores for
    the time of the run."""


class Split(Open):
    """``[data.split]``: which client holds which examples."""

    kind: str
    """Name of a split, or ``module:object``; further keys are its own."""


class Data(Open):
    """``[data]``: which data set, where its files are, and who holds them."""

    name: str
    """Name of a data set, or ``module:object``; further keys are its own."""
    path: str | None = None
    """The folder or file that holds it. Nothing is ever downloaded."""
    split: Split | None = None
    """``None``: the natural clients of the data set, where it has them."""
    holdout: Fraction | None = None
    """Share of the examples set aside as the global test set, before the split; ``None``: 0.2 where
    the data set has no test part of its own, else 0."""
    client_holdout: Fraction | None = None
    """Share of each client's examples that the client keeps as its own test part; ``None``: 0.2 for
    a natural split without any test part, else 0."""


class Part(Open):
    """A table that names a part, such as ``model = { name = "mlp", hidden = [64] }``."""

    name: str
    """Name of the part, or ``module:object``; further keys are its own."""


class Adapter(Open):
    """``[task.adapter]``: what is trained in place of the model, which stays as it began."""

    kind: str
    """Name of an adapter, or ``module:object``; further keys are its own."""


class Task(Open):
    """``[task]``: what is learned."""

    kind: str
    """Name of a task, or ``module:object``; further keys are its own."""
    model: Part | str | None = None
    """A name, or a table of a name and the model's own keys; ``None``: the task's own choice."""
    adapter: Adapter | str | None = None
    """A kind, or a table of a kind and the adapter's own keys; ``None``: the model is trained
    itself. Only the adapter's tensors travel."""
    init_from: str | Annotated[tuple[str, ...], pydantic.Strict(False)] | None = None
    """Where the model begins: a run of the store, a run's folder or a ``.safetensors`` file; or
    several, such as a base model's and an adapter's. ``None``: as the seed initialises it."""


class Schedule(Settings):
    """``[client.schedule]``: the learning rate as a function of the round, over the whole run."""

    kind: Literal["constant", "step", "cosine"] = "constant"
    """``step`` multiplies by ``factor`` every ``step`` rounds; ``cosine`` falls to ``final``."""
    warmup: Natural = 0
    """Rounds of linear warm-up from lr / warmup to lr."""
    step: Count = 10
    """``step``: rounds between two decays."""
    factor: Share = 0.1
    """``step``: what each decay multiplies the rate by."""
    final: float = Field(0.0, ge=0, le=1)
    """``cosine``: the last rate, as a share of lr."""


class Client(Settings):
    """``[client]``: how a client trains."""

    optimizer: Literal["sgd", "adam", "adamw", "lion", "adan"] = "sgd"
    """torch's, Lion (Chen et al. 2023) or Adan (Xie et al. 2022); it starts afresh each round."""
    lr: Positive = 0.1
    """The learning rate, before the schedule."""
    momentum: Fraction = 0.0
    """``sgd``: the share of the last step that is kept."""
    nesterov: bool = False
    """``sgd``: Nesterov's momentum."""
    beta1: Fraction | None = None
    """All but ``sgd``: the share of the first moment that a step keeps; ``None``: 0.9, and 0.98 for
    ``adan``."""
    beta2: Fraction | None = None
    """All but ``sgd``: the same of the second moment, for ``lion`` of the momentum, for ``adan`` of
    the gradient's change; ``None``: 0.999, 0.99 and 0.92."""
    beta3: Fraction | None = None
    """``adan``: the same of the second moment; ``None``: 0.99."""
    eps: Positive = 1e-8
    """``adam``, ``adamw``, ``adan``: added to the root of the second moment."""
    weight_decay: NonNegative = 0.0
    """As torch has it: part of the gradient for ``sgd`` and ``adam``, decoupled for the others."""
    schedule: Schedule | Literal["constant", "step", "cosine"] = "constant"
    """A kind, or a table."""
    batch_size: Count | Literal["full"] = 32
    """Examples a step; ``full``: all that the client holds."""
    local_epochs: Count | None = None
    """Passes over its examples that a client makes in a round; 1 where neither length is set."""
    local_steps: Count | None = None
    """Steps that a client makes in a round, instead of epochs."""
    accumulation: Count = 1
    """Micro-batches that a batch is computed in; the step is the same, the memory smaller."""
    max_grad_norm: Positive | None = None
    """Bound on the global L2 norm of a batch's gradient; ``None``: no bound."""
    state_gib: Positive = 16.0
    """Strategies that keep tensors at the clients: the most that these may take on a disk, those
    of all clients of a simulation together."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward and backward pass, where the device has it."""

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> Client:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("local_epochs and local_steps exclude each other; remove one")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; set momentum = 0.9")
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError("momentum belongs to sgd; the others have beta1; remove momentum")
        return self


class Strategy(Open):
    """``[strategy]``: the algorithm with its parameters, and who takes part in a round."""

    name: str = "fedavg"
    """Name of a strategy, or ``module:object``; further keys are its own."""
    cohort: Count | Share | None = None
    """Clients a round: a number, or a share of all; ``None``: all."""
    over_selection: NonNegative = 0.0
    """Reserves asked beyond the cohort, as a share of it (Bonawitz et al. 2019, section 2.2)."""
    quorum: Count | None = None
    """Valid updates without which a round leaves the model as it is; ``None``: one."""
    deadline: Positive | None = None
    """Seconds after which a round stops waiting for remote clients."""
    weights: Literal["examples", "uniform"] = "examples"
    """What a client counts for in the mean: its number of training examples, or one. Under
    ``[privacy] unit = "client"``: ``uniform``, unless ``weights`` or ``max_weight`` is set."""
    max_weight: Positive | None = None
    """No client weighs more; ``None``: ten times the median number of examples over the clients."""


class Continual(Settings):
    """``[continual]``: the examples come in stages, one experience after another."""

    experiences: Count = 1
    """How many; ``[run] rounds`` is divided evenly among them. 1: all examples are there at once.
    """
    by: Literal["class", "permutation", "rotation"] = "class"
    """What sets experiences apart: groups of classes in order; or, for the same classes (domains),
    a permutation of the inputs or a rotation of pictures, each of which a share of the examples
    has."""
    order: Literal["in-step", "shuffled"] = "in-step"
    """``in-step``: all clients meet the same experience at the same time; ``shuffled``: each in an
    order of its own."""
    head: Literal["single", "multi", "growing"] = "single"
    """Which classes an example may be given: all; those of its experience, which is then known in
    evaluation, too; those that were met so far."""
    defence: Part | str = "naive"
    """What is done against forgetting: a name, or a table of a name and the defence's own keys."""

    @pydantic.model_validator(mode="after")
    def _with_experiences(self) -> Continual:
        defaults = {name: field.default for name, field in Continual.model_fields.items()}
        if self.experiences == 1 and any(getattr(self, n) != d for n, d in defaults.items()):
            raise ValueError("keys for a single experience; set experiences = 5, or remove them")
        if self.by != "class" and self.head != "single":
            raise ValueError(
                f"by = '{self.by}' has the same classes in all experiences; set head = 'single'"
            )
        return self


class Privacy(Settings):
    """``[privacy]``: whose presence is hidden, how well, and from whom."""

    unit: Literal["none", "example", "client"] = "none"
    """Whose presence is hidden: one example of a client (DP-SGD at the client), a client with all
    that it holds, or nobody's."""
    epsilon: Positive | None = None
    """The budget of each client's data: the run ends before it is passed. Without
    ``noise_multiplier``, the noise is calibrated so that the planned rounds just fit."""
    noise_multiplier: NonNegative | None = None
    """Standard deviation of the noise over ``clip_norm``; ``None``: calibrated to ``epsilon``. 0 is
    no privacy at all."""
    delta: Fraction = 1e-5
    """The probability that the guarantee may fail with; much less than one over the number of
    units."""
    clip_norm: Positive = 1.0
    """Bound on the L2 norm of what one unit contributes: an example's gradient, a client's delta.
    With ``adaptive`` clipping, where it starts."""
    clipping: Literal["flat", "per-layer", "adaptive"] = "flat"
    """``flat``: one bound on the whole; ``per-layer``: shared evenly by the parameters;
    ``adaptive``: follows ``clip_quantile`` of the norms, whose noised count is paid for."""
    clip_quantile: Share = 0.5
    """``adaptive``: the share of units that are not clipped."""
    clip_rate: Positive = 0.2
    """``adaptive``: the geometric rate at which the bound moves."""
    mechanism: Literal["gaussian", "distributed-discrete-gaussian"] = "gaussian"
    """What noise: continuous, or whole numbers that clients add under secure aggregation."""
    place: Literal["server", "client"] = "server"
    """Unit ``client``: who adds the noise. ``client`` (local privacy) hides a delta from the server
    too, and needs much more of it for the same model."""
    accountant: Literal["pld", "rdp"] = "pld"
    """What calibrates and reports: ``pld`` is tighter, ``rdp`` faster. Both are upper bounds."""
    neighbouring: Literal["add-or-remove-one", "replace-one", "zero-out"] = "add-or-remove-one"
    """What a unit's presence means. ``replace-one`` doubles the sensitivity and is not amplified by
    sampling."""
    adversary: Literal["server", "outsider"] = "server"
    """Unit ``client``: who must learn nothing. ``server`` knows who takes part, so that sampling
    clients amplifies nothing. For an ``outsider`` who sees the models alone clients are sampled by
    independent coins, and that amplifies."""
    adversary_because: str = Field("", max_length=500)
    """Why the adversary does not see who takes part; in the ledger. ``outsider`` needs it."""

    @pydantic.model_validator(mode="after")
    def _complete(self) -> Privacy:
        if self.unit == "none":
            return self
        if self.noise_multiplier is None and self.epsilon is None:
            raise ValueError(
                f"unit = '{self.unit}' needs a budget or a noise; set epsilon = 3.0, or "
                "noise_multiplier = 1.0"
            )
        if not self.delta:
            raise ValueError("delta = 0 is out of reach of Gaussian noise; set delta = 1e-5")
        if self.unit == "example" and (self.place, self.adversary) != ("server", "server"):
            raise ValueError("place and adversary belong to unit = 'client'; remove them")
        if (self.adversary == "outsider") != bool(self.adversary_because.strip()):
            raise ValueError(
                "adversary = 'outsider' and adversary_because belong together; say why the "
                "adversary does not see who takes part, or remove both"
            )
        if self.place == "client" and (self.adversary, self.clipping) != ("server", "flat"):
            raise ValueError(
                "place = 'client' takes adversary = 'server' and clipping = 'flat'; remove the rest"
            )
        if self.adversary == "outsider" and self.neighbouring == "replace-one":
            raise ValueError("sampling is not amplified under 'replace-one'; use another relation")
        if self.mechanism != "gaussian":
            raise ValueError(
                f"mechanism = '{self.mechanism}' needs secure aggregation, which runs do not have "
                "yet; use mechanism = 'gaussian'"
            )
        return self


class SecureAggregation(Settings):
    """``[secure_aggregation]``: the server sees the sum of the updates and nothing else."""

    enabled: bool = False
    """Whether updates, weights and metrics are summed under masks."""
    accounting_only: bool = False
    """Simulation: rounded and summed as under masks, but without them. The same numbers for less
    work; no site takes part in it."""
    min_cohort: int = Field(3, ge=3, le=65535)
    """The fewest clients of a sum; a round that keeps fewer has no result."""
    corrupt_fraction: Fraction = 0.1
    """The share of a cohort that may help a hostile server."""
    dropout_fraction: Fraction = 0.1
    """The share of a cohort that may vanish without the end of the round."""
    neighbours: Count | None = None
    """Clients that each shares masks with; ``None``: what the two fractions ask for."""
    threshold: Count | None = None
    """Neighbours that must stay and agree; ``None``: what the two fractions ask for. One that is
    not safe is refused."""
    bits: int = Field(32, ge=16, le=32)
    """Sums are taken modulo 2 to the power of this; fewer bits are a smaller upload."""
    clip: Positive = 4.0
    """Each number of a delta, times the client's share of ``max_weight``, is clipped to ±clip."""
    buffer_clip: Positive = 1024.0
    """The same for buffers, such as running statistics and counters."""
    metric_clip: Positive = 100.0
    """The same for training metrics."""
    groups: Count = 1
    """Random groups of a cohort, each summed by itself: robust strategies see the groups' sums."""
    keep_setup: bool = False
    """Engines in process: rounds of the same clients keep graph and agreed keys; masks are new."""


class EarlyStopping(Settings):
    """``[evaluate.early_stopping]``: when a run ends before its last round."""

    metric: str = "loss"
    """Which metric is watched."""
    patience: Count = 5
    """Evaluations in a row without an improvement, after which the run is finished."""
    min_delta: NonNegative = 0.0
    """Less than this is no improvement."""
    better: Literal["lower", "higher"] | None = None
    """``None``: lower for loss, perplexity and error, higher for everything else."""


class Attack(Open):
    """``[attack]``: simulated adversaries; a run with real sites is refused."""

    kind: str = "none"
    """Name of an attack, or ``module:object``; further keys are its own. ``none``: all are honest.
    """
    count: Count | None = None
    """How many clients are hostile; which ones follows from the seed."""
    fraction: Share | None = None
    """The same as a share of all clients."""
    join: bool = False
    """Hostile clients come besides those that hold data, and hold none; for attacks that train
    nothing."""

    @pydantic.model_validator(mode="after")
    def _how_many(self) -> Attack:
        if self.kind == "none":
            if self.model_fields_set - {"kind"} and (self.parameters() or self.count):
                raise ValueError("keys without a kind; set kind, see umbel list attacks")
        elif (self.count is None) == (self.fraction is None):
            raise ValueError("one of count and fraction says how many are hostile; set count = 1")
        return self


class Evaluate(Settings):
    """``[evaluate]``: how often, and what."""

    every: Natural = 1
    """Rounds between evaluations; the last round is always evaluated. 0: only the last."""
    metrics: tuple[str, ...] | None = Field(None, strict=False)
    """Which of the task's metrics to report; ``None``: all."""
    per_client: bool | None = None
    """Each client's own figures; ``None``: where clients have test parts and are at most 100."""
    fine_tune_steps: Natural = 0
    """Also the figures of each client after so many local steps from the global model, which are
    never fed back; 0: no such figures."""
    early_stopping: EarlyStopping | None = None
    """``None``: the run makes all its rounds."""


class Sought(Settings):
    """``[tune.space."section.key"]``: where a value is looked for."""

    low: int | float | None = None
    """A number, at least. Whole numbers as bounds give whole numbers."""
    high: int | float | None = None
    """A number, at most."""
    log: bool = False
    """A number whose logarithm is drawn evenly: for rates over several powers of ten."""
    step: Count | Positive | None = None
    """A number: only ``low`` and whole steps from it."""
    choices: tuple[bool | int | float | str, ...] | None = Field(None, min_length=1, strict=False)
    """Anything else: the values that are tried."""

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> Sought:
        if self.choices is not None:
            if self.model_fields_set != {"choices"}:
                raise ValueError("choices and bounds exclude each other; remove one")
            return self
        if self.low is None or self.high is None:
            raise ValueError("nothing to choose from; give low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}; swap them")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0 and no step; remove one of them")
        return self


class Tune(Settings):
    """``[tune]``: what ``umbel tune`` looks for, and how long. Runs themselves ignore it."""

    space: dict[str, Sought] = Field(default_factory=dict)
    """``"client.lr" = { low = 0.001, high = 1.0, log = true }``, ``"strategy.name" = { choices =
    ["fedavg", "fedadam"] }``: keys of the run file as for ``--set``, quoted."""
    trials: Count = 20
    """Runs, in all; pruned ones count."""
    metric: str = "loss"
    """Which metric of the last evaluated round decides."""
    better: Literal["lower", "higher"] | None = None
    """``None``: lower for loss, perplexity and error, higher for everything else."""
    prune: bool = True
    """Whether a trial ends that is worse than the median of the earlier ones at the same round."""
    prune_after: Natural = 3
    """Rounds that no trial is ended before."""

    @pydantic.field_validator("space", mode="before")
    @classmethod
    def _place_by_place(cls, space: Any) -> Any:
        if not isinstance(space, Mapping):
            return space
        for key, value in space.items():
            if key.count(".") < 1:
                raise ValueError(f"'{key}' is not section.key; write \"client.{key}\"")
            if isinstance(value, Mapping):
                parse(Sought, value, f'[tune.space."{key}"]')
        return space


class RunFile(Settings):
    """A whole run file."""

    run: Run = Run()
    data: Data
    task: Task
    client: Client = Client()
    strategy: Strategy = Strategy()
    continual: Continual = Continual()
    privacy: Privacy = Privacy()
    secure_aggregation: SecureAggregation = SecureAggregation()
    attack: Attack = Attack()
    evaluate: Evaluate = Evaluate()
    tune: Tune = Tune()

    def own_parts(self) -> list[str]:
        """The parts that are the user's own code, ``module:object``, not Umbel's."""
        model = self.task.model
        split = self.data.split
        adapter = self.task.adapter
        names = [self.data.name, self.task.kind, self.strategy.name]
        names += [adapter.kind if isinstance(adapter, Adapter) else adapter or ""]
        names += [] if split is None else [split.kind]
        defence = self.continual.defence
        names += [defence if isinstance(defence, str) else defence.name]
        names += [] if model is None else [model if isinstance(model, str) else model.name]
        return [name for name in names if ":" in name]

    def files(self) -> list[str]:
        """What is read from this machine besides the data: a model, a tokenizer, earlier runs."""
        model, given = self.task.model, self.task.init_from or ()
        paths = [given] if isinstance(given, str) else list(given)
        paths += [model.parameters().get("path", "")] if isinstance(model, Part) else []
        paths += [self.data.parameters().get("tokenizer", "")]
        return [str(path) for path in paths if path not in ("", None, *TOKENIZERS)]

    @property
    def round_length(self) -> tuple[int | None, int | None]:
        """(local_epochs, local_steps), one of them set; one epoch where neither is."""
        c = self.client
        return (c.local_epochs or 1, None) if c.local_steps is None else (None, c.local_steps)


TOKENIZERS = ("bytes", "characters")
"""Those that need no file."""


def resolve(table: Mapping[str, Any], where: str = "run file") -> RunFile:
    """A run file from its tables.

    Raises:
        InputError: an unknown table or key, a wrong type, a number out of bounds, a missing key.
    """
    for name, value in table.items():
        if name not in RunFile.model_fields and not isinstance(value, Mapping):
            owners = [t for t, f in RunFile.model_fields.items() if name in _keys(f.annotation)]
            fix = f"write it below [{owners[0]}]" if owners else "write it below its [table]"
            raise InputError(f"key '{name}' stands outside any table", where=where, fix=fix)
        if name not in RunFile.model_fields:
            fix = suggest(name, RunFile.model_fields)
            raise InputError(f"unknown table [{name}]", where=where, fix=fix)
        if not isinstance(value, Mapping):
            raise InputError(
                f"{name} = {value!r} is not a table", where=where, fix=f"write [{name}]"
            )
        field = RunFile.model_fields[name].annotation
        assert isinstance(field, type)
        parse(field, value, f"[{name}]")  # by table first, so that the place is exact
    for name in ("data", "task"):
        if name not in table:
            raise InputError(f"table [{name}] is missing", where=where, fix=f"add [{name}]")
    checked: RunFile = parse(RunFile, _equal_clients(table), where)
    return checked


def _equal_clients(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where clients are hidden, they weigh the same unless the run file says otherwise."""
    strategy = table.get("strategy", {})
    if table.get("privacy", {}).get("unit") != "client" or strategy.keys() & {
        "weights",
        "max_weight",
    }:
        return table
    return {**table, "strategy": {**strategy, "weights": "uniform"}}


def _keys(section: Any) -> Collection[str]:
    fields: Collection[str] = section.model_fields
    return fields


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """The run file at ``path`` with ``--set`` overrides (``client.lr=0.1``) applied.

    Raises:
        InputError: no such file, not TOML, or as :func:`resolve`.
    """
    return resolve(read(path, overrides), str(path))


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of the run file at ``path``, with overrides applied, unchecked.

    Raises:
        InputError: no such file, or not TOML.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "check the path of the run file"
        raise InputError(f"cannot read the run file: {reason}", where=str(path), fix=fix) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not TOML: {error}", where=str(path), fix="mend that line") from None
    return overridden(table, overrides)


def overridden(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``table`` with ``section.key=value`` overrides applied, in place.

    Raises:
        InputError: an override is not of that form, or goes below a value that is no table.
    """
    for override in overrides:
        _override(table, override)
    return table


def _override(table: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = [k.strip() for k in path.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        raise InputError(
            f"'{override}' is not section.key=value", where="--set", fix="e.g. --set client.lr=0.1"
        )
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string: --set strategy.name=fedadam
    put(table, keys, value, f"--set {override}")


def put(table: dict[str, Any], keys: Sequence[str], value: Any, where: str) -> None:
    """Sets the key below its tables, in place.

    Raises:
        InputError: it would be below a value that is no table.
    """
    place = table
    for k in keys[:-1]:
        below = place.setdefault(k, {})
        if isinstance(below, str):  # model = "mlp" and --set task.model.hidden=[8]
            below = place[k] = {"name": below}
        if not isinstance(below, dict):
            raise InputError(f"'{k}' is not a table", where=where, fix="drop a level")
        place = below
    place[keys[-1]] = value
