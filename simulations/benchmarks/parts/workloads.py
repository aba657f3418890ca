"""What is computed: the two workloads, their files, their FLOPs and the floor they stand on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # torch takes seconds to load, and a --help needs none of it
    from torch import Tensor, nn

    from umbel.tasks.task import Batch, Task


class Workload(NamedTuple):
    """One column of figures.

    Args:
        name: how the command line calls it.
        title: what it is, in a line.
        model: ``[task] model`` of the run file.
        shape: of one example.
        clients: how many there are.
        examples: of each client.
        cohort: clients a round.
        batch: examples a step.
        epochs: passes over a client's examples a round, or
        steps: how many steps instead.
        lr: of plain SGD.
        rounds: of one repetition.
        signal: how far the means of the ten classes lie apart; the noise is 1.
        kind: ``[task] kind``.
        adapter: ``[task] adapter``, if only that is trained.
        vocabulary: examples are symbols 0 … vocabulary - 1, each to be predicted from those before.
    """

    name: str
    title: str
    model: dict[str, Any]
    shape: tuple[int, ...]
    clients: int
    examples: int
    cohort: int
    batch: int
    epochs: int | None
    steps: int | None
    lr: float
    rounds: int
    signal: float
    kind: str = "classification"
    adapter: dict[str, Any] | None = None
    vocabulary: int | None = None

    def classes(self) -> int:
        """How many outputs there are to choose from."""
        return self.vocabulary or 10


CNN = {"name": "cnn", "channels": [16, 32], "kernel": 3, "hidden": 40}
LOGISTIC = {"name": "logistic"}
W1 = Workload(
    "W1",
    "1 000 clients of 50 images 28 x 28, cohort 100, one epoch, batch 10, SGD 0.05, CNN",
    CNN, (1, 28, 28), 1000, 50, 100, 10, 1, None, 0.05, 6, 1.0,
)  # fmt: skip
W2 = Workload(
    "W2",
    "100 clients, all in each round, one step of 10, logistic regression 64 to 10",
    LOGISTIC, (64,), 100, 50, 100, 10, None, 1, 0.05, 40, 0.3,
)  # fmt: skip
WORKLOADS = {"W1": W1, "W2": W2}
RESNET18 = {"name": "resnet", "channels": [64, 128, 256, 512], "blocks": 2, "groups": 32}
GPT20M = {"name": "gpt", "layers": 6, "width": 512, "heads": 8}
CIFAR = Workload(
    "CIFAR",
    "500 clients of 100 images 32 x 32 x 3, cohort 50, one epoch, batch 20, ResNet-18, GroupNorm",
    RESNET18, (3, 32, 32), 500, 100, 50, 20, 1, None, 0.05, 4, 1.0,
)  # fmt: skip
LORA = Workload(
    "LORA",
    "320 clients of 32 texts of 128 symbols, cohort 32, one epoch, batch 8, GPT of 20M, LoRA",
    GPT20M, (128,), 320, 32, 32, 8, 1, None, 0.05, 4, 1.0,
    "language-model", {"kind": "lora", "rank": 8}, 1024,
)  # fmt: skip
W1_1000 = W1._replace(
    name="W1-1000",
    title="W1 with a cohort of 1 000",
    cohort=1000,
)
GPU = {"W1": W1, "W1-1000": W1_1000, "CIFAR": CIFAR, "LORA": LORA}
"""What is measured on a GPU, where W2 would measure the starting of kernels alone."""


class Files(NamedTuple):
    """A workload on disk, the same for every system.

    Args:
        data: .npz with x, y and client.
        init: .npz with the initial parameters.
        run_file: of Umbel.
        scored: .npz with the examples that the final models are compared on.
        model: the model of a step's batch, as ``torch.export`` saves it, for programs that do not
            write it themselves.
    """

    data: Path
    init: Path
    run_file: Path
    scored: Path
    model: Path


WRITTEN = ("cnn", "logistic")
"""Models that the programs beside Umbel's write themselves."""

SCORED = 10_000
"""Examples, at most, that the final models are compared on."""


def write(workload: Workload, folder: Path) -> Files:
    """Writes data, run file and initial parameters, all from seed 0.

    The initial parameters are those that Umbel draws; every other system is given them.
    """
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    count = workload.clients * workload.examples
    y = draw.integers(0, workload.classes(), count)
    if workload.vocabulary:
        x = _texts(workload, y, draw)
    else:
        x = draw.standard_normal((count, *workload.shape), dtype=np.float32)
        means = workload.signal * draw.standard_normal((10, *workload.shape), dtype=np.float32)
        for start in range(0, count, 65536):
            x[start : start + 65536] += means[y[start : start + 65536]]
    names = ("data.npz", "init.npz", "run.toml", "scored.npz", "model.pt2")
    files = Files(*(folder / name for name in names))
    # A million names a row would be most of the file; such a federation is dealt out instead.
    natural = workload.clients <= 10_000
    columns: dict[str, Any] = {"x": x, "y": y}
    if natural:
        columns["client"] = np.repeat(np.arange(workload.clients), workload.examples)
    np.savez(files.data, **columns)
    scored = SCORED // 20 if workload.vocabulary else SCORED
    np.savez(files.scored, x=x[:scored], y=y[:scored])
    files.run_file.write_text(run_file(workload, files.data, natural), encoding="utf-8")
    model = module(workload)
    params = model.state_dict()
    np.savez(files.init, **{name: value.numpy() for name, value in params.items()})
    if workload.model["name"] not in WRITTEN:
        import torch

        torch.export.save(torch.export.export(model, (_inputs(workload),)), files.model)
    return files


def _texts(workload: Workload, y: Any, draw: Any) -> Any:
    """Symbols that count down to the record's label; one in four is another."""
    import numpy as np

    length, symbols = workload.shape[0], workload.classes()
    x = (y[:, None] + np.arange(length, 0, -1)) % symbols
    return np.where(draw.random(x.shape) < 0.25, draw.integers(0, symbols, x.shape), x)


def _inputs(workload: Workload) -> Tensor:
    import torch

    kind = torch.long if workload.vocabulary else torch.float32
    return torch.zeros(workload.batch, *workload.shape, dtype=kind)


def run_file(workload: Workload, data: Path, natural: bool = True) -> str:
    """The run file that a user would write for this workload."""
    split = '"natural"' if natural else f'"iid", clients = {workload.clients}'
    length = "local_epochs" if workload.epochs else "local_steps"
    vocabulary = ""
    if workload.vocabulary:
        vocabulary = f"\nvocabulary = {workload.vocabulary}\nclasses = {workload.vocabulary}"
    adapter = f"\nadapter = {{ {_inline(workload.adapter)} }}" if workload.adapter else ""
    return f"""\
[run]
name = "bench-{workload.name}"
rounds = {workload.rounds}

[data]
name = "npz"
path = {json.dumps(str(data))}{vocabulary}
split = {{ kind = {split} }}
holdout = 0.0
client_holdout = 0.0

[task]
kind = "{workload.kind}"
model = {{ {_inline(workload.model)} }}{adapter}

[client]
lr = {workload.lr}
batch_size = {workload.batch}
{length} = {workload.epochs or workload.steps}

[strategy]
name = "fedavg"
cohort = {workload.cohort}

[evaluate]
every = 0
"""


def _inline(table: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items())


def _task(workload: Workload) -> Task:
    from umbel.core.run_file import Task as Section
    from umbel.datasets.federated import Info
    from umbel.tasks.build import build_task

    given = {"kind": workload.kind, "model": workload.model, "adapter": workload.adapter}
    section = Section.model_validate({key: value for key, value in given.items() if value})
    info = Info("bench", workload.shape, workload.classes(), vocabulary=workload.vocabulary)
    return build_task(section, info)


def module(workload: Workload) -> nn.Module:
    """The model with its initial parameters, as ``umbel simulate`` with seed 0 draws them."""
    from umbel.tasks.build import initial_module

    return initial_module(_task(workload), 0)


def final_loss(workload: Workload, files: Files, params: Path) -> float:
    """Mean loss over the first training examples, of the parameters in ``params``."""
    import numpy as np
    import torch

    task, model = _task(workload), module(workload)
    with np.load(params) as file:
        trained = {name: torch.from_numpy(file[name]) for name in file.files}
    odd = model.load_state_dict(trained, strict=workload.adapter is None)
    assert not odd.unexpected_keys, odd.unexpected_keys
    with np.load(files.scored) as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    total, size = 0.0, 50 if workload.adapter else 2000
    with torch.no_grad():
        for rows, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
            batch: Batch = {"x": rows, "y": labels}
            total += float(task.losses(model, batch).sum())
    return total / len(y)


def flops(workload: Workload) -> int:
    """Floating-point operations of the matrix products and convolutions of one round.

    Forward and backward, without a gradient for the input; what is no product (activations,
    pooling, bias, the SGD step, sums) is not counted, so that the floor is a floor.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    task, model = _task(workload), module(workload)
    with FlopCounterMode(display=False) as counter:
        labels = torch.zeros(workload.batch, dtype=torch.long)
        losses = task.losses(model, {"x": _inputs(workload), "y": labels})
        torch.autograd.backward(losses.mean())
    epochs = workload.epochs
    per_client = epochs * workload.examples if epochs else (workload.steps or 1) * workload.batch
    return int(counter.get_total_flops() * workload.cohort * per_client // workload.batch)


def sgemm_rate(side: int = 1536, tries: int = 12, device: str = "cpu") -> float:
    """This machine's FLOPs a second in float32 matrix products, the best of a few.

    On all cores, or on the card, whose tensor cores a program may use for float32 if it asks: here
    nobody does, as in torch's defaults.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    side = side if device == "cpu" else 4 * side
    a, b = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    best = min(_seconds(a, b) for _ in range(tries))
    torch.set_num_threads(before)
    return float(2 * side**3 / best)


def _seconds(a: Any, b: Any) -> float:
    start = time.perf_counter()
    (a @ b)[0, 0].item()  # waits for a card to finish
    return time.perf_counter() - start


COHORTS = (10, 30, 100, 300, 1000, 3000)
CLIENTS = (1_000, 10_000, 100_000, 1_000_000)


def sweep(axis: str, values: Sequence[int] | None = None) -> list[tuple[int, Workload]]:
    """The workloads of a sweep: W1 over cohorts, or a small W2 over numbers of clients.

    A million clients of 10 examples with 8 features each are 320 MB of data; the cohort is 100.
    """
    if axis == "cohort":
        return [(n, _cohort(n)) for n in values or COHORTS]
    return [(n, _clients(n)) for n in values or CLIENTS]


def _cohort(n: int) -> Workload:
    clients = max(1000, n)
    title = f"{clients} clients, cohort {n}; each 50 images 28 x 28, one epoch, batch 10, CNN"
    rounds = 2 if n >= 1000 else 3  # the first is not counted; the large ones are long enough
    return W1._replace(name=f"cohort-{n}", title=title, cohort=n, clients=clients, rounds=rounds)


def _clients(n: int) -> Workload:
    title = f"{n} clients, cohort 100; each one step of 10, logistic regression 8 to 10"
    return W2._replace(
        name=f"clients-{n}", title=title, clients=n, examples=10, shape=(8,), rounds=20
    )
