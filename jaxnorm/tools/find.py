"""Which layers of a tree of arrays are norms: by the names of their variables, in any framework's tree.

| | scale | bias | mean | var | num_updates |
|---|---|---|---|---|---|
| Flax, jaxnorm | scale | bias | mean | var | num_updates |
| torch, Equinox | weight | bias | running_mean | running_var | num_batches_tracked |
| Haiku | scale | offset | mean_ema/average | var_ema/average | mean_ema/counter |
| Keras | gamma | beta | moving_mean | moving_variance | |

Structure tells batch norm from the others, whose names and shapes are one another's: layer, group and instance norm are
all "scale and bias". `where` chooses among them.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from jaxnorm.errors import ArgumentError, named, nearest
from jaxnorm.tools.report import Report

KeyPath = tuple[Any, ...]
STANDARD = {
    "scale": "scale", "gamma": "scale", "weight": "scale",
    "bias": "bias", "offset": "bias", "beta": "bias",
    "mean": "mean", "running_mean": "mean", "moving_mean": "mean",
    "var": "var", "running_var": "var", "moving_variance": "var",
    "num_updates": "num_updates", "num_batches_tracked": "num_updates",
}  # fmt: skip
# What makes a layer a norm where there are no statistics. torch's weight is every layer's: see _is_norm.
OWN = {"scale", "gamma", "query_scale", "key_scale", "mean_logits"}
NEVER = {"kernel", "embedding", "w"}
COLLECTIONS = {"params", "batch_stats", "state", "trainable_variables", "non_trainable_variables"}
# What a checkpoint calls the optimizer's part, whose moments have the names and shapes of parameters.
OPTIMIZERS = {"opt_state", "optimizer", "optimizer_state", "optimizer_states", "optimizer_state_dict"}
# Trained beside scale and bias, by norms of jaxnorm. What else lies beside a scale is no norm's.
MORE = {
    "alpha", "shift", "threshold", "v", "channel_scale", "channel_bias", "query_scale", "key_scale", "mean_logits",
    "var_logits",
}  # fmt: skip
STATE = {"mean", "var", "num_updates", "cov", "mean_hidden", "var_hidden", "var_counter"} | {
    f"past_{name}" for name in ("kernel", "mean", "var", "dmean", "dvar", "counted")
}


@dataclass(frozen=True)
class NormLayer:
    """One norm in a tree.

    path: where it lies, `block/norm`, without collections: the same for its parameters and its statistics.
    kind: "batch" where there are a mean and a var, "whitening" where there is a covariance, else the parameters it has.
    leaves: its variables, by the standard name (or their own, where they have none): jax's key path in the tree.
    shape: of its scale, or of its mean.
    """

    path: str
    kind: str
    leaves: Mapping[str, KeyPath]
    shape: tuple[int, ...]

    @property
    def parameters(self) -> tuple[KeyPath, ...]:
        """Key paths of what is trained."""
        return tuple(path for name, path in self.leaves.items() if name not in STATE)

    @property
    def state(self) -> tuple[KeyPath, ...]:
        """Key paths of what is a running average, or counts its updates."""
        return tuple(path for name, path in self.leaves.items() if name in STATE)


Where = str | Sequence[str] | Callable[[NormLayer], bool] | None


class NormTable(tuple[NormLayer, ...]):
    """Layers, in the order of their paths. Prints as a table."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Their paths."""
        return tuple(layer.path for layer in self)

    def report(self) -> Report:
        """The table, as the other tools return theirs."""
        rows = [{"norm": n.path, "kind": n.kind, "shape": n.shape, "variables": " ".join(n.leaves)} for n in self]
        return Report(f"{len(self)} norm{'s' * (len(self) != 1)}", ["norm", "kind", "shape", "variables"], rows)

    def __str__(self) -> str:
        return str(self.report())

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


@named
def find_norms(tree: Any, where: Where = None) -> NormTable:
    """The norm layers of a model, found by the names and shapes of their variables.

        mean and var                                        batch norm
        scale or gamma, and no kernel                       another norm
        weight of bias's shape, or alone and a vector       another norm, in torch's and Equinox's trees

    Args:
        tree: linen variables or params, nnx.State or module, a torch state_dict, Haiku's (params, state), Keras'
            variables by path, Equinox's modules, or nested dicts and lists. A tuple is parts of one model, parameters
            and state, whose layers have the same names. An optimizer's state is passed over: `opt_state` anywhere,
            `optimizer`, `optimizer_state`, `optimizer_states` or `optimizer_state_dict` at the root.
        where: which of them: a glob pattern on the whole path or several ("block*/bn"), or a function of NormLayer. `*`
            stands for any text, slashes included; `.` and `/` are one.

    Returns:
        NormTable: a tuple of NormLayer that prints as a table.

    Raises:
        ArgumentError: when a pattern matches no norm, or two variables claim one place.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> one, kernel = jnp.ones(4), jnp.ones((3, 4))
        >>> variables = {
        ...     "params": {"dense": {"kernel": kernel, "bias": one}, "bn": {"scale": one, "bias": one}},
        ...     "batch_stats": {"bn": {"mean": one, "var": one}},
        ... }
        >>> print(jn.tools.find_norms(variables))
        1 norm
        norm  kind   shape  variables
        ----  -----  -----  -------------------
        bn    batch  (4,)   scale bias mean var
        >>> jn.tools.find_norms({"0.weight": kernel, "1.weight": one, "1.bias": one}).paths
        ('1',)

    Source: the variables of Flax 0.12, Haiku 0.0.17, Equinox 0.13, Keras 3.15 and torch 2.13.

    Differs from: a vector `weight` alone, which is RMS norm's or the slopes of torch's PReLU: it is taken for a norm
        (kind "scale"), and `where` says otherwise. A bias alone is taken for no norm: that of a batch norm without
        scale is found where the tree has its statistics too. Nor is a `weight` of several dimensions alone, or what
        lies beside a kernel. Statistics in Equinox's State have no names, and are not found.
    """
    groups: dict[tuple[str, ...], dict[str, tuple[KeyPath, Any]]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not path or not hasattr(leaf, "shape") or optimizer_of(path):
            continue
        layer, name = place(path)
        if isinstance(tree, list):  # of layers, where a tuple is parts of one model
            layer = (word(path[0]), *layer)
        group = groups.setdefault(layer, {})
        if name in group:
            both = " and ".join(jax.tree_util.keystr(p) for p in (group[name][0], path))
            raise ArgumentError(f"{both} would both be {name!r} of {'/'.join(layer)!r}. Give one tree at a time.")
        group[name] = path, leaf
    found = [_layer(layer, group) for layer, group in groups.items() if _is_norm(group)]
    return choose(NormTable(sorted(found, key=lambda layer: natural(layer.path))), where)


class Placed(Protocol):
    """What lies somewhere in a tree."""

    @property
    def path(self) -> str: ...


L = TypeVar("L", bound=Placed)


def choose(norms: NormTable, where: Where) -> NormTable:
    """Those that `where` asks for."""
    return NormTable(chosen(norms, where))


def chosen(layers: Iterable[L], where: Any, *, argument: str = "where", what: str = "norm") -> list[L]:
    """Those of any layers that `where` asks for. A message calls it `argument`, and them `what`."""
    layers = list(layers)
    if where is None:
        return layers
    if callable(where):
        return [layer for layer in layers if where(layer)]
    paths = [layer.path for layer in layers]
    patterns = list(where) if isinstance(where, Iterable) and not isinstance(where, str) else [where]
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentError(f"{argument} must be a pattern, several, or a function of NormLayer, got {pattern!r}.")
        slashes = pattern.replace(".", "/")
        fit = {path for path in paths if fnmatch.fnmatchcase(path, slashes)}
        if not fit:
            known = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "") or "none"
            near = nearest(slashes, paths)
            raise ArgumentError(f"{argument}={pattern!r} matches no {what}.{near} There are: {known}.")
        found |= fit
    return [layer for layer in layers if layer.path in found]


def optimizer_of(path: KeyPath) -> str | None:
    """The name of the optimizer's part of a checkpoint, where a variable lies in it."""
    words = [part for key in path for part in re.split(r"[./]", word(key))]
    if "opt_state" in words:
        return "opt_state"
    first = words[isinstance(path[0], jax.tree_util.SequenceKey) and len(words) > 1]
    return first if first in OPTIMIZERS else None


def place(path: KeyPath) -> tuple[tuple[str, ...], str]:
    """The layer and the name of a variable. The layer without collections: parameters and statistics lie together."""
    keys = list(path)
    if len(keys) > 1 and word(keys[-1]) == "value":
        keys.pop()  # of an nnx.Variable, which orbax makes a dict of, or of a box with metadata
    if len(keys) > 1 and isinstance(keys[0], jax.tree_util.SequenceKey):
        keys.pop(0)  # (params, state)
    words = [part for key in keys for part in re.split(r"[./]", word(key))]
    if len(words) > 1 and words[0] in COLLECTIONS:
        words.pop(0)
    *layer, name = words
    if layer[-2:-1] == ["~"] and layer[-1] in ("mean_ema", "var_ema"):  # Haiku's moving averages are modules
        which = layer[-1].removesuffix("_ema")
        layer = layer[:-2]
        name = {"average": which, "counter": "num_updates" if which == "mean" else "var_counter"}.get(
            name, f"{which}_{name}"
        )
    return tuple(layer), name


def put(tree: Any, values: Mapping[KeyPath, Any]) -> Any:
    """The tree with these leaves in the place of its own."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree_util.tree_unflatten(treedef, [values.get(path, leaf) for path, leaf in paths])


def get(tree: Any, *paths: KeyPath) -> list[Any]:
    """The leaves at these key paths."""
    leaves = dict(jax.tree_util.tree_flatten_with_path(tree)[0])
    return [leaves[path] for path in paths]


def is_variable(node: Any) -> bool:
    """Whether a node of a tree is an nnx.Variable, which holds one value."""
    return hasattr(node, "get_metadata") and hasattr(node, "set_value")


def paired(trees: Mapping[str, Any], dtypes: bool = True) -> tuple[list[tuple[KeyPath, Any, Any]], Any]:
    """The leaves of two trees side by side, with their paths, and the tree. The trees must fit; the keys name them."""
    apart(trees)
    (a, one), (b, other) = trees.items()
    left, treedef = jax.tree_util.tree_flatten_with_path(one)
    right, second = jax.tree_util.tree_flatten_with_path(other)
    if treedef != second:
        alone = [
            f"{jax.tree_util.keystr(path)} is in {name} alone"
            for name, mine, theirs in ((a, left, dict(right)), (b, right, dict(left)))
            for path, _ in mine if path not in theirs
        ]  # fmt: skip
        why = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "") or "their containers are of other types"
        raise ArgumentError(f"{a} and {b} are different trees: {why}.")
    pairs = [(path, x, y) for (path, x), (_, y) in zip(left, right, strict=True)]
    for path, x, y in pairs:
        what = jax.tree_util.keystr(path)
        for leaf, name in ((x, a), (y, b)):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
                raise ArgumentError(f"{what} in {name} is no array, it is a {type(leaf).__name__}.")
        fit(what, {a: x, b: y}, dtypes)
    return pairs, treedef


def apart(trees: Mapping[str, Any]) -> None:
    """That two trees do not hold the same Variables of an nnx model, of which only the newest values remain."""
    a, b = ({id(z) for z in jax.tree.leaves(tree, is_leaf=is_variable) if is_variable(z)} for tree in trees.values())
    if a & b:
        raise ArgumentError(
            f"{' and '.join(trees)} hold the same nnx Variables, which a step changes in both. Keep "
            "nnx.as_pure(nnx.state(model)) of before and of after it."
        )


def fit(what: str, leaves: Mapping[str, Any], dtypes: bool = True) -> None:
    """That two arrays have one shape and dtype, or say where they have which."""
    (a, one), (b, other) = (
        (name, (getattr(leaf, "dtype", type(leaf).__name__), list(np.shape(leaf)))) for name, leaf in leaves.items()
    )
    if one[1] != other[1] or (dtypes and one[0] != other[0]):
        raise ArgumentError(f"{what} is {one[0]}{one[1]} in {a}, {other[0]}{other[1]} in {b}.")


def _layer(layer: tuple[str, ...], group: dict[str, tuple[KeyPath, Any]]) -> NormLayer:
    found = {STANDARD.get(name, name): path for name, (path, _) in group.items()}
    order = dict.fromkeys((*STANDARD.values(), *sorted(MORE | STATE)))
    leaves = {name: found[name] for name in order if name in found}
    shapes = {STANDARD.get(name, name): tuple(leaf.shape) for name, (_, leaf) in group.items()}
    if "mean" in leaves and ("var" in leaves or "cov" in leaves):
        kind = "batch" if "var" in leaves else "whitening"
    else:
        kind = "scale and bias" if {"scale", "bias"} <= leaves.keys() else "scale"
    shape = next((shapes[name] for name in ("scale", "mean") if name in shapes), next(iter(shapes.values())))
    return NormLayer("/".join(layer), kind, leaves, shape)


def _is_norm(group: dict[str, tuple[KeyPath, Any]]) -> bool:
    names = {STANDARD.get(name, name) for name in group}
    if "mean" in names and names & {"var", "cov"}:
        return True
    if group.keys() & NEVER:
        return False
    if group.keys() & OWN:
        return True
    weight, bias = (group[name][1] if name in group else None for name in ("weight", "bias"))
    if weight is None or not group.keys() <= {"weight", "bias"}:
        return False
    return weight.ndim >= 1 and weight.shape == bias.shape if bias is not None else weight.ndim == 1


def word(key: Any) -> str:
    """The text of one key of a path, whatever container it is of."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def natural(path: str) -> list[tuple[bool, int, str]]:
    """An order in which layer 10 comes after layer 2."""
    parts = re.split(r"(\d+)", path)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
