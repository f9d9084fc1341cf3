"""Norms of weights as modules around any module: see `jaxnorm.norms.weights`.

The module inside keeps its own parameters, untouched: for the time of a call it is given others in their place. What a
norm holds of its own lies as the kernels lie, {"Dense_0": {"kernel": {"scale": ...}}}.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, ones

from jaxnorm.errors import ArgumentError
from jaxnorm.family.base import Arrays, Entry
from jaxnorm.layout import Names, kept, meet
from jaxnorm.modules import check_names, naming
from jaxnorm.norms.weights import (
    SpectralState,
    keys,
    lengths,
    scaled_weight_standardization,
    spectral_norm,
    spectral_state,
    weight_norm,
    weight_standardization,
)

Path = tuple[str, ...]


def replace(params: Any, new: Mapping[Path, Any]) -> Any:
    """A tree of parameters with other values at these paths."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get(keys(path), leaf), params)


def nested(by_path: Mapping[Path, Any]) -> dict[str, Any]:
    """A tree in which what is held of a kernel lies where the kernel lies."""
    tree: dict[str, Any] = {}
    for path, held in by_path.items():
        at = tree
        for name in path:
            at = at.setdefault(name, {})
        at.update(held)
    return tree


def held_at(tree: Any, path: Path) -> Mapping[str, Any]:
    """What a tree holds of the kernel at a path."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            raise ArgumentError(f"nothing is held of the kernel {'/'.join(path)}: the variables are of another layer.")
        tree = tree[name]
    return tree


def start(entries: Mapping[Path, Mapping[str, Entry]], key: Any) -> dict[str, Any]:
    """What is held before any step. Without a key, for entries that need none."""
    count = sum(map(len, entries.values()))
    seeds = iter([None] * count if key is None else jax.random.split(key, count))
    return nested({
        path: {name: entry.init(next(seeds), entry.shape, entry.dtype) for name, entry in own.items()}
        for path, own in entries.items() if own
    })  # fmt: skip


def passed_on(layer: Any, use_running_average: bool | None) -> dict[str, bool]:
    """`use_running_average` for a layer that asks for it and was not told."""
    asks = "use_running_average" in inspect.signature(type(layer).__call__).parameters
    told = getattr(layer, "use_running_average", None)
    return {"use_running_average": use_running_average} if asks and not told and use_running_average is not None else {}


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Weights:
    """Every norm of weights here."""

    layout: Names | Callable[[Path, Any], Names] = "... o"
    over: Names = "..."
    where: str | Callable[[Path, Any], bool] = "kernel"
    param_dtype: Any = jnp.float32

    def _kernels(self, params: Any) -> dict[Path, jax.Array]:
        """The leaves to be normalized, by path."""
        leaves = ((keys(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0] if path)
        where = self.where
        return {p: leaf for p, leaf in leaves if (where(p, leaf) if callable(where) else p[-1] == where)}

    def _need(self, found: int, params: Any) -> None:
        if not found:
            known = ["/".join(keys(path)) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0] if path]
            known = f"they are {', '.join(known[:5])}, ..." if known else "it has none"
            raise ArgumentError(f"no parameter of the layer is where={self.where!r} asks: {known}.")

    def _need_module(self, layer: Any, kind: type) -> None:
        if not isinstance(layer, kind):
            with naming(self):
                raise ArgumentError(f"it goes around a module, an instance of {kind.__module__}.Module, got {layer!r}.")

    def _layout(self, path: Path, kernel: Any) -> Names:
        return self.layout(path, kernel) if callable(self.layout) else self.layout

    def _axes(self, layout: Names, kernel: jax.Array) -> dict[str, int]:
        """The outputs and how many there are."""
        frame = meet(layout, kernel.shape, what="kernel")
        return {name: frame.size(name) for name in frame.expand(kept(layout, self.over))}

    def _parameters(self, layout: Names, kernel: jax.Array) -> dict[str, Entry]:
        return {}

    def _statistics(self, layout: Names, kernel: jax.Array) -> dict[str, Entry]:
        return {}

    def _settle(self) -> None:
        if callable(self.layout):
            return
        with naming(self):
            check_names(self.layout, self.layout, self.over, None)

    def _entries(self, kernels: Mapping[Path, jax.Array]):
        """What is held, and how it starts: parameters, and state."""
        layouts = {path: self._layout(path, kernel) for path, kernel in kernels.items()}
        parameters = {path: self._parameters(layouts[path], kernel) for path, kernel in kernels.items()}
        return parameters, {path: self._statistics(layouts[path], kernel) for path, kernel in kernels.items()}

    def _compute(self, own: Arrays, state: Arrays, layout: Names, kernel: jax.Array, train: bool) -> tuple[Any, Arrays]:
        raise NotImplementedError

    def _step(self, own: Any, state: Any, kernels: Mapping[Path, jax.Array], train: bool):
        """The normalized kernels by path, and the new state, nested as what is given."""
        new, after = {}, {}
        for path, kernel in kernels.items():
            layout = self._layout(path, kernel)
            scale = held_at(own, path) if self._parameters(layout, kernel) else {}
            before = held_at(state, path) if self._statistics(layout, kernel) else {}
            new[path], after[path] = self._compute(scale, before, layout, kernel, train)
        return new, nested(after)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Weight(Weights):
    epsilon: float = 1e-12
    use_scale: bool = True
    scale_init: Initializer | None = None

    def _parameters(self, layout, kernel):
        def own_lengths(key, shape, dtype):
            return lengths(kernel, layout, self.over).astype(dtype)

        shape = tuple(self._axes(layout, kernel).values())
        return {"scale": Entry(self.scale_init or own_lengths, shape, self.param_dtype)} if self.use_scale else {}

    def _compute(self, own, state, layout, kernel, train):
        return weight_norm(kernel, layout, self.over, epsilon=self.epsilon, **own), state


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Standardization(Weights):
    epsilon: float = 1e-5
    use_scale: bool = False
    scale_init: Initializer = ones

    def _parameters(self, layout, kernel):
        shape = tuple(self._axes(layout, kernel).values())
        return {"scale": Entry(self.scale_init, shape, self.param_dtype)} if self.use_scale else {}

    def _compute(self, own, state, layout, kernel, train):
        return weight_standardization(kernel, layout, self.over, epsilon=self.epsilon, **own), state


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class ScaledStandardization(Standardization):
    epsilon: float = 1e-4
    use_scale: bool = True
    gain: float = 1.0

    def _compute(self, own, state, layout, kernel, train):
        options = {"gain": self.gain, "epsilon": self.epsilon}
        return scaled_weight_standardization(kernel, layout, self.over, **options, **own), state


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Spectral(Weights):
    epsilon: float = 1e-12
    num_steps: int = 1

    def _statistics(self, layout, kernel):
        axes = self._axes(layout, kernel)

        def direction(key, shape, dtype):
            return spectral_state(key, tuple(axes), **axes).u.astype(dtype)

        u = Entry(direction, tuple(axes.values()), jnp.float32)
        return {"u": u, "sigma": Entry(ones, (), jnp.float32)}

    def _compute(self, own, state, layout, kernel, train):
        before = SpectralState(**state, axes=tuple(self._axes(layout, kernel)))
        steps = self.num_steps if train else 0
        kernel, after = spectral_norm(
            kernel, before, layout, self.over, num_steps=steps, epsilon=self.epsilon
        )
        return kernel, {name: getattr(after, name) for name in state}
