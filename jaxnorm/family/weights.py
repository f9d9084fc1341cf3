"""Norms of weights as modules around any module: see `jaxnorm.norms.weights`.

The module inside keeps its own parameters, untouched: for the time of a call it is given others in their place. What a
norm holds of its own is kept by the path of the kernel, {"Dense_0/kernel": {"scale": ...}}.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, ones

from jaxnorm.dropin import check_names, naming
from jaxnorm.errors import ArgumentError
from jaxnorm.family.base import Arrays, Entry
from jaxnorm.layout import Names, kept, meet
from jaxnorm.norms.weights import (
    SpectralState,
    lengths,
    scaled_weight_standardization,
    spectral_norm,
    spectral_state,
    weight_norm,
    weight_standardization,
)


def _keys(path: tuple) -> tuple[str, ...]:
    """The keys down to a leaf, without the box around it: flax.linen's Partitioned, nnx's Variable."""
    names = tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
    return names[:-1] if names[-1:] == ("value",) else names


def replace(params: Any, new: Mapping[str, Any]) -> Any:
    """A tree of parameters with other values at these paths."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get("/".join(_keys(path)), leaf), params)


def start(entries: Mapping[str, Mapping[str, Entry]], key: Any) -> dict[str, dict[str, jax.Array]]:
    """What is held before any step, by path and name. Without a key, for entries that need none."""
    count = sum(map(len, entries.values()))
    keys = iter([None] * count if key is None else jax.random.split(key, count))
    return {
        path: {name: entry.init(next(keys), entry.shape, entry.dtype) for name, entry in own.items()}
        for path, own in entries.items()
    }


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Weights:
    """Every norm of weights here."""

    layout: Names = "... o"
    over: Names = "..."
    where: str | Callable = "kernel"
    param_dtype: Any = jnp.float32

    def _kernels(self, params: Any) -> dict[str, jax.Array]:
        """The leaves to be normalized, by path."""
        found, leaves = {}, jax.tree_util.tree_flatten_with_path(params)[0]
        for path, leaf in leaves:
            names = _keys(path)
            if self.where(names, leaf) if callable(self.where) else names[-1] == self.where:
                found["/".join(names)] = leaf
        if not found:
            known = ", ".join("/".join(_keys(path)) for path, _ in leaves[:5])
            raise ArgumentError(f"no parameter of the layer is where={self.where!r} asks: they are {known}, ...")
        return found

    def _axes(self, kernel: jax.Array) -> dict[str, int]:
        """The outputs and how many there are."""
        frame = meet(self.layout, kernel.shape, what="kernel")
        return {name: frame.size(name) for name in frame.expand(kept(self.layout, self.over))}

    def _parameters(self, kernel: jax.Array) -> dict[str, Entry]:
        return {}

    def _statistics(self, kernel: jax.Array) -> dict[str, Entry]:
        return {}

    def _settle(self) -> None:
        with naming(self):
            check_names(self.layout, self.layout, self.over, None)

    def _entries(self, kernels: Mapping[str, jax.Array]):
        """What is held, and how it starts: parameters, and state."""
        held = {path: (self._parameters(kernel), self._statistics(kernel)) for path, kernel in kernels.items()}
        return {path: both[0] for path, both in held.items()}, {path: both[1] for path, both in held.items()}

    def _compute(self, own: Arrays, state: Arrays, kernel: jax.Array, train: bool) -> tuple[jax.Array, Arrays]:
        raise NotImplementedError

    def _step(self, own: Arrays, state: Arrays, kernels: Mapping[str, jax.Array], train: bool):
        """The normalized kernels and the new state, by path as all that is given."""
        both = {
            path: self._compute(own.get(path, {}), state.get(path, {}), kernel, train)
            for path, kernel in kernels.items()
        }
        return {path: kernel for path, (kernel, _) in both.items()}, {path: new for path, (_, new) in both.items()}


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Weight(Weights):
    epsilon: float = 1e-12
    use_scale: bool = True
    scale_init: Initializer | None = None

    def _parameters(self, kernel):
        def own_lengths(key, shape, dtype):
            return lengths(kernel, self.layout, self.over).astype(dtype)

        shape = tuple(self._axes(kernel).values())
        return {"scale": Entry(self.scale_init or own_lengths, shape, self.param_dtype)} if self.use_scale else {}

    def _compute(self, own, state, kernel, train):
        return weight_norm(kernel, self.layout, self.over, epsilon=self.epsilon, **own), state


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Standardization(Weights):
    epsilon: float = 1e-5
    use_scale: bool = False
    scale_init: Initializer = ones

    def _parameters(self, kernel):
        shape = tuple(self._axes(kernel).values())
        return {"scale": Entry(self.scale_init, shape, self.param_dtype)} if self.use_scale else {}

    def _compute(self, own, state, kernel, train):
        return weight_standardization(kernel, self.layout, self.over, epsilon=self.epsilon, **own), state


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class ScaledStandardization(Standardization):
    epsilon: float = 1e-4
    use_scale: bool = True
    gain: float = 1.0

    def _compute(self, own, state, kernel, train):
        options = {"gain": self.gain, "epsilon": self.epsilon}
        return scaled_weight_standardization(kernel, self.layout, self.over, **options, **own), state


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Spectral(Weights):
    epsilon: float = 1e-12
    num_steps: int = 1

    def _statistics(self, kernel):
        axes = self._axes(kernel)

        def direction(key, shape, dtype):
            return spectral_state(key, tuple(axes), **axes).u.astype(dtype)

        u = Entry(direction, tuple(axes.values()), jnp.float32)
        return {"u": u, "sigma": Entry(ones, (), jnp.float32)}

    def _compute(self, own, state, kernel, train):
        before = SpectralState(**state, axes=tuple(self._axes(kernel)))
        steps = self.num_steps if train else 0
        kernel, after = spectral_norm(
            kernel, before, self.layout, self.over, num_steps=steps, epsilon=self.epsilon
        )
        return kernel, {name: getattr(after, name) for name in state}
