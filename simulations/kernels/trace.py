"""From a module to the layers that it consists of, by torch.fx."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from umbel.core.trees import Tree
from umbel.privacy.per_example.layers import RULES
from umbel.simulations.kernels import adapters, layers
from umbel.simulations.kernels.attention import ATTENTION
from umbel.simulations.kernels.draws import Draw
from umbel.simulations.kernels.functions import FUNCTIONS
from umbel.simulations.kernels.kernel import Obstacle
from umbel.simulations.kernels.layers import Layer, Maker, Scope, Value
from umbel.simulations.kernels.norms import BATCH_NORMS, NORMS, statistics
from umbel.simulations.kernels.recurrent import RECURRENT
from umbel.simulations.residents import reason

MODULES = layers.PLAIN | NORMS | ATTENTION | RECURRENT

Makers: TypeAlias = Mapping[type[nn.Module], Maker]

NONE: Makers = MappingProxyType({})


class Step(NamedTuple):
    """One layer: reads the values of earlier places, writes that of its own.

    Args:
        kind: the type of a module, or what is called; says how steps may be exchanged.
        layer: computes the value.
        place: of the value.
        reads: places of what it takes.
    """

    kind: Any
    layer: Layer
    place: int
    reads: tuple[int, ...]


class Program(NamedTuple):
    """The forward pass of a model, for many clients at once.

    Args:
        steps: in order.
        result: the place of the result.
        buffers: names of those that training changes.
    """

    steps: list[Step]
    result: int
    buffers: tuple[str, ...]

    def __call__(
        self,
        params: Tree,
        clients: int,
        inputs: Tensor,
        draw: Draw | None,
        taps: Callable[[nn.Module, Value, Value], Value] | None = None,
    ) -> Tensor:
        """(clients, B, …) -> (clients, B, …), for the parameters (clients, *shape).

        Where ``params`` has the ``buffers`` as well, they are brought forward in place.
        """
        keeps = bool(self.buffers) and self.buffers[0] in params
        scope = Scope(params, clients, draw, keeps, taps)
        values: dict[int, Any] = {0: Value(inputs, clients, False)}
        for step in self.steps:
            values[step.place] = step.layer(scope, *[values[at] for at in step.reads])
        result = values[self.result]
        if not isinstance(result, Value):
            raise Obstacle("it returns more than one tensor")
        return result.as_rows()

    def has(self, *kinds: Any) -> bool:
        """Whether a step is of one of these kinds."""
        return any(step.kind in kinds for step in self.steps)

    def even(self) -> bool:
        """Whether the examples of a batch act on each other, so that none may be padding."""
        return self.has(*BATCH_NORMS)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return adapters.is_lora(m) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module, instead: Makers = NONE) -> Program:
    """The layers of ``module``, in order.

    Args:
        module: a model.
        instead: how modules of these types are computed, where that is not as everywhere.

    Raises:
        Obstacle: its forward pass depends on values, or has a part that is not known.
    """
    root = adapters.without_wrapper(module)
    # The tracer looks into the root: a model that is one known layer needs a root around it.
    root = nn.Sequential(root) if type(root) in MODULES else root
    try:
        graph = _Tracer().trace(root)
    except Exception as error:  # whatever a user's forward does with a proxy
        raise Obstacle(f"its forward pass cannot be traced ({reason(error)})") from error
    places: dict[fx.Node, int] = {}
    steps: list[Step] = []
    finder = _finder(module)
    for node in graph.nodes:
        if node.op == "placeholder":
            if places and node.users:
                raise Obstacle("it takes more than one tensor")
            places.setdefault(node, 0)
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise Obstacle("it returns more than one tensor")
            result = places[node.args[0]]
            return Program(_exchanged(steps, result), result, tuple(statistics(module)))
        else:
            kind, layer = _step(node, root, finder, instead)
            reads = tuple(places[i] for i in node.all_input_nodes)
            places[node] = len(places)
            steps.append(Step(kind, layer, places[node], reads))
    raise Obstacle("it returns nothing")


def _finder(module: nn.Module) -> layers.Finder:
    names = {id(p): name for name, p in module.named_parameters()}
    moving = {id(b): name for name, b in statistics(module).items()}

    def find(tensor: Tensor | None) -> layers.Stack | None:
        if tensor is None:
            return None
        if tensor.requires_grad or id(tensor) in moving:
            name = names.get(id(tensor)) or moving[id(tensor)]
            return lambda scope: scope.params[name]
        frozen = tensor.detach()
        return lambda scope: frozen.expand(scope.clients, *frozen.shape)

    return find


def _step(
    node: fx.Node, module: nn.Module, find: layers.Finder, instead: Makers
) -> tuple[Any, Layer]:
    """What a node is, and its layer, which is given the node's input nodes in their order."""
    if node.op == "get_attr":
        return "get_attr", _attribute(operator.attrgetter(str(node.target))(module), find)
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        usual = adapters.lora if adapters.is_lora(part) else MODULES.get(type(part))
        make = instead.get(type(part), usual)
        if make is None:
            raise Obstacle(f"no kernel knows {type(part).__name__}")
        return type(part), _filled(node, _telling(part, make(part, find)))
    function = FUNCTIONS.get(node.target)
    if function is None:
        name = node.target if isinstance(node.target, str) else node.target.__name__
        raise Obstacle(f"no kernel knows '{name}'")
    return node.target, _filled(node, function)


def _telling(part: nn.Module, layer: Layer) -> Layer:
    """The layer of a part, which tells the taps of its scope what it did."""
    if type(part) not in RULES or not any(p.requires_grad for p in part.parameters()):
        return layer

    def telling(scope: Scope, x: Value) -> Any:
        out = layer(scope, x)
        return out if scope.taps is None else scope.taps(part, x, out)

    return telling


def _filled(node: fx.Node, function: Callable[..., Any]) -> Layer:
    """A layer that puts its inputs where the call had them."""
    args, options, nodes = node.args, node.kwargs, node.all_input_nodes
    if args == tuple(nodes) and not options:
        return function

    inputs_at = {node: _Input(at) for at, node in enumerate(nodes)}
    form: Any = fx.node.map_arg((args, options), inputs_at.__getitem__)  # type: ignore[arg-type]

    def layer(scope: Scope, *inputs: Any) -> Any:
        own, named = _filled_in(form, inputs)
        return function(scope, *own, **named)

    return layer


@dataclass(frozen=True)
class _Input:
    """Stands for one of a layer's inputs."""

    at: int


def _filled_in(form: Any, inputs: Sequence[Any]) -> Any:
    """What :func:`fx.node.map_arg` does, in a way that can be compiled."""
    if isinstance(form, _Input):
        return inputs[form.at]
    if isinstance(form, tuple):
        return tuple([_filled_in(part, inputs) for part in form])
    if isinstance(form, list):
        return [_filled_in(part, inputs) for part in form]
    if isinstance(form, dict):
        return {name: _filled_in(part, inputs) for name, part in form.items()}
    if isinstance(form, slice):
        return slice(*[_filled_in(end, inputs) for end in (form.start, form.stop, form.step)])
    return form


def _attribute(tensor: Tensor, find: layers.Finder) -> Layer:
    """A parameter of each client, or a tensor that is the same for all."""
    if not tensor.requires_grad:
        shared = tensor.detach()
        return lambda scope: shared
    stack = layers.must(find(tensor))
    return lambda scope: layers.rows(stack(scope))


_RELU = {nn.ReLU, F.relu, torch.relu, "relu"}
_MAX_POOL = {nn.MaxPool2d, F.max_pool2d, torch.max_pool2d}
_KEEPS_NO_OUTPUT = {nn.Conv2d, nn.Linear, nn.GroupNorm, operator.add, *_MAX_POOL}


def _exchanged(steps: list[Step], result: int) -> list[Step]:
    """Pools before it rectifies, which is the same on a quarter of the numbers.

    The gradient is the same too: where the largest of a window is positive, it is the same one; and
    where it is not, nothing passes. What nobody else reads is then rectified in its place.
    """
    readers = Counter(at for step in steps for at in step.reads)
    readers[result] += 1
    found = list(steps)
    for i in range(len(found) - 1):
        relu, pool = found[i : i + 2]
        follows = pool.reads == (relu.place,) and readers[relu.place] == 1
        if follows and relu.kind in _RELU and pool.kind in _MAX_POOL:
            found[i] = relu._replace(kind=pool.kind, layer=pool.layer)
            found[i + 1] = pool._replace(kind=relu.kind, layer=relu.layer)
    kinds = {step.place: step.kind for step in found}
    for i, step in enumerate(found):
        alone = step.kind in _RELU and readers[step.reads[0]] == 1
        if alone and kinds.get(step.reads[0]) in _KEEPS_NO_OUTPUT:
            found[i] = step._replace(layer=layers.elementwise(torch.relu_))
    return found
