"""How a client's own model does at the client: the strategy's, and one that is fine-tuned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from umbel.client import batches, devices, optimizers, own
from umbel.client.training import ClientRuntime
from umbel.core import randomness
from umbel.core.trees import Model, Tree, map_tree
from umbel.datasets.federated import Arrays, rows
from umbel.tasks.build import model_of
from umbel.tasks.evaluate import evaluate, per_example, tensor_of


def wanted(runtime: ClientRuntime) -> bool:
    """Whether a client is asked about a model of its own."""
    return runtime.rule.personalises or runtime.run.evaluate.fine_tune_steps > 0


def scores(
    runtime: ClientRuntime,
    round_number: int,
    client: str,
    model: Model,
    kept: Tree | None,
    train: Arrays,
    test: Arrays,
) -> dict[str, float]:
    """Means over the client's test part: ``personal_<metric>`` and ``fine_tuned_<metric>``.

    Args:
        runtime: whose rule and run file say what is wanted.
        round_number: the round that the global model is of.
        client: its name.
        model: the global model.
        kept: what the client kept, ``letter/name`` -> tensor; ``None``: nothing yet.
        train: the client's training examples.
        test: the client's test examples; at least one.
    """
    found: dict[str, float] = {}
    task, device = runtime.task, runtime.device
    if runtime.rule.personalises:
        module = runtime.module(model)
        mine = runtime.own(module, client, kept)
        here = model_of(module)
        whole = Model(map_tree(torch.clone, here.params), map_tree(torch.clone, here.buffers))
        for name, tensor in own.personal(runtime.rule, whole, mine).tensors().items():
            here.tensors()[name].copy_(tensor)
        means = evaluate(task, module, test, device=device)[1]
        found |= {f"personal_{name}": value for name, value in means.items()}
    if runtime.run.evaluate.fine_tune_steps:
        tuned = fine_tuned(runtime, round_number, client, model, train, kept)
        means = evaluate(task, tuned, test, device=device)[1]
        found |= {f"fine_tuned_{name}": value for name, value in means.items()}
    return found


def fine_tuned(
    runtime: ClientRuntime,
    round_number: int,
    client: str,
    model: Model,
    train: Arrays,
    kept: Tree | None,
) -> nn.Module:
    """The global model after ``[evaluate] fine_tune_steps`` local steps down the task's loss.

    With the optimizer and batches of ``[client]``, and no part of the strategy; nothing of it is
    kept or sent. The paper's baseline: Yu, Bagdasaryan and Shmatikov 2020 (arXiv:2002.04758).
    """
    run, section = runtime.run, runtime.run.client
    module = runtime.module(model)
    lr = optimizers.learning_rate(section, max(round_number, 1), run.run.rounds)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = optimizers.optimizer(section, trained, lr)
    made = runtime.made(module, max(round_number, 1), client, train, kept)
    columns = {name: tensor_of(c).to(runtime.device) for name, c in made.items()}
    schedule = batches.schedule(
        run.run.seed,
        round_number,
        f"fine-tune {client}",
        rows(made),
        section.batch_size,
        None,
        run.evaluate.fine_tune_steps,
    )
    seed = randomness.torch_seed(run.run.seed, "fine-tune", round_number, client)
    with devices.seeded(runtime.device, seed):
        for batch in schedule:
            examples: dict[str, Tensor] = {
                k: c[torch.from_numpy(batch)] for k, c in columns.items()
            }
            optimizer.zero_grad()
            losses, _ = per_example(runtime.task, module, examples)
            losses.mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return module
