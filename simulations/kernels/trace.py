"""From a module to the layers that it consists of, by torch.fx."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from umbel.core.trees import Tree
from umbel.simulations.kernels import layers
from umbel.simulations.kernels.draws import Draw
from umbel.simulations.kernels.kernel import Obstacle
from umbel.simulations.kernels.layers import Layer, Value
from umbel.simulations.residents import reason


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
    """The forward pass of a model, for many clients at once."""

    steps: list[Step]
    result: int

    def __call__(self, params: Tree, clients: int, inputs: Tensor, draw: Draw | None) -> Tensor:
        """(clients, B, …) -> (clients, B, …), for the parameters (clients, *shape)."""
        values = {0: Value(inputs, clients, False)}
        for step in self.steps:
            reads = [values[at] for at in step.reads]
            extra = (draw,) if step.kind is nn.Dropout else ()
            values[step.place] = step.layer(params, *reads, *extra)
        return values[self.result].as_rows()

    def has(self, *kinds: Any) -> bool:
        """Whether a step is of one of these kinds."""
        return any(step.kind in kinds for step in self.steps)


def trace(module: nn.Module) -> Program:
    """The layers of ``module``, in order.

    Raises:
        Obstacle: its forward pass depends on values, or has a part that is not known.
    """
    # The tracer looks into the root: a model that is one known layer needs a root around it.
    root = nn.Sequential(module) if type(module) in layers.MODULES else module
    try:
        graph = fx.Tracer().trace(root)
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
            return Program(_exchanged(steps, places[node.args[0]]), places[node.args[0]])
        elif not _is_shape(node):
            kind, layer, inputs = _step(node, root, finder)
            if any(map(_is_shape, inputs)):
                raise Obstacle("it computes with its shapes")
            places[node] = len(places)
            steps.append(Step(kind, layer, places[node], tuple(places[i] for i in inputs)))
    raise Obstacle("it returns nothing")


def _finder(module: nn.Module) -> layers.Finder:
    names = {id(p): name for name, p in module.named_parameters()}

    def find(parameter: Tensor | None) -> layers.Stack | None:
        if parameter is None:
            return None
        name = names[id(parameter)]
        if parameter.requires_grad:
            return lambda params, clients: params[name]
        frozen = parameter.detach()
        return lambda params, clients: frozen.expand(clients, *frozen.shape)

    return find


def _step(
    node: fx.Node, module: nn.Module, find: layers.Finder
) -> tuple[Any, Layer, list[fx.Node]]:
    """What a node is, its layer, and the nodes that the layer reads."""
    args, options = list(node.args), dict(node.kwargs)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    if not args or not isinstance(args[0], fx.Node):
        raise Obstacle(f"it uses '{name}' of its own")
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        make = layers.MODULES.get(type(part))
        if make is None or len(args) != 1 or options:
            raise Obstacle(f"no kernel knows {type(part).__name__}")
        return type(part), make(part, find), [args[0]]
    target = node.target
    if target in _SUMS and len(args) == 2 and isinstance(args[1], fx.Node) and not options:
        return operator.add, layers.add, [args[0], args[1]]
    if target in layers.FUNCTIONS and not (set(options) - {"inplace"}) and len(args) == 1:
        return target, layers.elementwise(layers.FUNCTIONS[target]), [args[0]]
    if target in layers.POOLINGS and not any(isinstance(a, fx.Node) for a in node.args[1:]):
        return target, layers.pooling_by(layers.POOLINGS[target], args[1:], options), [args[0]]
    if target is F.dropout and len(args) == 1 and options.keys() <= {"p", "training", "inplace"}:
        share: Any = options.get("p", 0.5) if options.get("training", True) else 0.0
        return nn.Dropout, layers.dropout(share), [args[0]]
    start = (*args[1:], *options.items())
    if target in ("flatten", torch.flatten) and start in ((1,), (1, -1), (("start_dim", 1),)):
        return nn.Flatten, layers.flatten, [args[0]]
    if target in ("view", "reshape") and len(args) == 3 and not options:
        if args[2] == -1 and _is_batch_size(args[1]):
            return nn.Flatten, layers.flatten, [args[0]]
        if args[1] == -1 and isinstance(args[2], int):
            return nn.Flatten, layers.flatten_to(args[2]), [args[0]]
    if target in ("mean", torch.mean):
        over = args[1] if len(args) == 2 and not options else options.get("dim")
        if over is not None and len(args) + len(options) == 2 and _sorted(over) in _PIXELS:
            return "mean", layers.mean_over_pixels, [args[0]]
    raise Obstacle(f"no kernel knows '{name}'")


_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PIXELS = ([2, 3], [-2, -1])
_RELU = {nn.ReLU, F.relu, torch.relu, "relu"}
_MAX_POOL = {nn.MaxPool2d, F.max_pool2d, torch.max_pool2d}
_KEEPS_NO_OUTPUT = {nn.Conv2d, nn.Linear, nn.GroupNorm, operator.add, *_MAX_POOL}


def _sorted(over: Any) -> list[int]:
    return sorted(over) if isinstance(over, (tuple, list)) else [over]


def _is_shape(node: fx.Node) -> bool:
    """Whether a node is about a shape, and not a value; who uses it otherwise is refused."""
    if node.op == "call_method" and node.target == "size":
        return True
    if node.op == "call_function" and node.target is getattr and node.args[1] == "shape":
        return True
    of = node.args[0] if node.args else None
    return node.target is operator.getitem and isinstance(of, fx.Node) and _is_shape(of)


def _is_batch_size(node: Any) -> bool:
    """``x.size(0)``, ``x.size()[0]`` or ``x.shape[0]``."""
    return isinstance(node, fx.Node) and _is_shape(node) and tuple(node.args[1:]) == (0,)


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
        alone = readers[step.reads[0]] == 1 and kinds.get(step.reads[0]) in _KEEPS_NO_OUTPUT
        if alone and step.kind in _RELU:
            found[i] = step._replace(layer=layers.elementwise(torch.relu_))
    return found
