"""FedJAX: its federated averaging, its samplers and shuffles, its default backend ``jit``.

Convolutions in JAX's own layout (NHWC); XLA takes as many threads as there are cores. Dispatch is
asynchronous, so a round ends when its parameters are there.

Source: https://fedjax.readthedocs.io, fedjax.algorithms.fed_avg and fedjax.for_each_client_backend.
"""

from __future__ import annotations

from typing import Any

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
import peer
from fedjax.algorithms.fed_avg import federated_averaging

Params = dict[str, Any]


def logits(params: Params, x: Any) -> Any:
    """x (B, 28, 28, 1) or (B, 64) to (B, 10)."""
    if len(params) == 2:
        return x @ params["1.weight"] + params["1.bias"]
    for layer in ("0", "3"):
        x = jax.lax.conv_general_dilated(
            x,
            params[f"{layer}.weight"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + params[f"{layer}.bias"])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["7.weight"] + params["7.bias"])
    return x @ params["9.weight"] + params["9.bias"]


def loss(params: Params, batch: Any, rng: Any) -> Any:
    """The mean cross-entropy of a batch."""
    scores = jax.nn.log_softmax(logits(params, batch["x"]))
    return -jnp.take_along_axis(scores, batch["y"][:, None], axis=1).mean()


def from_torch(params: Params) -> Params:
    """PyTorch's layout to JAX's: OIHW to HWIO; dense (out, in) to (in, out), NCHW to NHWC."""
    moved = {}
    for name, value in params.items():
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif name == "7.weight":
            value = value.reshape(-1, 32, 7, 7).transpose(2, 3, 1, 0).reshape(1568, -1)
        elif value.ndim == 2:
            value = value.T
        moved[name] = jnp.asarray(value)
    return moved


def to_torch(params: Params) -> Params:
    """The inverse of :func:`from_torch`."""
    moved = {}
    for name, value in params.items():
        value = np.asarray(value)
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif name == "7.weight":
            value = value.reshape(7, 7, 32, -1).transpose(3, 2, 0, 1).reshape(-1, 1568)
        elif value.ndim == 2:
            value = value.T
        moved[name] = value
    return moved


def main() -> None:
    """Runs the rounds."""
    w = peer.work()
    if not hasattr(jax, "tree_map"):
        jax.tree_map = jax.tree_util.tree_map
    x, y = peer.arrays(w)
    if w.model == "cnn":
        x = np.ascontiguousarray(np.moveaxis(x, 2, -1))
    data = fedjax.InMemoryFederatedData({i: {"x": x[i], "y": y[i]} for i in range(w.clients)})
    sampler = fedjax.client_samplers.UniformGetClientSampler(data, w.cohort, seed=0)
    batches = fedjax.ShuffleRepeatBatchHParams(w.batch, num_epochs=w.epochs, num_steps=w.steps)
    algorithm = federated_averaging(
        jax.grad(loss), fedjax.optimizers.sgd(w.lr), fedjax.optimizers.sgd(1.0), batches
    )
    state = algorithm.init(from_torch(peer.initial(w)))
    peer.began()
    with fedjax.for_each_client_backend(w.options["backend"]):
        for number in range(1, w.rounds + 1):
            sampler.set_round_num(number)
            state, _ = algorithm.apply(state, sampler.sample())
            jax.block_until_ready(state.params)
            peer.ended(number)
    peer.finish(w, to_torch(state.params), "fedjax", "jax", "jaxlib")


if __name__ == "__main__":
    main()
