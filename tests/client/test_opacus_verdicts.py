"""Opacus as the reference: what it refuses, and what its three modes compute without noise."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.client.private_model import check_model
from umbel.core import run_file
from umbel.core.errors import InputError
from umbel.privacy.per_example.choose import choose
from umbel.privacy.per_example.clipped import Bounds
from umbel.tasks.task import Batch, Forward, Task

RUN = run_file.resolve(
    {
        "data": {"name": "digits"},
        "task": {"kind": "classification"},
        "privacy": {"unit": "example", "noise_multiplier": 1.0},
    }
)
SIZE = 5


def losses(forward: Forward, batch: Batch) -> Tensor:
    return F.cross_entropy(forward(batch["x"]), batch["y"], reduction="none")


class First(nn.Module):
    """The output of a module that gives more than one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(
            *(3 * [x] if isinstance(self.module, nn.MultiheadAttention) else [x])
        )[0]
        return out


VECTOR, LINE, PICTURE, SOLID = (8,), (4, 6), (4, 5, 5), (4, 3, 3, 3)
SAME, STRICTER, LAXER = "same", "stricter", "laxer"

TABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool, str]] = {
    # name: module, shape of an example, whether we take it, and how Opacus is beside us
    "linear": (lambda: nn.Linear(8, 8), VECTOR, True, SAME),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), LINE, True, SAME),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3), PICTURE, True, SAME),
    "conv3d": (lambda: nn.Conv3d(4, 4, 2), SOLID, True, SAME),
    "group norm": (lambda: nn.GroupNorm(2, 4), PICTURE, True, SAME),
    "layer norm": (lambda: nn.LayerNorm(8), VECTOR, True, SAME),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), PICTURE, True, SAME),
    "dropout": (lambda: nn.Dropout(0.5), VECTOR, True, SAME),
    "batch norm 1d": (lambda: nn.BatchNorm1d(8), VECTOR, False, SAME),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), PICTURE, False, SAME),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), SOLID, False, SAME),
    "synchronised": (lambda: nn.SyncBatchNorm(4), PICTURE, False, SAME),
    "running statistics": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        PICTURE,
        False,
        SAME,
    ),
    # Opacus looks at modules with something to train alone; these leak all the same.
    "batch norm without weights": (lambda: nn.BatchNorm2d(4, affine=False), PICTURE, False, LAXER),
    "running statistics alone": (
        lambda: nn.InstanceNorm2d(4, track_running_stats=True),
        PICTURE,
        False,
        LAXER,
    ),
    # Its hooks know no gradient of these; nothing stands against them where gradients are had
    # otherwise.
    "lstm": (lambda: First(nn.LSTM(6, 4, batch_first=True)), LINE, True, STRICTER),
    "gru": (lambda: First(nn.GRU(6, 4, batch_first=True)), LINE, True, STRICTER),
    "attention": (
        lambda: First(nn.MultiheadAttention(6, 2, batch_first=True)),
        LINE,
        True,
        STRICTER,
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_verdicts_are_those_of_opacus_or_argued(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.validators import ModuleValidator
    build, shape, allowed, opacus = TABLE[name]
    torch.manual_seed(0)
    module = nn.Sequential(build(), nn.Flatten()).train()
    batch = {"x": torch.randn(SIZE, *shape), "y": torch.arange(SIZE) % 3}
    with torch.no_grad():
        width = copy.deepcopy(module).eval()(batch["x"]).shape[1]
    module.append(nn.Linear(width, 3))
    theirs = not ModuleValidator.validate(module, strict=False)
    assert theirs == {SAME: allowed, STRICTER: False, LAXER: True}[opacus]
    task = Task(lambda: module, losses, lambda forward, batch: {}, True)
    if allowed:
        check_model(RUN, task, module, batch)
        return
    with pytest.raises(InputError, match="cannot be trained privately") as refusal:
        check_model(RUN, task, module, batch)
    assert "GroupNorm" in refusal.value.fix


def hooked(module: nn.Module, batch: Batch, bound: float, functorch: bool) -> dict[str, Tensor]:
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(module, loss_reduction="sum", force_functorch=functorch)
    losses(wrapped, batch).sum().backward()
    found = {n.removeprefix("_module."): p.grad_sample for n, p in wrapped.named_parameters()}
    norms = torch.cat([g.flatten(1) for g in found.values()], 1).norm(dim=1)
    factors = (bound / (norms + 1e-6)).clamp(max=1)
    return {n: torch.einsum("b,b...->...", factors, g) for n, g in found.items()}


def ghost(module: nn.Module, batch: Batch, bound: float) -> dict[str, Tensor]:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping,
    )

    wrapped = GradSampleModuleFastGradientClipping(
        module, loss_reduction="sum", max_grad_norm=bound, use_ghost_clipping=True
    )
    found = losses(wrapped, batch)
    found.sum().backward(retain_graph=True)
    factors = wrapped.get_clipping_coef()
    wrapped.zero_grad()
    wrapped.disable_hooks()
    (factors * found).sum().backward()
    return {n.removeprefix("_module."): p.grad for n, p in wrapped.named_parameters()}


MODES: dict[str, Callable[[nn.Module, Batch, float], dict[str, Tensor]]] = {
    "hooks": lambda *given: hooked(*given, functorch=False),
    "functorch": lambda *given: hooked(*given, functorch=True),
    "ghost": ghost,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bound", [0.2, 1e3])
def test_without_noise_the_sum_is_that_of_each_mode_of_opacus(mode: str, bound: float) -> None:
    torch.manual_seed(2)
    module: Any = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )
    batch = {"x": torch.randn(SIZE, 1, 8, 8), "y": torch.arange(SIZE) % 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = MODES[mode](copy.deepcopy(module), batch, bound)
    found = choose(module, losses, batch, Bounds(bound))[1](batch, Bounds(bound)).total
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=2e-6), name
