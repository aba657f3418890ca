"""The honest baseline: a plain PyTorch loop as one would write it with care, on 1 … n processes.

One model and one optimizer a process for the whole run, data loaded once, one thread a process.
Workers are forked after the data are loaded, live for the run, take the global model from shared
memory, sum their clients' models and leave the sum there: traffic per worker, not per client.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

import peer
import torch
import torch.multiprocessing as mp
from peer_torch import build, train
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters


class Trainer:
    """Trains clients one after another with one model."""

    def __init__(self, w: peer.Work, x: Tensor, y: Tensor) -> None:
        self.w, self.x, self.y = w, x, y
        self.model = build(w.model, x).to(w.device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.params, lr=w.lr)

    def total(self, start: Tensor, clients: list[int]) -> Tensor:
        """The sum of the models (parameters,) that the clients end with."""
        given = [p.clone() for p in self._split(start)]
        sums = [torch.zeros_like(p) for p in given]
        for client in clients:
            with torch.no_grad():
                for mine, theirs in zip(self.params, given, strict=True):
                    mine.copy_(theirs)
            train(self.model, self.optimizer, self.x[client], self.y[client], self.w)
            with torch.no_grad():
                for total, mine in zip(sums, self.params, strict=True):
                    total.add_(mine)
        return parameters_to_vector(sums)

    def _split(self, flat: Tensor) -> list[Tensor]:
        with torch.no_grad():
            vector_to_parameters(flat.to(self.w.device), self.params)
        return [p.detach() for p in self.params]


def worker(trainer: Trainer, shared: Tensor, out: Tensor, orders: Connection) -> None:
    """Answers orders (lists of clients) until it is sent none."""
    torch.manual_seed(mp.current_process().pid or 0)
    while clients := orders.recv():
        out.copy_(trainer.total(shared, clients))
        orders.send(True)


def main() -> None:
    """Runs the rounds."""
    w = peer.work()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = (torch.from_numpy(a).to(w.device) for a in peer.arrays(w))
    trainer = Trainer(w, x, y)
    start = {name: torch.from_numpy(value) for name, value in peer.initial(w).items()}
    trainer.model.load_state_dict(start)
    shared = parameters_to_vector(trainer.params).detach().cpu().clone()
    processes = int(w.options["processes"])
    pipes: list[Connection] = []
    outs: list[Tensor] = []
    if processes > 1:
        shared.share_memory_()  # type: ignore[no-untyped-call]
        fork = mp.get_context("fork")
        for _ in range(processes):
            mine, theirs = fork.Pipe()
            out = torch.zeros_like(shared)
            out.share_memory_()  # type: ignore[no-untyped-call]
            fork.Process(target=worker, args=(trainer, shared, out, theirs), daemon=True).start()
            pipes.append(mine)
            outs.append(out)
    peer.began()
    for number in range(1, w.rounds + 1):
        cohort = torch.randperm(w.clients)[: w.cohort].tolist()
        if pipes:
            for place, pipe in enumerate(pipes):
                pipe.send(cohort[place::processes])
            for pipe in pipes:
                pipe.recv()
            shared.copy_(torch.stack(outs).sum(0) / w.cohort)
        else:
            shared.copy_(trainer.total(shared, cohort).cpu() / w.cohort)
        peer.ended(number)
    for pipe in pipes:
        pipe.send([])
    with torch.no_grad():
        vector_to_parameters(shared.to(w.device), trainer.params)
    final = {name: p.detach().cpu() for name, p in trainer.model.named_parameters()}
    peer.finish(w, final, "torch")


if __name__ == "__main__":
    main()
