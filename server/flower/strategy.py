"""Any strategy of Umbel as a strategy of Flower, for anyone's own ``ServerApp``.

What a plain ``ClientApp`` returns, new parameters and a number of examples, passes the update gate
first: one client's NaN, wrong shape or absurd number of examples neither enters the model nor ends
the run. Flower's own strategies let each of them through.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerBase
from torch import Tensor

from umbel.core import run_file, settings
from umbel.core.errors import InputError
from umbel.core.payloads import Failure, TrainPlan, Updates, pack, unpack
from umbel.core.trees import Model, Tree
from umbel.server.flower.grid import FLOWER_ERRORS
from umbel.server.gate import CAP_FACTOR, Gate
from umbel.server.rounds import collect, is_finite, step
from umbel.server.sampling import sample
from umbel.strategies.parts import ServerState, Strategy
from umbel.strategies.parts.rule import Proximal

log = logging.getLogger("flwr")

ARRAYS, CONFIG, EXAMPLES = "arrays", "config", "num-examples"

# How torch's normalisation layers call what is averaged and never stepped.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

# Flower writes arrays as numpy's, which have no bfloat16; those are written so.
SAFETENSORS = "umbel.safetensors"


def as_flower(
    strategy: Strategy,
    *,
    cohort: int | float | None = None,
    weights: Literal["examples", "uniform"] = "examples",
    max_weight: float | None = None,
    min_nodes: int = 2,
    buffers: Sequence[str] = BUFFERS,
    seed: int = 0,
) -> FlowerStrategy:
    """``strategy`` as Flower's ``Strategy``: give it to your ServerApp and call its ``start``.

    Clients answer as Flower's own templates do: with one ArrayRecord, the new parameters, and one
    MetricRecord that holds ``num-examples``. They are sent ``server-round`` and, for FedProx,
    ``proximal-mu``, which they apply, as with Flower's FedProx.

    Args:
        strategy: such as ``fedadam(server_lr=0.1)``.
        cohort: clients a round: a number, or a share of those that are connected; ``None``: all.
        weights: what the mean is weighted by.
        max_weight: no client weighs more; ``None``: ten times the lower median of the round's
            claims, which nobody has verified.
        min_nodes: how many must be connected before a round begins.
        buffers: ends of the names of tensors that are averaged and never stepped. Tensors that are
            not floating point are, whatever they are called.
        seed: of the sampling.

    Raises:
        InputError: the strategy asks of clients what a plain ClientApp does not do.
    """
    terms = strategy.client.loss_terms
    if strategy.client.grad_transforms or not all(isinstance(t, Proximal) for t in terms):
        raise InputError(
            "this strategy changes the clients' gradients or loss, and a plain ClientApp does not",
            where="as_flower",
            fix="run it with umbel, whose client app does",
        )
    table = {"cohort": cohort, "weights": weights, "max_weight": max_weight}
    section = settings.parse(run_file.Strategy, table, "as_flower")
    return FlowerStrategy(strategy, section, max(min_nodes, 1), tuple(buffers), seed)


class FlowerStrategy(FlowerBase):
    """What :func:`as_flower` returns. Holds the strategy's state between rounds."""

    def __init__(
        self,
        strategy: Strategy,
        section: run_file.Strategy,
        min_nodes: int,
        buffers: tuple[str, ...],
        seed: int,
    ) -> None:
        self._strategy = strategy
        self._section = section
        cohort = section.cohort
        self._min_nodes = max(min_nodes, cohort) if isinstance(cohort, int) else min_nodes
        self._buffers = buffers
        self._seed = seed
        self._model = Model({}, {})
        self._asked: Sequence[str] = ()
        self._state: ServerState | None = None
        self.failures: list[tuple[int, Failure]] = []
        """Who did not deliver: (round, node and reason)."""

    def summary(self) -> None:
        """Logs what runs."""
        log.info("\t├── Umbel's update gate, then a strategy of Umbel")
        log.info("\t├── Cohort: %s of at least %d nodes", self._section.cohort, self._min_nodes)
        log.info("\t└── Weights: %s", self._section.weights)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Samples the cohort, a function of seed, round and connected nodes; one message each."""
        self._model = self._split(from_arrays(arrays))
        if self._state is None:
            self._state = self._strategy.init(self._model.params)
        names = self._wait_for_nodes(grid)
        self._asked = sample(names, self._section, self._seed, server_round)
        for term in self._strategy.client.loss_terms:
            if isinstance(term, Proximal):
                config["proximal-mu"] = term.mu
        return _messages("train", server_round, arrays, config, self._asked)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Gates, combines and steps. Without one valid update there is no new model."""
        answers = sorted(replies, key=lambda m: m.metadata.src_node_id)  # sums in one order
        updates = [self._update(server_round, message) for message in answers]
        claims = [float(u.weights[0]) for u in updates if isinstance(u, Updates)]
        cap = self._cap(claims)
        plan = TrainPlan(server_round, self._asked, self._model, max(len(updates), 1))
        gate = Gate(server_round, self._asked, self._model.tensors(), cap)
        stream: Iterator[Updates | Failure] = iter(updates)
        cohort = collect(stream, gate, self._strategy.combine, plan, self._section.weights)
        self._name(server_round, cohort.failures)
        for node in cohort.capped:
            log.warning("round %d: node %s weighs %g, its cap", server_round, node, cap)
        if not cohort.participants or self._state is None:
            return None, None
        model, state = step(
            self._strategy, self._model, self._state, self._strategy.combine.finish(cohort.sums)
        )
        if not is_finite(model):
            log.warning("round %d: the step would overflow; the model stays", server_round)
            return None, None
        self._state = state
        return to_arrays(model.tensors()), MetricRecord(dict(cohort.training()))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each connected node."""
        return _messages("evaluate", server_round, arrays, config, self._wait_for_nodes(grid))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Means of the clients' metrics over their examples; each over those that report it."""
        found: list[tuple[float, dict[str, float]]] = []
        for message in sorted(replies, key=lambda m: m.metadata.src_node_id):
            read = _figures(message)
            if isinstance(read, str):
                self._name(server_round, [Failure(_node(message), f"evaluation: {read}")])
            elif not read[0] > 0 or math.isinf(read[0]):
                reason = f"evaluation: {EXAMPLES} is {read[0]:g}"
                self._name(server_round, [Failure(_node(message), reason)])
            else:
                found.append(read)
        cap = self._cap([examples for examples, _ in found])
        totals: dict[str, list[float]] = {}
        for examples, metrics in found:
            for name, value in metrics.items():
                if math.isfinite(value):
                    total = totals.setdefault(name, [0.0, 0.0])
                    total[0] += value * min(examples, cap)
                    total[1] += min(examples, cap)
        return MetricRecord({n: t / w for n, (t, w) in totals.items()}) if totals else None

    def _update(self, server_round: int, message: Message) -> Updates | Failure:
        """A reply as a delta. What does not fit the model is left as it is: the gate names it."""
        node = _node(message)
        read = _figures(message)
        if isinstance(read, str):
            return Failure(node, read)
        records = list(message.content.array_records.values())
        if len(records) != 1:
            return Failure(node, f"sent {len(records)} ArrayRecords, expected one")
        try:
            sent = from_arrays(records[0])
        except InputError:
            return Failure(node, "sent arrays that cannot be read")
        base = self._model.tensors()
        delta = {name: _difference(tensor, base.get(name)) for name, tensor in sent.items()}
        examples, metrics = read
        return Updates(
            server_round,
            [node],
            {name: tensor[None] for name, tensor in delta.items()},
            torch.tensor([examples], dtype=torch.float64),
            {name: torch.tensor([v], dtype=torch.float64) for name, v in metrics.items()},
        )

    def _cap(self, claims: Sequence[float]) -> float:
        # Of two claims nobody can tell which is absurd: the lower one bounds the other.
        if self._section.max_weight is not None:
            return self._section.max_weight
        sane = sorted(c for c in claims if c > 0 and math.isfinite(c))
        return CAP_FACTOR * sane[(len(sane) - 1) // 2] if sane else math.inf

    def _split(self, tensors: Tree) -> Model:
        params: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            stepped = tensor.dtype.is_floating_point and not name.endswith(self._buffers)
            (params if stepped else buffers)[name] = tensor
        return Model(params, buffers)

    def _wait_for_nodes(self, grid: Grid) -> list[str]:
        while len(nodes := sorted(str(n) for n in grid.get_node_ids())) < self._min_nodes:
            log.info("%d of %d nodes are connected", len(nodes), self._min_nodes)
            time.sleep(1.0)
        return nodes

    def _name(self, server_round: int, failures: Iterable[Failure]) -> None:
        for failure in failures:
            log.warning("round %d: node %s: %s", server_round, failure.client, failure.reason)
            self.failures.append((server_round, failure))


def to_arrays(tensors: Tree) -> ArrayRecord:
    """Tensors of any dtype as Flower's ArrayRecord: bfloat16 too, which Flower's own cannot."""
    return ArrayRecord({name: _array(tensor) for name, tensor in tensors.items()})


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """The inverse of :func:`to_arrays`; reads what Flower wrote as well.

    Raises:
        InputError: an array is damaged or of a dtype that torch does not have.
    """
    return {name: _tensor(name, array) for name, array in record.items()}


def _array(tensor: Tensor) -> Array:
    if tensor.dtype is torch.bfloat16:
        return Array("bfloat16", tuple(tensor.shape), SAFETENSORS, pack({"value": tensor}))
    return Array(tensor.detach().cpu().numpy())


def _tensor(name: str, array: Array) -> Tensor:
    where = f"array '{name}'"
    if array.stype == SAFETENSORS:
        tensors, _ = unpack(array.data, where)
        if tensors.keys() != {"value"}:
            raise InputError("not one tensor", where=where)
        return tensors["value"]
    try:
        return torch.from_numpy(np.array(array.numpy()))
    except Exception as error:  # numpy's reader raises many kinds on damaged bytes
        raise InputError(f"cannot be read: {type(error).__name__}", where=where) from None


def _difference(new: Tensor, base: Tensor | None) -> Tensor:
    if base is None or new.shape != base.shape or new.dtype != base.dtype:
        return new
    return new ^ base if new.dtype is torch.bool else new - base


def _figures(message: Message) -> tuple[float, dict[str, float]] | str:
    """Examples and single-valued metrics of a reply, or what is wrong with it."""
    if message.has_error():
        return FLOWER_ERRORS.get(message.error.code, "failed in Flower's runtime")
    records = list(message.content.metric_records.values())
    if len(records) != 1:
        return f"sent {len(records)} MetricRecords, expected one"
    examples = records[0].get(EXAMPLES)
    if not isinstance(examples, int | float):
        return f"sent no single {EXAMPLES}"
    metrics = {
        name: float(value)
        for name, value in records[0].items()
        if name != EXAMPLES and isinstance(value, int | float)
    }
    return float(examples), metrics


def _messages(
    kind: str,
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    nodes: Sequence[str],
) -> list[Message]:
    # A content of its own for each: on some grids clients in one process would share it.
    values = {**config, "server-round": server_round}
    return [
        Message(
            RecordDict({ARRAYS: ArrayRecord(dict(arrays)), CONFIG: ConfigRecord(dict(values))}),
            int(node),
            kind,
        )
        for node in nodes
    ]


def _node(message: Message) -> str:
    return str(message.metadata.src_node_id)
