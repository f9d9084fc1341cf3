"""Which layer stands next to a norm in the graph of a model, and what the norm is between them.

A norm in evaluation is `scale * x + bias` along one axis, whoever wrote it. Both are read off the operations that its
variables enter, so epsilon, a scale stored less 1 and the like are in them as the model has them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxnorm.tools.find import KeyPath, NormLayer, place
from jaxnorm.tools.trace import Node, NotFolded, is_move, moved, origins

NESTED = {"scan", "while", "cond", "shard_map", "pallas_call"}
NOT_FINITE = "its statistics are not finite, or var + epsilon is not positive"
Line = tuple[np.ndarray, np.ndarray]  # scale and bias, along one axis or of one element


def name_of(path: KeyPath) -> str:
    """The path of the layer that has this variable."""
    layer, name = place(path)
    return "/".join(layer) or name


# --- steps: operations that are scale and bias of one input


def is_step(node: Node) -> bool:
    """Whether a node may be scale and bias of one input. `line` says which, or that it is not."""
    if not node.is_float or any(not read.is_float for read in node.inputs):
        return False
    if node.op == "neg" or is_move(node):
        return len(node.inputs) == 1
    depends = [read.leaves is None for read in node.inputs]
    if node.op in ("add", "add_any", "sub", "mul"):
        return sum(depends) == 1
    return node.op == "div" and depends == [True, False]


def input_of(node: Node) -> Node:
    """The input that is no constant."""
    return next(read for read in node.inputs if read.leaves is None)


def constants(node: Node) -> Iterator[Node]:
    return (read for read in node.inputs if read.leaves is not None)


def follow(steps: Iterable[Node], dim: int) -> int:
    """Where dimension `dim` of the input of the first step lies in the output of the last."""
    for node in steps:
        if is_move(node):
            after = moved(node, dim)
            if after is None:
                raise NotFolded(f"{node} reorders its channels, or mixes them with other axes")
            dim = after
    return dim


def line(steps: Iterable[Node], dim: int) -> Line:
    """The scale and bias that the steps are together, along dimension `dim` of the first one's input."""
    scale, bias = np.ones(1), np.zeros(1)
    for node in steps:
        before, dim = dim, follow([node], dim)
        if node.op == "neg":
            scale, bias = -scale, -bias
        elif not is_move(node):
            (constant,) = constants(node)
            if node.shape != input_of(node).shape:
                raise NotFolded(f"{node} broadcasts its input")
            z = _along(constant.value, before)
            if z is None:
                raise NotFolded("its statistics vary along other axes than the channels of the layer")
            if node.op == "mul":
                scale, bias = scale * z, bias * z
            elif node.op == "div":
                scale, bias = scale / z, bias / z
            elif node.op == "sub" and node.inputs[0] is constant:
                scale, bias = -scale, z - bias
            else:
                bias = bias - z if node.op == "sub" else bias + z
    if not (np.isfinite(scale).all() and np.isfinite(bias).all()):
        raise NotFolded(NOT_FINITE)
    return scale, bias


def _along(value: np.ndarray, dim: int) -> np.ndarray | None:
    """What varies along `dim` alone, as a vector; None for what varies along another."""
    if value.ndim == 0:
        return value.reshape(1)
    first = value[tuple(slice(None) if d == dim else slice(0, 1) for d in range(value.ndim))]
    return first.reshape(-1) if np.array_equal(value, np.broadcast_to(first, value.shape), equal_nan=True) else None


# --- the norm


@dataclass(frozen=True)
class Norm:
    """A norm in the graph: the operations from the first that reads its variables to the last."""

    layer: NormLayer
    steps: tuple[Node, ...]

    @property
    def input(self) -> Node:
        return input_of(self.steps[0])

    @property
    def output(self) -> Node:
        return self.steps[-1]

    def lines(self) -> dict[int, Line]:
        """Scale and bias by the dimension of the input along which they may lie."""
        found, reason = {}, NotFolded("its input has no axes")
        for dim in range(len(self.input.shape)):
            try:
                follow(self.steps, dim)
                found[dim] = line(self.steps, dim)
            except NotFolded as error:
                reason = error
        if not found:
            raise reason
        return found

    def own_line(self) -> Line:
        """Scale and bias along the axes of its own parameters."""
        for scale, bias in self.lines().values():
            if {scale.size, bias.size} <= {1, math.prod(self.layer.shape)}:
                return scale, bias
        raise NotFolded(f"it is no scale and bias of shape {self.layer.shape}")


def uses(nodes: Iterable[Node]) -> dict[KeyPath, list[Node]]:
    """By variable, the operations in which it, or a constant made of it, meets what depends on the input; and the
    constants made of it that the model returns, as a penalty on weights. That it returns its state is no use of it."""
    found: dict[KeyPath, list[Node]] = {}
    for node in nodes:
        if node.leaves is not None and node.is_output and node.leaf is None:
            for leaf in node.leaves:
                found.setdefault(leaf, []).append(node)
        if node.leaves is None:
            for leaf in {leaf for read in constants(node) for leaf in read.leaves or ()}:
                found.setdefault(leaf, []).append(node)
    return found


def norm_of(layer: NormLayer, used: Mapping[KeyPath, list[Node]]) -> Norm:
    """Where a norm lies in the graph."""
    own = set(layer.leaves.values())
    entries = sorted({node for leaf in own for node in used.get(leaf, ())}, key=lambda node: node.order)
    if not entries:
        raise NotFolded("the model does not use it")
    unread = [name for name in ("mean", "var") if layer.leaves[name] not in used]
    if unread:
        raise NotFolded(f"the model does not read its {' and '.join(unread)}: call it in evaluation mode")
    for node in entries:
        if node.leaves is not None:
            raise NotFolded(f"the model also returns what {node} makes of its variables")
        if node.op in NESTED:
            raise NotFolded(f"it is inside a `{node.op}`" + (": unroll it" if node.op in ("scan", "while") else ""))
    steps = [entries[0]]
    while True:
        node = steps[-1]
        if not is_step(node):
            if node in entries:
                raise NotFolded(f"its parameters enter {node}, which is no scale and bias along one axis")
            raise NotFolded(f"it is used more than once, with {node} between")
        if any(not own.issuperset(read.leaves or ()) for read in constants(node)):
            raise NotFolded(f"parameters of another layer enter it, in {node}")
        if node is entries[-1]:
            break
        if node.is_output or len(node.users) != 1:
            raise NotFolded(f"it is used more than once: its variables enter {_list(entries)}")
        steps.append(node.users[0])
    if not set(entries) <= set(steps):
        raise NotFolded(f"it is used more than once: its variables enter {_list(entries)}")
    return Norm(layer, tuple(steps))


def _list(nodes: Iterable[Node]) -> str:
    return ", ".join(dict.fromkeys(map(str, nodes)))


# --- the layer


@dataclass(frozen=True)
class Layer:
    """A convolution or product with a kernel that is a variable.

    outs, ins: which axis of the kernel, as it is stored, belongs to a dimension of the output or input.
    """

    node: Node
    kernel: KeyPath
    outs: Mapping[int, int]
    ins: Mapping[int, int]
    groups: int
    padded: bool  # zeros are put between or around the elements of the input

    @property
    def name(self) -> str:
        return name_of(self.kernel)


def layer_of(node: Node) -> Layer:
    """The layer that a node is."""
    if node.op not in ("conv_general_dilated", "dot_general"):
        raise NotFolded(f"{node}: no Dense, no Conv")
    sides = [i for i, read in enumerate(node.inputs[:2]) if read.leaves is not None]
    if len(sides) != 1:
        raise NotFolded(f"{node}, whose operands both depend on the input")
    (side,) = sides
    chain = list(origins(node.inputs[side]))
    kernel = chain[-1]
    if kernel.leaf is None:
        raise NotFolded(f"{node}, whose kernel is " + (f"computed, by {kernel}" if kernel.op else "no variable"))
    for dtype, is_float in ((kernel.dtype, kernel.is_float), (node.dtype, node.is_float)):
        if not is_float:
            raise NotFolded(f"{node} in {dtype}")
    times = len(kernel.users) + kernel.is_output
    if times != 1 or any(len(z.users) + z.is_output != 1 for z in chain):
        raise NotFolded(f"{node}, and the kernel of `{name_of(kernel.leaf)}` is used {max(2, times)} times")
    if any(math.prod(z.shape) > math.prod(z.inputs[0].shape) for z in chain[:-1]):
        raise NotFolded(f"{node}, whose kernel `{name_of(kernel.leaf)}` is broadcast")
    axes = {}  # of the operand -> of the kernel
    for axis in range(len(kernel.shape)):
        try:
            axes[follow(reversed(chain[:-1]), axis)] = axis
        except NotFolded:
            continue
    params, groups, padded = node.eqn.params, 1, False
    if node.op == "dot_general":
        contract, batch = params["dimension_numbers"]
        if batch[side]:
            raise NotFolded(f"{node}, which has another kernel for each example")
        ins = dict(zip(contract[1 - side], contract[side], strict=True))
        free = [[d for d in range(len(z.shape)) if d not in contract[i]] for i, z in enumerate(node.inputs)]
        start = len(free[0]) if side else 0
        outs = {start + i: d for i, d in enumerate(free[side])}
    else:
        dims, groups = params["dimension_numbers"], params["feature_group_count"]
        if side == 0 or params["batch_group_count"] != 1:
            raise NotFolded(f"{node} of a kernel with a kernel")
        outs, ins = {dims.out_spec[1]: dims.rhs_spec[0]}, {dims.lhs_spec[1]: dims.rhs_spec[1]}
        padded = any(n > 0 for pair in params["padding"] for n in pair) or any(n > 1 for n in params["lhs_dilation"])
    if any(d not in axes for d in (*outs.values(), *ins.values())):
        raise NotFolded(f"{node}, whose kernel `{name_of(kernel.leaf)}` is reshaped across its axes, or reversed")
    outs, ins = ({d: axes[e] for d, e in z.items()} for z in (outs, ins))
    return Layer(node, kernel.leaf, outs, ins, groups, padded)


def own_bias(layer: Layer) -> tuple[Node, KeyPath] | tuple[None, None]:
    """The step that adds a bias to what the layer gives, before anything else, and that bias."""
    node, moves = layer.node, []
    while len(node.users) == 1 and not node.is_output:
        node = node.users[0]
        if not is_move(node):
            leaf = _bias_of(node, layer, moves)
            return (node, leaf) if leaf else (None, None)
        moves.append(node)
    return None, None


def _bias_of(node: Node, layer: Layer, before: Sequence[Node]) -> KeyPath | None:
    """The variable that a step adds, where it lies beside the kernel, along the outputs, and is used for nothing else.

    before: the steps between the layer and this one.
    """
    if node.op not in ("add", "add_any") or not is_step(node):
        return None
    (constant,) = constants(node)
    chain = list(origins(constant))
    leaf = chain[-1].leaf
    if leaf is None or place(leaf)[0] != place(layer.kernel)[0] or any(len(z.users) + z.is_output != 1 for z in chain):
        return None
    try:
        lie = [follow(reversed(chain[:-1]), axis) for axis, n in enumerate(chain[-1].shape) if n > 1]
        outs = [follow(before, dim) for dim in layer.outs if layer.node.shape[dim] > 1]
    except NotFolded:
        return None
    return leaf if lie == outs else None


class Place(NamedTuple):
    """Where a norm goes: into a layer, along an axis of its kernel as it is stored."""

    layer: Layer
    axis: int
    line: Line


def place_before(norm: Norm, folded: Mapping[Node, Node]) -> Place:
    """The layer whose output the norm takes. `folded`: the layers of the steps that have gone into the one before."""
    toward, node, between = norm.steps[0], norm.input, []
    while node.op not in ("conv_general_dilated", "dot_general"):
        if not (is_move(node) or node in folded or (is_step(node) and node.op in ("add", "add_any"))):
            raise NotFolded(f"its input is {'the output of ' if node.op else ''}{node}")
        _only(node, toward, str(node))
        between.insert(0, node)
        toward, node = node, input_of(node)
    try:
        layer = layer_of(node)
    except NotFolded as error:
        raise NotFolded(f"its input is the output of {error}") from None
    _only(node, toward, f"`{layer.name}`")
    adds_bias, _ = own_bias(layer)
    for step in between:
        if not (is_move(step) or step is adds_bias or folded.get(step) is node):
            raise NotFolded(f"between `{layer.name}` and it stands {step}")
    lines = norm.lines()
    for dim, axis in layer.outs.items():
        dim = follow(between, dim)
        if dim in lines:
            return Place(layer, axis, lines[dim])
    raise NotFolded(f"its statistics do not lie along the output features of `{layer.name}`")


def place_after(norm: Norm) -> Place:
    """The layer that takes the output of the norm, and nothing else does."""
    node, moves = norm.output, []
    while True:
        if node.is_output:
            raise NotFolded("its output is one of the model")
        if len(node.users) != 1:
            raise NotFolded(f"its output is used {len(node.users)} times: by {_list(node.users)}")
        (node,) = node.users
        if not is_move(node):
            break
        moves.append(node)
    try:
        layer = layer_of(node)
    except NotFolded as error:
        raise NotFolded(f"its output goes to {error}") from None
    lines = norm.lines()
    for dim, line in lines.items():
        end = follow((*norm.steps, *moves), dim)
        if end in layer.ins:
            if layer.padded and line[1].any():
                raise NotFolded(f"`{layer.name}` puts zeros between or around its output: they would need its bias")
            return Place(layer, layer.ins[end], line)
    raise NotFolded(f"its statistics do not lie along the input features of `{layer.name}`")


def _only(node: Node, user: Node, name: str) -> None:
    """Refuse where not `user` alone reads the node."""
    if node.is_output:
        raise NotFolded(f"the output of {name} is also one of the model")
    if len(node.users) != 1:
        others = [z for z in node.users if z is not user] or [user]
        raise NotFolded(f"the output of {name} is also used by {_list(others)}")
