"""The norms of a tree with their numbers, on the host."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxnorm.errors import ArgumentError
from jaxnorm.tools.files import array
from jaxnorm.tools.find import (
    COLLECTIONS,
    MORE,
    STANDARD,
    STATE,
    KeyPath,
    NormLayer,
    find_norms,
    get,
    optimizer_of,
    place,
    word,
)

KNOWN = {*STANDARD.values(), *MORE, *STATE}
TRAINED = {"params", "trainable_variables"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A norm and what it holds.

    norm: where it is, by `find_norms`; of kind "statistics" where it is a mean without a var, or the reverse.
    values: its arrays, by the standard names, as they are stored.
    own: what the tree calls them.
    root: where its model lies, "" or what stands before its collection: "gan/g" of gan/g/params/bn.
    """

    norm: NormLayer
    values: Mapping[str, np.ndarray]
    own: Mapping[str, str]
    root: str = ""

    @property
    def path(self) -> str:
        """Where it lies, without collections."""
        return self.norm.path

    @property
    def averaged(self) -> bool:
        """Whether it has running statistics, whole ones."""
        return self.norm.kind in ("batch", "whitening")

    def wide(self, name: str) -> Any:
        """In double precision; of a covariance the diagonal; None where there is none."""
        if name == "var" and "cov" in self.values:
            return np.diagonal(self.values["cov"], axis1=-2, axis2=-1).astype(np.float64)
        if name not in self.values:
            return None
        z = self.values[name]
        return z.astype(np.complex128 if np.iscomplexobj(z) else np.float64)


def layers_of(tree: Any) -> list[Layer]:
    """Every norm of a tree. Parameters and statistics are brought together however deep their collections lie."""
    some = jax.tree.leaves(tree)
    if tree is None or (some and not any(hasattr(leaf, "shape") for leaf in some)):
        raise ArgumentError(
            f"there is no array in it, a {type(tree).__name__}. Give the variables; those in a file are read by "
            "jaxnorm.tools.read(path)."
        )
    found: dict[str, NormLayer] = {}
    roots: dict[str, str] = {}
    for norm in _norms_and_halves(tree):
        words = norm.path.split("/")
        at = next((i for i, word in enumerate(words) if word in COLLECTIONS), None)
        path = "/".join(word for i, word in enumerate(words) if i != at)
        if path not in found:
            found[path] = dataclasses.replace(norm, path=path)
            roots[path] = "/".join(words[:at]) if at else ""
        elif found[path].leaves.keys() & norm.leaves.keys():  # two norms, not two parts of one
            found[norm.path] = norm
        else:
            found[path] = _joined(found[path], norm)
    leaves = iter(get(tree, *(at for norm in found.values() for at in norm.leaves.values())))
    return [
        Layer(
            norm,
            {name: host(next(leaves), at) for name, at in norm.leaves.items()},
            {name: place(at)[1] for name, at in norm.leaves.items()},
            roots.get(path, ""),
        )
        for path, norm in found.items()
    ]


def steps_of(tree: Any) -> int | None:
    """How many steps a training state has made: its own `step`, or the largest `count` of its optimizer."""
    counts = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        words = _words(path)
        if words[-1:] == ["value"]:  # of an nnx.Variable
            words.pop()
        if words == ["step"] or (words[-1:] == ["count"] and optimizer_of(path)):
            z = host(leaf, path) if hasattr(leaf, "shape") else np.asarray(leaf)
            counts += [int(z)] if z.ndim == 0 and z.dtype.kind in "iu" else []
    return max(counts, default=None)


def _words(path: KeyPath) -> list[str]:
    return [part for key in path for part in re.split(r"[./]", word(key))]


def host(leaf: Any, at: KeyPath) -> np.ndarray:
    """An array's numbers."""
    name = jax.tree_util.keystr(at)
    if isinstance(leaf, Tracer):
        raise ArgumentError(f"{name} is traced, and this looks at numbers. Call it outside of jit.")
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise ArgumentError(
            f"{name} lies on several processes. Gather it first: "
            "jax.experimental.multihost_utils.process_allgather(tree, tiled=True)."
        )
    z = array(leaf)
    if z.dtype.kind in "OSUMm":
        raise ArgumentError(f"{name} is no array of numbers, it is a {type(leaf).__name__}.")
    return z


def _norms_and_halves(tree: Any) -> list[NormLayer]:
    """With a mean without a var, or the reverse, where `find_norms` sees no norm."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    apart = any((COLLECTIONS - TRAINED) & {*_words(path)} for path, _ in leaves)  # a place of their own for statistics

    def trained(path: KeyPath) -> bool:  # and called mean or var: of a prior, a likelihood
        return apart and bool(TRAINED & {*_words(path)})

    norms = [norm for norm in find_norms(tree) if norm.parameters or not all(map(trained, norm.leaves.values()))]
    there = {path for norm in norms for path in norm.leaves.values()}
    groups: dict[str, dict[str, tuple[KeyPath, Any]]] = {}
    for path, leaf in leaves:
        if path and path not in there and hasattr(leaf, "shape") and not optimizer_of(path) and not trained(path):
            layer, name = place(path)
            groups.setdefault("/".join(layer), {})[STANDARD.get(name, name)] = path, leaf
    some = any(norm.kind == "batch" for norm in norms)
    for layer, group in groups.items():
        half = group.keys() & {"mean", "var"}
        if len(half) == 1 and group.keys() <= KNOWN and (some or len(group) > 1):
            own = {name: path for name, (path, _) in group.items()}
            norms.append(NormLayer(layer, "statistics", own, tuple(group[half.pop()][1].shape)))
    return norms


def _joined(one: NormLayer, other: NormLayer) -> NormLayer:
    """Parameters and statistics of one norm."""
    first, second = (one, other) if one.parameters else (other, one)
    kind = second.kind if second.kind in ("batch", "whitening") else "statistics"
    return NormLayer(one.path, kind, {**first.leaves, **second.leaves}, first.shape)
