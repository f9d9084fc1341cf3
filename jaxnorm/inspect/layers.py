"""The norms of a tree with their numbers, on the host."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxnorm.errors import ArgumentError
from jaxnorm.tools.files import array
from jaxnorm.tools.find import COLLECTIONS, MORE, STANDARD, STATE, KeyPath, NormLayer, find_norms, get, place

KNOWN = {*STANDARD.values(), *MORE, *STATE}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A norm and what it holds.

    norm: where it is, by `find_norms`; of kind "statistics" where it is a mean without a var, or the reverse.
    values: its arrays, by the standard names, as they are stored.
    own: what the tree calls them.
    """

    norm: NormLayer
    values: Mapping[str, np.ndarray]
    own: Mapping[str, str]

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
    found: dict[str, NormLayer] = {}
    for norm in _norms_and_halves(tree):
        words = norm.path.split("/")
        at = next((i for i, word in enumerate(words) if word in COLLECTIONS), None)
        path = "/".join(word for i, word in enumerate(words) if i != at)
        if path not in found:
            found[path] = dataclasses.replace(norm, path=path)
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
        )
        for norm in found.values()
    ]


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
    norms = list(find_norms(tree))
    there = {path for norm in norms for path in norm.leaves.values()}
    groups: dict[str, dict[str, tuple[KeyPath, Any]]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if path and path not in there and hasattr(leaf, "shape") and "opt_state" not in jax.tree_util.keystr(path):
            layer, name = place(path)
            groups.setdefault("/".join(layer), {})[STANDARD.get(name, name)] = path, leaf
    some = any(norm.kind == "batch" for norm in norms)
    for layer, group in groups.items():
        half = group.keys() & {"mean", "var"}
        if len(half) == 1 and group.keys() <= KNOWN and (some or len(group) > 1):
            leaves = {name: path for name, (path, _) in group.items()}
            norms.append(NormLayer(layer, "statistics", leaves, tuple(group[half.pop()][1].shape)))
    return norms


def _joined(one: NormLayer, other: NormLayer) -> NormLayer:
    """Parameters and statistics of one norm."""
    first, second = (one, other) if one.parameters else (other, one)
    kind = second.kind if second.kind in ("batch", "whitening") else "statistics"
    return NormLayer(one.path, kind, {**first.leaves, **second.leaves}, first.shape)
