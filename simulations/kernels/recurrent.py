"""Recurrent layers for many clients at once: a loop over time, a batched product a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from umbel.simulations.kernels.kernel import Obstacle
from umbel.simulations.kernels.layers import (
    Finder,
    Layer,
    Maker,
    Scope,
    Stack,
    Value,
    must,
    product,
    rows,
)

State: TypeAlias = tuple[Tensor, ...]
Cell: TypeAlias = Callable[[Tensor, State, Tensor, Tensor | None], State]
"""(the input's share of the gates, state, the state's weight, its bias where that is not in the
share already) -> state; shapes (n, B, gates * H), (n, B, H), (n, H, gates * H), (n, gates * H)."""


def _lstm_cell(share: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    gates = torch.baddbmm(share, state[0], weight)
    # The order of torch's gates: input, forget, cell, output.
    i, f, _, o = gates.sigmoid().chunk(4, -1)
    c = torch.addcmul(i * gates.chunk(4, -1)[2].tanh(), f, state[1])
    return o * c.tanh(), c


def _gru_cell(share: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    own = torch.bmm(state[0], weight)
    r, z, n = share.chunk(3, -1)
    own_r, own_z, own_n = (own if bias is None else own + bias[:, None]).chunk(3, -1)
    new = (n + (r + own_r).sigmoid() * own_n).tanh()
    return (torch.lerp(new, state[0], (z + own_z).sigmoid()),)


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    return lambda share, state, weight, bias: (activation(torch.baddbmm(share, state[0], weight)),)


def _recurrent(cell: Cell, states: int, module: nn.RNNBase, find: Finder) -> Layer:
    if module.proj_size:
        raise Obstacle(f"a {type(module).__name__} with a projection")
    if module.dropout and module.num_layers > 1:
        raise Obstacle(f"a {type(module).__name__} that drops out between its layers")
    passes = [
        [_stacks(module, find, f"_l{depth}{side}") for side in _sides(module)]
        for depth in range(module.num_layers)
    ]

    def layer(scope: Scope, x: Value, hx: Any = None) -> tuple[Value, Any]:
        if hx is not None:
            raise Obstacle(f"a {type(module).__name__} that is given its state")
        given = x.as_rows()
        if given.dim() != 4:
            raise Obstacle(f"a {type(module).__name__} without an axis of examples")
        if not module.batch_first:
            given = given.transpose(1, 2)
        last: list[State] = []
        for sides in passes:
            outs = []
            for backwards, stacks in enumerate(sides):
                out, state = _run(scope, cell, states, given, stacks, bool(backwards))
                outs.append(out)
                last.append(state)
            given = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
        ends = tuple(rows(torch.stack([s[i] for s in last], 1)) for i in range(states))
        result = given if module.batch_first else given.transpose(1, 2)
        return rows(result), ends if states > 1 else ends[0]

    return layer


def _run(
    scope: Scope,
    cell: Cell,
    states: int,
    given: Tensor,
    stacks: list[Stack | None],
    backwards: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction: (n, B, T, in) -> (n, B, T, H), and its last state."""
    weight, inner, bias, shift = (None if s is None else s(scope) for s in stacks)
    assert weight is not None
    assert inner is not None
    if bias is not None and shift is not None and cell is not _gru_cell:
        bias, shift = bias + shift, None
    # The input's share of all steps is one product.
    shares = product(given, weight, bias).unbind(2)
    turned, size = inner.transpose(1, 2), inner.shape[-1]
    state: State = (given.new_zeros(*given.shape[:2], size, dtype=shares[0].dtype),) * states
    outs: list[Tensor] = []
    for share in reversed(shares) if backwards else shares:
        state = cell(share, state, turned, shift)
        outs.append(state[0])
    return torch.stack(outs[::-1] if backwards else outs, 2), state


def _sides(module: nn.RNNBase) -> tuple[str, ...]:
    return ("", "_reverse") if module.bidirectional else ("",)


def _stacks(module: nn.RNNBase, find: Finder, tail: str) -> list[Stack | None]:
    weights = [must(find(getattr(module, f"{kind}{tail}"))) for kind in ("weight_ih", "weight_hh")]
    names = ("bias_ih", "bias_hh")
    biases = [find(getattr(module, f"{k}{tail}")) if module.bias else None for k in names]
    return [*weights, *biases]


def _lstm(module: nn.LSTM, find: Finder) -> Layer:
    return _recurrent(_lstm_cell, 2, module, find)


def _gru(module: nn.GRU, find: Finder) -> Layer:
    return _recurrent(_gru_cell, 1, module, find)


def _rnn(module: nn.RNN, find: Finder) -> Layer:
    activation = torch.tanh if module.nonlinearity == "tanh" else torch.relu
    return _recurrent(_rnn_cell(activation), 1, module, find)


RECURRENT: dict[type[nn.Module], Maker] = {nn.LSTM: _lstm, nn.GRU: _gru, nn.RNN: _rnn}
