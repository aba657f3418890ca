"""The clipped sum of per-example gradients: three ways to the same numbers, and to Opacus's."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.trees import norm, subtract
from umbel.privacy.per_example.book_keeping import BookKeeping
from umbel.privacy.per_example.choose import choose
from umbel.privacy.per_example.clipped import Batch, Bounds, Forward, Unsupported, even
from umbel.privacy.per_example.functional import OneByOne, Vmapped
from umbel.simulations.benchmarks.private_gradients import cases

SIZE = 6


def losses(forward: Forward, batch: Batch) -> Tensor:
    return F.cross_entropy(forward(batch["x"]), batch["y"], reduction="none")


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, (3, 4), padding="same")
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=(0, 1), groups=2)
        self.last = nn.Linear(6 * 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return self.last(F.relu(self.second(x)).flatten(1))


def deep() -> nn.Module:
    """Its kernels outnumber its pixels: their gradients are never written down."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 4, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.mix, self.out = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.table(x))
        q, k, v = self.mix(x).chunk(3, -1)
        return self.head((x + self.out(F.scaled_dot_product_attention(q, k, v))).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 20), nn.ReLU(), nn.Linear(20, 3))


def images() -> Tensor:
    return torch.randn(SIZE, 1, 16, 16)


def words() -> Tensor:
    return torch.randint(0, 11, (SIZE, 7))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, images),
    "cnn with group norm": (Cnn, images),
    "cnn of few pixels": (deep, images),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 5), nn.Flatten(), nn.Linear(35, 3)),
        words,
    ),
    "transformer": (Attention, words),
}


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(3)
    build, examples = MODELS[name]
    return build(), {"x": examples(), "y": torch.randint(0, 3, (SIZE,))}


def opacus(module: nn.Module, batch: Batch, clip_norm: float) -> dict[str, Tensor]:
    """The clipped sum from Opacus's hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule

        hooked = GradSampleModule(copy.deepcopy(module), loss_reduction="sum")
        losses(hooked, batch).sum().backward()
    found = {n.removeprefix("_module."): p.grad_sample for n, p in hooked.named_parameters()}
    rows = torch.cat([g.flatten(1) for g in found.values()], 1)
    factors = (clip_norm / (rows.norm(dim=1) + 1e-6)).clamp(max=1)
    return {n: torch.einsum("b,b...->...", factors, g) for n, g in found.items()}


@pytest.mark.parametrize("clip_norm", [0.3, 1e4])
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_that_of_opacus_hooks(name: str, clip_norm: float) -> None:
    module, batch = made(name)
    truth = opacus(module, batch, clip_norm)
    chosen, method, _ = choose(module, losses, batch, Bounds(clip_norm))
    assert chosen == "book-keeping"
    for own in (method, Vmapped(module, losses), OneByOne(module, losses)):
        found = own(batch, Bounds(clip_norm)).total
        for parameter, value in truth.items():
            scale = max(1.0, float(value.abs().max()))
            assert float((found[parameter] - value).abs().max()) < 1e-6 * scale * 4, parameter


def test_every_model_of_the_cost_table_is_book_kept() -> None:
    for case in cases(SIZE):
        batch = {"x": case.x, "y": torch.randint(0, case.classes, (SIZE,))}
        _, _, refused = choose(case.module.train(), losses, batch, Bounds(1.0))
        assert not refused, case.name


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_clipped_apart(name: str) -> None:
    module, batch = made(name)
    names = [n for n, _ in module.named_parameters()]
    bounds = even(0.2, names)
    found = BookKeeping(module, losses)(batch, bounds).total
    truth = OneByOne(module, losses)(batch, bounds).total
    assert norm(subtract(found, truth)) < 1e-5
    each = 0.2 / math.sqrt(len(names))
    for value in found.values():
        assert float(value.norm()) <= SIZE * each


@pytest.mark.parametrize("way", [BookKeeping, Vmapped, OneByOne])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30, 0.0])
def test_one_example_moves_the_sum_by_the_clip_norm_at_most(
    way: type[BookKeeping], bad: float
) -> None:
    module, batch = made("cnn with group norm")
    method = way(module, losses)
    hostile = {**batch, "x": batch["x"].clone()}
    hostile["x"][2] = bad
    kept = torch.arange(SIZE) != 2
    without = method({n: c[kept] for n, c in batch.items()}, Bounds(0.5)).total
    for given in (batch, hostile):
        found = method(given, Bounds(0.5)).total
        assert all(bool(t.isfinite().all()) for t in found.values())
        assert float(norm(subtract(found, without))) <= 0.5 * (1 + 1e-6)


def test_all_examples_bad_is_nothing() -> None:
    module, batch = made("mlp")
    nothing = BookKeeping(module, losses)({**batch, "x": batch["x"] * math.nan}, Bounds(1.0))
    assert float(norm(nothing.total)) == 0
    assert nothing.short == 0


def test_what_book_keeping_does_not_know_is_computed_otherwise() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).mean(1))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.head = nn.Linear(256, 256), nn.Linear(256, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.same(self.same(x.flatten(1))))

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(256, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.head(x) + x.mean() * self.head.weight.sum(1)

    torch.manual_seed(0)
    labels = torch.randint(0, 3, (SIZE,))
    with pytest.raises(Unsupported, match="shared"):
        BookKeeping(Tied(), losses)
    for module, x in ((Tied(), words()), (Twice(), images())):
        batch = {"x": x, "y": labels}
        chosen, method, refused = choose(module, losses, batch, Bounds(1.0))
        assert (chosen, list(refused)) == ("vmap", ["book-keeping"])
        truth = OneByOne(module, losses)(batch, Bounds(1.0)).total
        assert norm(subtract(method(batch, Bounds(1.0)).total, truth)) < 1e-5
    batch = {"x": images(), "y": labels}
    assert choose(Beside(), losses, batch, Bounds(1.0))[0] != "book-keeping"


def test_what_opacus_gets_wrong_or_refuses_is_right() -> None:
    """Its hooks give the padding symbol a gradient, and refuse what rectifies in place."""
    torch.manual_seed(1)
    padded = nn.Sequential(nn.Embedding(11, 5, padding_idx=2), nn.Flatten(), nn.Linear(35, 3))
    in_place = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(True), nn.Flatten(), nn.Linear(784, 8), nn.ReLU(True), mlp()[3]
    )
    in_place[5] = nn.Linear(8, 3)
    for module, x in ((padded, words()), (in_place, images())):
        batch = {"x": x, "y": torch.randint(0, 3, (SIZE,))}
        chosen, method, _ = choose(module, losses, batch, Bounds(0.4))
        truth = OneByOne(module, losses)(batch, Bounds(0.4)).total
        assert chosen == "book-keeping"
        assert norm(subtract(method(batch, Bounds(0.4)).total, truth)) < 1e-6


def test_a_recurrent_model_goes_one_by_one_if_it_must() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.head = nn.LSTM(16, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.read(x[:, 0])[0][:, -1])

    torch.manual_seed(0)
    module = Recurrent()
    batch = {"x": images(), "y": torch.randint(0, 3, (SIZE,))}
    _, method, refused = choose(module, losses, batch, Bounds(0.1))
    assert "LSTM" in refused["book-keeping"]
    truth = OneByOne(module, losses)(batch, Bounds(0.1)).total
    assert norm(subtract(method(batch, Bounds(0.1)).total, truth)) < 1e-6
