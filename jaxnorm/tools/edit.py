"""A tree whose kernels and biases take up scales and biases, and from which norms go. The rest stays as it is."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import DictKey, GetAttrKey, SequenceKey, keystr

from jaxnorm.errors import ArgumentError
from jaxnorm.tools import files
from jaxnorm.tools.adjacent import Line, name_of
from jaxnorm.tools.find import KeyPath, NormLayer, place, put
from jaxnorm.tools.models import dtype_of, like
from jaxnorm.tools.trace import NotFolded, is_float

BIAS = {"kernel": "bias", "weight": "bias", "w": "b"}  # what the bias beside a kernel is called
PARTNER = {"scale": "bias", "bias": "scale", "gamma": "beta", "beta": "gamma", "weight": "bias", "offset": "scale"}


class Edit:
    """Changes to a tree. Arithmetic is float64; a change that is refused leaves all as it was."""

    def __init__(self, tree: Any):
        self.tree = tree
        self.leaves: dict[KeyPath, Any] = dict(jax.tree_util.tree_flatten_with_path(tree)[0])
        self.layers: dict[str, dict[str, KeyPath]] = {}  # layer -> name -> key path
        for path in self.leaves:
            layer, name = place(path)
            self.layers.setdefault("/".join(layer), {})[name] = path
        self._new: dict[KeyPath, np.ndarray] = {}  # values; some at paths that the tree does not have yet
        self._beside: dict[KeyPath, KeyPath] = {}  # such a path -> the variable whose kind it is of
        self._gone: set[KeyPath] = set()

    def after(self, kernel: KeyPath, bias: KeyPath | None, outs: Sequence[int], axis: int, line: Line) -> None:
        """Take up what follows a layer: kernel * scale, bias * scale + shift, along one of its output axes."""
        scale, shift = line
        k, (bias, old) = self.value(kernel), self._bias(kernel, bias, outs)
        spread = [-1 if a == axis else 1 for a in outs]
        self._set(kernel, k * _at(scale, axis, k), bias, old * scale.reshape(spread) + shift.reshape(spread))

    def before(
        self, kernel: KeyPath, bias: KeyPath | None, outs: Sequence[int], axis: int, line: Line, groups: int
    ) -> None:
        """Take up what precedes a layer: kernel * scale along an input axis, bias + the sum of kernel * shift."""
        k, (bias, old) = self.value(kernel), self._bias(kernel, bias, outs)
        scale, shift = (_at(z, axis, k) if groups == 1 else _grouped(z, axis, outs[0], k, groups) for z in line)
        summed = (k * shift).sum(axis=tuple(a for a in range(k.ndim) if a not in outs))
        self._set(kernel, k * scale, bias, old + summed.transpose([sorted(outs).index(a) for a in outs]))

    def remove(self, norm: NormLayer) -> None:
        """Take a norm out."""
        self._gone |= set(norm.leaves.values())

    def scale_and_shift(self, norm: NormLayer, line: Line) -> None:
        """Leave of a norm the scale and bias that it is, in its parameters."""
        own = {name: norm.leaves[name] for name in ("scale", "bias") if name in norm.leaves}
        if not own:
            raise NotFolded("it has no scale and no bias to hold its statistics")
        (beside, *_) = own.values()
        new: dict[KeyPath, np.ndarray] = {}
        for name, value in zip(("scale", "bias"), line, strict=True):
            path = own.get(name) or _renamed(beside, PARTNER[place(beside)[1]])
            value = np.broadcast_to(value, np.prod(norm.shape, dtype=int)).reshape(self.leaves[beside].shape)
            self._beside[path] = beside
            self._check(path, value)
            new[path] = value
        self._new |= new
        self._gone |= set(norm.leaves.values()) - set(own.values())

    def result(self) -> Any:
        """The tree, changed."""
        arrays = {path: self._array(path, value) for path, value in self._new.items()}
        tree = put(self.tree, {path: array for path, array in arrays.items() if path in self.leaves})
        more = {_bare(path): (_bare(self._beside[path]), arrays[path]) for path in arrays if path not in self.leaves}
        gone = {_bare(path) for path in self._gone}
        done: set[KeyPath] = set()
        tree = _rebuilt(tree, (), gone, more, done)
        left = (gone | more.keys()) - done
        if left:
            raise ArgumentError(
                f"{keystr(min(left, key=keystr))} is an attribute of an object, and those can be neither removed nor "
                "added. Give nested dicts or an nnx.State: nnx.state(module)."
            )
        return tree

    def value(self, path: KeyPath) -> np.ndarray:
        """What is at a path, so far."""
        if path in self._new:
            return self._new[path]
        leaf = self.leaves[path]
        if isinstance(leaf, Tracer | jax.ShapeDtypeStruct) or not hasattr(leaf, "dtype"):
            raise ArgumentError(f"{keystr(path)} must be an array with values, got {type(leaf).__name__}.")
        if not is_float(dtype_of(leaf)):
            raise NotFolded(f"{keystr(path)} holds {leaf.dtype}")
        return files.array(leaf).astype(np.float64)

    def _bias(self, kernel: KeyPath, bias: KeyPath | None, outs: Sequence[int]) -> tuple[KeyPath, np.ndarray]:
        """Where the bias lies, or will lie, and what it is along the output axes of the kernel."""
        layer, name = place(kernel)
        shape = [self.leaves[kernel].shape[a] for a in outs]
        if bias is None:
            there = self.layers["/".join(layer)].get(BIAS.get(name, "bias"))
            if there is not None:
                raise NotFolded(f"{keystr(there)} is not what is added to the output of `{name_of(kernel)}`")
            if name not in BIAS:
                raise NotFolded(f"`{name_of(kernel)}` has no bias, and {name!r} does not say how one would be called")
            bias = _renamed(kernel, BIAS[name])
            self._beside[bias] = kernel
            return bias, self._new.get(bias, np.zeros(shape))
        old = self.value(bias)
        if old.size != np.prod(shape, dtype=int):
            raise NotFolded(f"{keystr(bias)} has {old.size} elements, the outputs of `{name_of(kernel)}` {shape}")
        return bias, old.reshape(shape)

    def _set(self, kernel: KeyPath, new_kernel: np.ndarray, bias: KeyPath, new_bias: np.ndarray) -> None:
        new = {kernel: new_kernel, bias: new_bias}
        for path, value in new.items():
            self._check(path, value)
        self._new |= new

    def _check(self, path: KeyPath, value: np.ndarray) -> None:
        """That the dtype of a variable holds a value to its last digit: it is finite, and does not become 0."""
        dtype = dtype_of(self._as(path))
        with np.errstate(all="ignore"):
            off = np.abs(value.astype(dtype).astype(np.float64) - value).max(initial=0)
        if not off <= float(jnp.finfo(dtype).eps) * np.abs(value).max(initial=0):
            raise NotFolded(f"{keystr(path)} in {dtype} cannot hold what it would become")

    def _as(self, path: KeyPath) -> Any:
        """The variable of whose kind the one at `path` is: its old value, or that beside it."""
        return self.leaves[path if path in self.leaves else self._beside[path]]

    def _array(self, path: KeyPath, value: np.ndarray) -> Any:
        old = self._as(path)
        if path in self.leaves:
            value = value.reshape(old.shape)
        value = value.astype(dtype_of(old))
        if not isinstance(old, jax.Array):
            return like(old, value)
        return jax.device_put(value, old.sharding) if path in self.leaves and old.committed else jnp.asarray(value)


def _at(z: np.ndarray, axis: int, kernel: np.ndarray) -> np.ndarray:
    return z.reshape([-1 if a == axis else 1 for a in range(kernel.ndim)])


def _grouped(z: np.ndarray, axis: int, out: int, kernel: np.ndarray, groups: int) -> np.ndarray:
    """What belongs to the input channels, for each pair of output and input: outputs read those of their group."""
    inputs, outputs = kernel.shape[axis], kernel.shape[out]
    pairs = np.broadcast_to(z, groups * inputs).reshape(groups, inputs).repeat(outputs // groups, axis=0)
    return (pairs if out < axis else pairs.T).reshape(
        [n if a in (out, axis) else 1 for a, n in enumerate(kernel.shape)]
    )


def _bare(path: KeyPath) -> KeyPath:
    """Without the attribute of the variable or box that the array is in."""
    return path[:-1] if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value" else path


def _renamed(path: KeyPath, name: str) -> KeyPath:
    """The path of a variable beside this one."""
    bare = _bare(path)
    key = getattr(bare[-1], "key", None)
    return (*bare[:-1], DictKey(re.sub(r"[^./]+$", name, key) if isinstance(key, str) else name))


def _rebuilt(
    tree: Any, path: KeyPath, gone: set[KeyPath], more: Mapping[KeyPath, Any], done: set[KeyPath], inside: Any = None
) -> Any:
    """The containers without what is gone, and without those that this empties; with what comes to them."""
    if isinstance(tree, Mapping):
        kept = {}
        for key, child in tree.items():
            at = (*path, DictKey(key))
            if at in gone:
                done.add(at)
                continue
            new = _rebuilt(child, at, gone, more, done, type(tree))
            if not (isinstance(child, Mapping) and child and not new):
                kept[key] = new
        for at, (beside, array) in more.items():
            if at[:-1] == path:
                done.add(at)
                kept[at[-1].key] = _boxed(array, tree[beside[-1].key])
        # an nnx.State shows the dicts in it as more of its kind, as a FrozenDict does
        return kept if type(tree) is inside else type(tree)(kept)  # type: ignore[call-arg]
    if isinstance(tree, list | tuple):
        items = [_rebuilt(z, (*path, SequenceKey(i)), gone, more, done) for i, z in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def _boxed(array: Any, beside: Any) -> Any:
    """In an nnx.Variable of the type of this one. A box of flax.linen that names the axes of a kernel fits no bias."""
    if isinstance(beside, type(array)):
        return array
    try:
        return type(beside)(array)
    except TypeError:
        return array
