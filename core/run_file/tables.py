"""The tables of every run: data, task, client, strategy, evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from umbel.core.settings import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Settings,
    Share,
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


class Curriculum(Settings):
    """``[task.curriculum]``: each round trains on the examples that the model finds easiest."""

    start: Share = 0.3
    """The share of a client's examples that the first round trains on; with classes, of each class.
    1: all, and no curriculum."""
    full: Share = 0.5
    """The share of the rounds from which on all examples are trained on."""
    pace: Literal["linear", "root", "exponential"] = "linear"
    """How the share grows with the rounds: itself, its square, or its logarithm evenly."""
    order: Literal["easy", "hard"] = "easy"
    """Which come first: those of small loss, or of large."""


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
    curriculum: Curriculum | None = None
    """``None``: every round trains on all examples."""


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
    compile: bool = False
    """Whether these are compiled by torch, which takes a C++ compiler and some time at the start;
    not gradients of single examples. A simulation compiles where its trial finds that it pays."""

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
