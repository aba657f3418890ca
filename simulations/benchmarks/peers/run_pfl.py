"""pfl-research: its FederatedAveraging on its SimulatedBackend, PyTorch.

Two processes are started by ``torchrun``, as its guide says, with one thread each; one process
runs with one thread. Users' tensors are made once; a user's examples are shuffled anew each time it
is drawn, since pfl's own data set keeps one order for ever. Its user-level evaluation, which round
1 cannot do without, is given nothing to compute.

Source: https://apple.github.io/pfl-research/, "Distributed simulation".
"""

from __future__ import annotations

from typing import Any

import peer
import torch
from peer_torch import build, loss
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn


class Net(nn.Module):
    """The model with the two methods that pfl asks for."""

    def __init__(self, name: str, x: Tensor) -> None:
        super().__init__()
        self.net = build(name, x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch."""
        found: Tensor = loss(self.net(x), x, y)
        return found

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Nothing: evaluation is not what is measured."""
        return {"none": Weighted(0, len(y))}


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    """Says when rounds end."""

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """A round has ended."""
        if pytorch_ops.distributed.global_rank == 0:
            peer.ended(central_iteration + 1)
        return False, Metrics()


def main() -> None:
    """Runs the rounds."""
    w = peer.work()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = pytorch_ops.get_default_device()
    x, y = (torch.from_numpy(a).to(device) for a in peer.arrays(w))

    def user(client: int) -> PyTorchTensorDataset:
        rows = torch.randperm(w.examples)
        return PyTorchTensorDataset((x[client][rows], y[client][rows]), user_id=str(client))

    users = FederatedDataset(user, get_user_sampler("minimize_reuse", list(range(w.clients))))
    net = Net(w.model, x)
    net.net.load_state_dict({n: torch.from_numpy(v) for n, v in peer.initial(w).items()})
    server = torch.optim.SGD(net.parameters(), lr=1.0)
    model = PyTorchModel(net, torch.optim.SGD, server)
    first = pytorch_ops.distributed.global_rank == 0
    if first:
        peer.began()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=w.rounds,
            evaluation_frequency=w.rounds + 1,
            train_cohort_size=w.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=users, val_data=users),
        model,
        NNTrainHyperParams(
            local_num_epochs=w.epochs,
            local_num_steps=w.steps,
            local_learning_rate=w.lr,
            local_batch_size=w.batch,
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[Clock()],
    )
    if first:
        final = {name: p.detach().cpu() for name, p in net.net.named_parameters()}
        peer.finish(w, final, "pfl", "torch")


if __name__ == "__main__":
    main()
