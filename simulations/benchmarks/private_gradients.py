"""What the gradient of a step of DP-SGD costs, against plain SGD and Opacus.

    umbel bench private_gradients [--runs 15] [--batch 64]

One process, one batch, all systems in turn, so that whatever else the machine does hits all alike;
medians. A private gradient here is forward, backward, norms, clip and sum: no noise, which costs
the same whoever adds it and stands in a line of its own. Opacus is measured where it is installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

RUNS, BATCH = 15, 64

GOALS = {"mlp": 2.2, "mnist-cnn": 1.5, "cnn-100k": 1.5, "transformer": 1.5}
"""The most that ours may take, in plain steps."""


class Case(NamedTuple):
    """A model, with a batch for it."""

    name: str
    module: Any
    x: Any
    classes: int


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="umbel bench private_gradients")
    found.add_argument("--runs", type=int, default=RUNS)
    found.add_argument("--batch", type=int, default=BATCH)
    found.add_argument("--threads", type=int, default=0, help="of torch; 0: as it is")
    found.add_argument("--compiled", action="store_true", help="torch.compile of vmap as well")
    return found


def cases(batch: int) -> list[Case]:
    """The four models of the table, all from seed 0."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
            self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shape = (x.shape[0], x.shape[1], 4, -1)
            parts = [p.reshape(shape).transpose(1, 2) for p in self.mix(self.first(x)).chunk(3, -1)]
            mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape)
            x = x + self.out(mixed)
            down: torch.Tensor = self.down(F.gelu(self.up(self.second(x))))
            return x + down

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(256, 64)
            self.blocks = nn.Sequential(Block(64), Block(64))
            self.head = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(self.blocks(self.table(x)).mean(1))
            return found

    torch.manual_seed(0)
    images, photographs = torch.randn(batch, 1, 28, 28), torch.randn(batch, 3, 32, 32)
    mlp = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(),
        nn.Linear(200, 10),
    )  # fmt: skip
    small = nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    large = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1024, 40), nn.ReLU(), nn.Linear(40, 10),
    )  # fmt: skip
    return [
        Case("mlp", mlp, images, 10),
        Case("mnist-cnn", small, images, 10),
        Case("cnn-100k", large, photographs, 10),
        Case("transformer", Transformer(), torch.randint(0, 256, (batch, 32)), 10),
    ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The table as values: model -> system -> milliseconds, and ours over plain."""
    import torch

    from umbel.core.versions import versions

    # Opacus's hooks warn in every step.
    warnings.filterwarnings("ignore", module=r"torch|opacus")
    warnings.filterwarnings("ignore", message="Full backward hook")
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = {}
    for case in cases(options.batch):
        systems = _systems(case, options)
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for step in systems.values():
            step()
        for _ in range(options.runs):
            for name, step in systems.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
        ratios = {
            name: statistics.median(
                own / plain for own, plain in zip(found, seconds["plain"], strict=True)
            )
            for name, found in seconds.items()
        }
        rows[case.name] = {
            "parameters": sum(p.numel() for p in case.module.parameters()),
            "milliseconds": {name: round(value, 3) for name, value in medians.items()},
            "times_plain": {name: round(value, 2) for name, value in ratios.items()},
            "goal": GOALS[case.name],
            "met": ratios["umbel"] <= GOALS[case.name],
        }
    return {
        "batch": options.batch,
        "runs": options.runs,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": versions(),
        "models": rows,
    }


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    print(
        f"batch {result['batch']}, {result['threads']} thread(s), load {result['load']:.1f}, "
        f"medians of {result['runs']}; times the plain step"
    )
    for name, row in result["models"].items():
        plain = row["milliseconds"]["plain"]
        others = "  ".join(f"{n} {v:.2f}" for n, v in row["times_plain"].items() if n != "plain")
        met = "met" if row["met"] else "MISSED"
        print(f"{name:12} {row['parameters']:>8,} parameters  plain {plain:.2f} ms  {others}")
        print(f"{'':12} goal for umbel: {row['goal']:.1f}, {met}")


def _systems(case: Case, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    import copy

    import torch
    from torch.nn import functional as F

    from umbel.privacy.per_example.choose import choose
    from umbel.privacy.per_example.clipped import Bounds
    from umbel.privacy.per_example.functional import Vmapped

    batch = {"x": case.x, "y": torch.randint(0, case.classes, (len(case.x),))}

    def losses(forward: Any, given: Any) -> torch.Tensor:
        return F.cross_entropy(forward(given["x"]), given["y"], reduction="none")

    module = copy.deepcopy(case.module).train()
    params = list(module.parameters())

    def plain() -> object:
        return torch.autograd.grad(losses(module, batch).mean(), params)

    own = copy.deepcopy(module)
    bounds = Bounds(1.0)
    _, method, _ = choose(own, losses, batch, bounds)
    vmapped = Vmapped(copy.deepcopy(module), losses)
    systems: dict[str, Callable[[], object]] = {
        "plain": plain,
        "umbel": lambda: method(batch, bounds),
        "vmap": lambda: vmapped(batch, bounds),
    }
    if options.compiled:
        fast = torch.compile(lambda: vmapped(batch, bounds))
        try:
            fast()
        except Exception as error:  # no compiler here, or a model that it does not take
            print(f"note: vmap is not compiled here ({type(error).__name__})")
        else:
            systems["vmap-compiled"] = fast
    return systems | _opacus(module, losses, batch)


def _opacus(module: Any, losses: Any, batch: Any) -> dict[str, Callable[[], object]]:
    """Opacus's three ways, where it is installed."""
    import copy

    import torch

    try:
        from opacus.grad_sample import (  # type: ignore[import-untyped]
            GradSampleModule,
        )
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (  # type: ignore[import-untyped]
            GradSampleModuleFastGradientClipping,
        )
    except ImportError:
        return {}

    def by_samples(force_functorch: bool) -> Callable[[], object]:
        wrapped = GradSampleModule(
            copy.deepcopy(module), loss_reduction="sum", force_functorch=force_functorch
        )

        def step() -> object:
            losses(wrapped, batch).sum().backward()
            found = [p.grad_sample for p in wrapped.parameters()]
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in found]).norm(dim=0)
            factors = (1.0 / (norms + 1e-6)).clamp(max=1.0)
            total = [torch.einsum("b,b...->...", factors, g) for g in found]
            wrapped.zero_grad()
            return total

        return step

    def ghost() -> Callable[[], object]:
        wrapped = GradSampleModuleFastGradientClipping(
            copy.deepcopy(module), loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
        )

        def step() -> object:
            found = losses(wrapped, batch)
            found.sum().backward(retain_graph=True)
            factors = wrapped.get_clipping_coef()
            wrapped.zero_grad()
            wrapped.disable_hooks()
            (factors * found).sum().backward()
            wrapped.enable_hooks()
            wrapped.zero_grad()
            return None

        return step

    systems: dict[str, Callable[[], object]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in (
            ("opacus-hooks", lambda: by_samples(False)),
            ("opacus-functorch", lambda: by_samples(True)),
            ("opacus-ghost", ghost),
        ):
            try:
                step = make()  # type: ignore[no-untyped-call]
                step()
            except Exception as error:  # a mode that does not take this model is left out
                print(f"note: {name} does not take this model ({type(error).__name__})")
                continue
            systems[name] = step
    return systems


def main() -> None:
    """From the command line."""
    show(measure(parser().parse_args()))


if __name__ == "__main__":
    main()
