"""What a model does, as a flat graph: every operation once, with what it reads and who reads it.

`jax.make_jaxpr` says it in nested programs; here what is called is written out where it is called. A node that depends
on the variables of the model alone is a constant: its value is computed when somebody asks, in float64.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxnorm.errors import ArgumentError
from jaxnorm.tools.find import KeyPath

CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
MOVES = {"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev"}  # `moved` says where to
SAME = {"stop_gradient", "copy", "copy_p", "optimization_barrier", "name", "sharding_constraint"}


class NotFolded(Exception):
    """Why a norm is not folded, in words for the user."""


class Node:
    """One array.

    leaves: of a constant the variables it depends on, as key paths; None for what depends on an input of the model.
    leaf: the key path, where it is a variable.
    users: the operations that read it and reach an output; one that reads it twice is there twice.
    """

    def __init__(self, aval: Any, eqn: Any = None, inputs: tuple["Node", ...] = (), call: str = "", index: int = 0):
        self.shape: tuple[int, ...] = tuple(getattr(aval, "shape", ()))
        self.dtype: Any = getattr(aval, "dtype", None)
        self.eqn, self.inputs, self.call, self.index = eqn, inputs, call, index
        depends = [node.leaves for node in inputs]
        self.leaves: frozenset[KeyPath] | None = None
        if eqn and not eqn.effects and None not in depends:  # what is read of a jax.Ref is no constant
            self.leaves = frozenset().union(*(leaves or () for leaves in depends))
        self.leaf: KeyPath | None = None
        self.users: list[Node] = []
        self.is_output = False
        self.order = 0
        self._known: Any = None  # the value of a source

    def __str__(self) -> str:
        if not self.op:
            return "an argument of the model" if self.leaves is None else "a constant"
        inside = f" (in `{self.call}`)" if self.call not in ("", self.op, "<lambda>") else ""
        return f"`{self.op}`{inside}"

    @property
    def op(self) -> str:
        """The name of the operation; of a source, nothing."""
        return self.eqn.primitive.name if self.eqn else ""

    @property
    def is_float(self) -> bool:
        return is_float(self.dtype)

    @property
    def value(self) -> np.ndarray:
        """Of a constant: float64 where it is a float."""
        if not isinstance(self._known, np.ndarray):
            try:
                value = np.asarray(_computed(self) if self.eqn else self._known)
            except NotFolded:
                raise
            except Exception as error:  # a random key is no array, and a shard_map is not bound to values
                raise NotFolded(f"what {self} makes of its variables cannot be computed alone") from error
            self._known = value.astype(np.float64) if jnp.issubdtype(value.dtype, jnp.floating) else value
        return self._known


def is_float(dtype: Any) -> bool:
    """Whether a dtype is of real numbers to many digits: those of 8 bits and fewer quantize, as integers do."""
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits > 8


def is_same(node: Node) -> bool:
    """Whether a node is its first input, to rounding in a dtype of the model."""
    if node.op == "convert_element_type":
        return node.is_float and node.inputs[0].is_float
    if node.op == "reduce_precision":
        held, params = jnp.finfo(node.dtype), node.eqn.params
        return params["exponent_bits"] >= held.nexp and params["mantissa_bits"] >= held.nmant
    return node.op in SAME


def is_move(node: Node) -> bool:
    """Whether a node changes no values, but perhaps where they lie."""
    return node.op in MOVES or is_same(node)


def trace(apply: Callable, variables: Any, *inputs: Any) -> list[Node]:
    """The nodes of `apply(variables, *inputs)` that reach an output, each after those it reads."""
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    if any(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for _, leaf in leaves):
        raise ArgumentError("the variables must be arrays with values: fold outside of jit and eval_shape.")
    for leaf in jax.tree.leaves(inputs):
        if isinstance(leaf, bool | str) or callable(leaf):
            raise ArgumentError(
                f"{leaf!r} is no array. What is not goes into a function: "
                "lambda variables, x: model.apply(variables, x, train=False)."
            )
    program = jax.make_jaxpr(apply)(variables, *inputs)
    nodes: list[Node] = []

    def source(aval: Any, value: Any = None, leaf: KeyPath | None = None) -> Node:
        node = Node(aval)
        if value is not None and not jnp.issubdtype(
            aval.dtype, jax.dtypes.extended
        ):  # a key of random numbers has none
            node.leaf, node._known = leaf, value
            node.leaves = frozenset() if leaf is None else frozenset([leaf])
        nodes.append(node)
        return node

    def run(program: Any, arguments: list[Node], call: str) -> list[Node]:
        """Add the nodes of a program called with these arguments. Returns those of its outputs."""
        constants, program = getattr(program, "consts", ()), getattr(program, "jaxpr", program)
        known: dict[Any, Node] = dict(zip(program.invars, arguments, strict=True))
        known |= {v: source(v.aval, c) for v, c in zip(program.constvars, constants, strict=True)}

        def read(v: Any) -> Node:
            return source(v.aval, v.val) if hasattr(v, "val") else known[v]

        for eqn in program.eqns:
            reads = [read(v) for v in eqn.invars]
            name, called = eqn.primitive.name, None
            if name in CALLS:
                called = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            elif name == "cond" and reads[0].op == "platform_index":
                called = eqn.params["branches"][-1]  # the form for every platform that has none of its own
                reads.pop(0)
            if called is not None:
                made = run(called, reads, str(eqn.params.get("name") or call))
            else:
                if eqn.effects:  # a jax.Ref or a callback: who reads it there is not seen
                    for node in reads:
                        node.is_output = True
                apart = name == "optimization_barrier"
                made = [
                    Node(v.aval, eqn, (reads[i],) if apart else tuple(reads), call, i)
                    for i, v in enumerate(eqn.outvars)
                ]
                nodes.extend(made)
            known |= zip(eqn.outvars, made, strict=True)
        return [read(v) for v in program.outvars]

    invars = program.jaxpr.invars
    arguments = [source(v.aval, leaf, path) for v, (path, leaf) in zip(invars, leaves, strict=False)]
    arguments += [source(v.aval) for v in invars[len(leaves) :]]
    for node in run(program, arguments, ""):
        node.is_output = True
    return _alive(nodes)


def _alive(nodes: list[Node]) -> list[Node]:
    alive: set[Node] = set()
    for node in reversed(nodes):
        if node.is_output or node in alive:
            alive |= {node, *node.inputs}
    nodes = [node for node in nodes if node in alive]
    for order, node in enumerate(nodes):
        node.order = order
        for read in node.inputs:
            read.users.append(node)
    return nodes


def moved(node: Node, dim: int) -> int | None:
    """Where dimension `dim` of its first input lies, in its order, in the output of a move; None: in no one place."""
    before, after = node.inputs[0].shape, node.shape
    if node.op == "transpose":
        return node.eqn.params["permutation"].index(dim)
    if node.op == "broadcast_in_dim":
        place = node.eqn.params["broadcast_dimensions"][dim]
        return place if after[place] == before[dim] else None
    if node.op == "rev":
        return None if dim in node.eqn.params["dimensions"] else dim
    if node.op not in MOVES:
        return dim
    if _transposes(node):
        return None
    lead = math.prod(before[:dim])
    return next((e for e, n in enumerate(after) if n == before[dim] and math.prod(after[:e]) == lead), None)


def _transposes(node: Node) -> bool:
    """Whether a reshape permutes dimensions first, as lax.reshape can."""
    return node.op == "reshape" and node.eqn.params["dimensions"] is not None


def origins(node: Node) -> Iterator[Node]:
    """`node` and what it is made of by moving alone, back to where that ends."""
    yield node
    while is_move(node):
        node = node.inputs[0]
        yield node


ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative,
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "square": np.square, "abs": np.abs, "exp": np.exp,
    "max": np.maximum, "min": np.minimum, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "and": np.logical_and, "or": np.logical_or, "not": np.logical_not,
}  # fmt: skip


def _computed(node: Node) -> Any:
    """NumPy's value of what norms are made of. The rest as JAX computes it, in the dtypes of the model."""
    values, params = [read.value for read in node.inputs], node.eqn.params
    if is_same(node):
        return values[0]
    if all(read.is_float or read.dtype == np.bool_ for read in (node, *node.inputs)):
        if node.op in ARITHMETIC:
            with np.errstate(all="ignore"):  # what is not finite is refused where it would be used
                return ARITHMETIC[node.op](*values)
        if node.op == "select_n":
            return np.where(values[0], values[2], values[1])
        if node.op in ("reshape", "squeeze", "expand_dims") and not _transposes(node):
            return values[0].reshape(node.shape)
        if node.op == "transpose":
            return values[0].transpose(params["permutation"])
        if node.op == "broadcast_in_dim" and len(values) == 1:
            lengths = dict(zip(params["broadcast_dimensions"], values[0].shape, strict=True))
            return np.broadcast_to(values[0].reshape([lengths.get(d, 1) for d in range(len(node.shape))]), node.shape)
    arrays = [jnp.asarray(value, read.dtype) for value, read in zip(values, node.inputs, strict=True)]
    made = node.eqn.primitive.bind(*arrays, **params)
    return made[node.index] if node.eqn.primitive.multiple_results else made
