"""Several targets an example: models that share, and gradients that give way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model, Tree
from umbel.datasets.federated import Info
from umbel.server.records import Scores
from umbel.server.rounds import Start, rounds
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.engines.vectorised import vectorised
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import simulate
from umbel.strategies.gradnorm import gradnorm
from umbel.strategies.parts import Local
from umbel.strategies.pcgrad import pcgrad
from umbel.tasks.kinds.multi_task import multi_task


class Parts:
    """Part t of every example costs ``a_t w``: its gradient is a_t."""

    def __init__(self, directions: list[list[float]]) -> None:
        self._directions = torch.tensor(directions)

    def parts(self, params: Tree, batch: Tree) -> Tensor:
        return (self._directions @ params["w"]).expand(len(batch["x"]), -1)

    def losses(self, params: Tree, batch: Tree) -> Tensor:
        return self.parts(params, batch).sum(1)

    outputs = features = losses


def pulled(directions: list[list[float]], step: int = 0) -> list[float]:
    objective = pcgrad().client.objective
    assert objective is not None
    w = torch.zeros(2, requires_grad=True)
    local = Local({"w": w}, {"w": w.detach()}, step=step)
    value = objective(Parts(directions), local, {"x": torch.zeros(3)}, None)
    (found,) = torch.autograd.grad(value, w)
    return [round(v, 5) for v in found.tolist()]


def test_pcgrad_is_the_sum_where_nothing_conflicts() -> None:
    assert pulled([[1.0, 0.0], [0.0, 2.0]]) == [1.0, 2.0]
    assert pulled([[1.0, 1.0], [3.0, 0.0]]) == [4.0, 1.0]


def test_pcgrad_projects_what_conflicts() -> None:
    # g1 = (1, 0), g2 = (-1, 1): each loses what points against the other.
    assert pulled([[1.0, 0.0], [-1.0, 1.0]]) == [0.5, 1.5]
    assert pulled([[1.0, 0.0], [-1.0, 0.0]]) == [0.0, 0.0]


def test_pcgrad_visits_the_others_in_an_order_that_turns() -> None:
    three = [[1.0, 0.0], [-1.0, 1.0], [-0.5, -1.0]]

    def by_hand(order: dict[int, list[int]]) -> np.ndarray:
        total = np.zeros(2)
        for i, others in order.items():
            own = np.array(three[i])
            for j in others:
                other = np.array(three[j])
                if own @ other < 0:
                    own = own - (own @ other) / (other @ other) * other
            total += own
        return total

    even = by_hand({0: [1, 2], 1: [2, 0], 2: [0, 1]})
    odd = by_hand({0: [2, 1], 1: [0, 2], 2: [1, 0]})
    assert not np.allclose(even, odd)
    np.testing.assert_allclose(pulled(three, 0), even, atol=1e-4)
    np.testing.assert_allclose(pulled(three, 1), odd, atol=1e-4)


def test_gradnorm_pulls_weights_as_equation_2() -> None:
    rule = gradnorm(pace=1.0, initial_losses=[1.0, 2.0]).client
    assert rule.objective is not None
    directions = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    w = torch.tensor([1.0, 1.0], requires_grad=True)
    params = torch.tensor([2.0, 4.0])
    local = Local({"w": params, "w/parts": w}, {"w": params})
    value = rule.objective(Parts(directions.tolist()), local, {"x": torch.zeros(3)}, None)
    (found,) = torch.autograd.grad(value, w)
    losses = directions @ params
    ratios = losses / torch.tensor([1.0, 2.0])
    norms = torch.tensor([3.0, 1.0])
    target = norms.mean() * ratios / ratios.mean()
    torch.testing.assert_close(found, norms * torch.sign(norms - target))


INFO = Info("toy", (4,), classes=None, targets=2)


@pytest.mark.parametrize("sharing", ["hard", "soft", "film"])
def test_losses_are_those_of_the_parts(sharing: Any) -> None:
    torch.manual_seed(0)
    weights = [1.0, 0.5]
    task = multi_task(INFO, "logistic", parts=[3, 0], sharing=sharing, weights=weights, tie=0.1)
    model = task.build()
    batch = {"x": torch.randn(6, 4), "y": torch.tensor([[k % 3, k / 2] for k in range(6)])}
    out = model(batch["x"])
    cross = nn.functional.cross_entropy(out[:, :3], batch["y"][:, 0].long(), reduction="none")
    square = (out[:, 3] - batch["y"][:, 1]) ** 2
    expected = cross + 0.5 * square
    if sharing == "soft":
        trunks = [dict(trunk.named_parameters()) for trunk in model.trunks]
        far = sum(((t[n] - sum(u[n] for u in trunks) / 2) ** 2).sum() for t in trunks for n in t)
        expected = expected + 0.1 * far
    torch.testing.assert_close(task.losses(model, batch), expected)
    assert task.parts is not None
    torch.testing.assert_close(task.parts(model, batch), torch.stack([cross, square], 1))
    assert set(task.metrics(model, batch)) == {"accuracy", "accuracy_0", "error_1"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Which digit it is, whether that is odd, and how much ink it took."""
    x, y = load_digits(return_X_y=True)
    ink = x.sum(1, keepdims=True) / 300
    path = tmp_path_factory.mktemp("digits") / "three.npz"
    targets = np.column_stack([y, y % 2, ink]).astype(np.float32)
    np.savez(path, x=(x / 16).astype(np.float32), y=targets)
    return str(path)


def run_file(path: str, strategy: str, store: str = "unused", **task: Any) -> RunFile:
    return resolve(
        {
            "run": {"rounds": 2, "seed": 1, "store": store},
            "data": {"name": "npz", "path": path, "split": {"kind": "quantity", "clients": 4}},
            "task": {
                "kind": "multi-task",
                "parts": [10, 2, 0],
                "model": {"name": "mlp", "hidden": [24]},
                "embedding": 16,
                **task,
            },
            "client": {"lr": 0.1, "local_steps": 3, "batch_size": 30, "device": "cpu"},
            "strategy": {"name": strategy},
            "evaluate": {"every": 0},
        }
    )


def final(engine: Any, run: RunFile) -> Model:
    prepared = prepare(run)
    federation = engine(run, prepared.data, prepared.task, prepared.strategy.client)
    model, strategy = prepared.model(), prepared.strategy
    start = Start(0, model, strategy.init(model.params))
    try:
        found = list(rounds(run, strategy, federation, start, lambda r, m: Scores({}, {})))
    finally:
        federation.close()
    return found[-1].model


@pytest.mark.parametrize(
    ("strategy", "sharing"),
    [("fedavg", "hard"), ("fedavg", "soft"), ("pcgrad", "film"), ("gradnorm", "hard")],
)
def test_both_engines_agree(digits: str, strategy: str, sharing: str) -> None:
    run = run_file(digits, strategy, sharing=sharing)
    left, right = final(sequential, run), final(vectorised, run)
    for name, tensor in left.params.items():
        torch.testing.assert_close(right.params[name], tensor, rtol=1e-3, atol=1e-5)


def test_gradnorm_with_one_part_is_fedavg(digits: str, tmp_path: Path) -> None:
    with np.load(digits) as arrays:
        path = tmp_path / "one.npz"
        np.savez(path, x=arrays["x"], y=arrays["y"][:, :1])
    plain = final(sequential, run_file(str(path), "fedavg", parts=[10]))
    same = final(sequential, run_file(str(path), "gradnorm", parts=[10]))
    for name, tensor in plain.params.items():
        torch.testing.assert_close(same.params[name], tensor, rtol=1e-4, atol=1e-6)


def test_parts_are_learned_and_reported(digits: str, tmp_path: Path) -> None:
    table = run_file(digits, "pcgrad", str(tmp_path)).model_dump(mode="json")
    table["run"]["rounds"] = 20
    table["client"] |= {"optimizer": "adam", "lr": 0.01, "local_steps": 12}
    found = simulate(resolve(table)).metrics
    assert found["accuracy_0"] > 0.6
    assert found["accuracy_1"] > 0.8
    assert found["error_2"] < 0.03


def test_what_does_not_fit_is_refused(digits: str) -> None:
    with pytest.raises(InputError, match=r"parts names 2 target\(s\).*3 real"):
        prepare(run_file(digits, "fedavg", parts=[10, 2]))
    table = run_file(digits, "pcgrad").model_dump(mode="json")
    table["data"] = {"name": "digits", "split": {"kind": "iid", "clients": 3}}
    table["task"] = {"kind": "classification"}
    with pytest.raises(InputError, match="weighs the parts of a task"):
        final(sequential, resolve(table))
