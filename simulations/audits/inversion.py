"""Whose pictures can be read off an update: alone, in a secure sum, and with privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.core.trees import Tree, map_tree, subtract
from umbel.datasets.federated import take
from umbel.privacy.audits import inversion
from umbel.privacy.audits.images import psnr, ssim
from umbel.simulations.audits.trained import data, sections, trained
from umbel.simulations.prepare import Prepared, prepare
from umbel.tasks.evaluate import tensor_of

F64: TypeAlias = npt.NDArray[np.float64]
Attack: TypeAlias = Literal["auto", "linear", "matching", "dlg"]

DEFAULT_PRIVACY = {"unit": "example", "clip_norm": 1.0, "noise_multiplier": 1.0}
"""What the last column shows where the run has no [privacy]."""

WHERE = "umbel audit inversion"


class Column(NamedTuple):
    """What one kind of update gives away.

    Args:
        name: of the update.
        pictures: (images, channels, height, width) in [0, 1]: the best candidate for each.
        psnr: (images,), dB.
        ssim: (images,).
    """

    name: str
    pictures: F64
    psnr: list[float]
    ssim: list[float]


@dataclass(frozen=True)
class Inversion:
    """What was attacked and what came out.

    Args:
        attack: which.
        originals: (images, channels, height, width).
        columns: plain update, secure sum, with privacy, and the two floors.
        clients: in the sum.
        privacy: what the last update was protected by.
    """

    attack: str
    originals: F64
    columns: list[Column]
    clients: int
    privacy: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The findings as plain values."""
        return {
            "attack": self.attack,
            "images": len(self.originals),
            "clients": self.clients,
            "privacy": self.privacy,
            "columns": {
                c.name: {"psnr": float(np.mean(c.psnr)), "ssim": float(np.mean(c.ssim))}
                for c in self.columns
            },
        }


def invert(
    run: RunFile,
    *,
    images: int = 6,
    clients: int = 20,
    attack: Attack = "auto",
    steps: int = 300,
) -> Inversion:
    """Attacks the updates of clients that hold one example and take one step.

    Each update comes from a run of its own, through the client, the secure sum and the private step
    that any run has; the attacker sees the change of the global model. He knows the labels, and of
    several candidates the best one counts: an upper bound on what he can have.

    Args:
        run: its data, model, learning rate and ``[privacy]`` are taken; without the last, the one
            of :data:`DEFAULT_PRIVACY`.
        images: how many examples are attacked.
        clients: in the secure sum, the attacked ones among them.
        attack: ``linear`` reads the first layer off; ``matching`` and ``dlg`` search for inputs
            with the same gradient; ``auto``: the first where there is such a layer.
        steps: of a search.

    Raises:
        InputError: the data are not pictures, there are too few, or the model has no linear layer
            at its input for ``linear``.
    """
    prepared = prepare(run)
    shape = prepared.data.info.input_shape
    total = len(prepared.data.train_holdings.index)
    if len(shape) != 3 or not 1 <= images <= clients <= total or clients < 3:
        raise InputError(
            f"{images} images of {clients} clients, examples of shape {shape}, {total} of them",
            where=WHERE,
            fix="use pictures (channels, height, width) and 3 clients or more",
        )
    layer = _first_linear(prepared.module, int(np.prod(shape)))
    if attack == "auto":
        attack = "matching" if layer is None else "linear"
    if attack == "linear" and layer is None:
        raise InputError(
            "the first layer is not linear with a bias", where=WHERE, fix="use --attack matching"
        )
    stream = randomness.key(run.run.seed, "audit pictures")
    rows = randomness.permutation(stream, total)[:clients].tolist()
    batch = take(prepared.data.train, prepared.data.train_holdings.index[np.array(rows)])
    low, high = float(prepared.data.train["x"].min()), float(prepared.data.train["x"].max())
    originals = _scaled(batch["x"][:images].astype(float), low, high)
    privacy = DEFAULT_PRIVACY
    if run.privacy.unit != "none":
        privacy = run.privacy.model_dump(exclude_none=True)
    reader = _Reader(prepared, layer, attack, steps, {n: tensor_of(c) for n, c in batch.items()})

    def alone(section: dict[str, Any]) -> F64:
        found = [
            reader.best(_gradient(run, prepared, [rows[i]], privacy=section), [i], [i])
            for i in range(images)
        ]
        return np.concatenate(found)

    def together(**protection: dict[str, Any]) -> F64:
        gradient = _gradient(run, prepared, rows, **protection)
        return reader.best(gradient, list(range(clients)), list(range(images)))

    client_level = privacy["unit"] == "client"  # what is protected is the sum
    noisy = together(privacy=privacy) if client_level else alone(privacy)
    drawn = randomness.generator(run.run.seed, "audit floor")
    mean = _scaled(prepared.data.train["x"].mean(0, keepdims=True).astype(float), low, high)
    pictures = {
        "plain update": _scaled(alone({"unit": "none"}), low, high),
        f"secure sum of {clients}": _scaled(
            together(secure_aggregation={"enabled": True}), low, high
        ),
        "with privacy": _scaled(noisy, low, high),
        "floor: data-set mean": np.repeat(mean, images, 0),
        "floor: random": drawn.random(originals.shape),
    }
    columns = [
        Column(
            name,
            found,
            [min(psnr(o, f), 99.0) for o, f in zip(originals, found, strict=True)],
            [ssim(o, f) for o, f in zip(originals, found, strict=True)],
        )
        for name, found in pictures.items()
    ]
    return Inversion(attack, originals, columns, clients, privacy)


def _gradient(
    run: RunFile, prepared: Prepared, rows: list[int], **protection: dict[str, Any]
) -> Tree:
    """The mean gradient of clients that hold one example each, as the server can work it out."""
    lr = run.client.lr
    tables = {
        **sections(run, "task"),
        "run": {"seed": run.run.seed, "rounds": 1, "processes": 0, "engine_plan": "lean"},
        "data": data(run, "picked", rows=rows),
        "client": {"lr": lr, "batch_size": "full", "local_steps": 1},
        "strategy": {"name": "fedavg", "weights": "uniform"},
        "evaluate": {"every": 0, "per_client": False},
        **protection,
    }
    final, _ = trained(tables)
    initial = prepared.model().params
    change = subtract({name: final[name] for name in initial}, initial)
    return map_tree(lambda t: -t / lr, change)


def _first_linear(module: nn.Module, inputs: int) -> str | None:
    """The name of a linear layer with a bias that sees the whole input before any other layer."""
    for name, layer in module.named_modules():
        if not list(layer.parameters(recurse=False)):
            continue
        whole = isinstance(layer, nn.Linear) and layer.bias is not None
        return name if whole and layer.in_features == inputs else None
    return None


class _Reader:
    """Attacks gradients; of several candidates for an example the nearest counts."""

    def __init__(
        self,
        prepared: Prepared,
        layer: str | None,
        attack: str,
        steps: int,
        batch: dict[str, Tensor],
    ) -> None:
        self._task, self._module = prepared.task, prepared.module
        self._layer, self._attack, self._steps, self._batch = layer, attack, steps, batch

    def best(self, gradient: Tree, held: list[int], places: list[int]) -> F64:
        """The candidates nearest to the examples at ``places``, (places, *shape).

        Args:
            gradient: of the examples at ``held``.
        """
        found = self._candidates(gradient, held)
        wanted = self._batch["x"][places].double().flatten(1)
        if not len(found):
            found = torch.zeros(1, *self._batch["x"].shape[1:])
        flat = found.double().flatten(1).nan_to_num(0.0)
        nearest = torch.cdist(wanted, flat).argmin(1)
        chosen: F64 = found[nearest].double().numpy()
        return chosen

    def _candidates(self, gradient: Tree, held: list[int]) -> Tensor:
        x = self._batch["x"][held]
        if self._attack == "linear":
            prefix = f"{self._layer}." if self._layer else ""
            read = inversion.linear_inputs(gradient[f"{prefix}weight"], gradient[f"{prefix}bias"])
            return read.view(-1, *x.shape[1:])
        others = {n: c[held] for n, c in self._batch.items() if n != "x"}
        params = {n: p.detach().requires_grad_() for n, p in self._module.named_parameters()}

        def of(x: Tensor) -> Tree:
            def forward(*inputs: Tensor) -> Tensor:
                output: Tensor = functional_call(self._module, params, inputs)
                return output

            loss = self._task.losses(forward, {"x": x, **others}).mean()
            found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            return dict(zip(params, found, strict=True))

        target = {name: gradient[name].float() for name in params}
        if self._attack == "dlg":
            return inversion.leaked_inputs(of, target, tuple(x.shape), steps=self._steps // 5)
        return inversion.matched_inputs(of, target, tuple(x.shape), steps=self._steps)


def _scaled(pictures: F64, low: float, high: float) -> F64:
    """Pictures with values from ``low`` to ``high``, as values in [0, 1]; NaN is black."""
    found: F64 = np.clip(np.nan_to_num((pictures - low) / ((high - low) or 1.0)), 0, 1)
    return found
