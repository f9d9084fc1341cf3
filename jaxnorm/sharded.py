"""Dimensions that jit has cut between devices, where no axis has a name: still one collective.

A sum over a sharded dimension is global and the compiler's, but statistics are three sums of which each needs the one
before, and that would be three all-reduces. So such a dimension is split in two, `parts` and the rest: moments of every
part are taken where it lies, gathered in one go, and merged like those of named devices. What is linear (a tangent, and
backward its transpose) is stacked, so that it crosses in one sum as well.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Cut:
    """Dimension `dim` in `parts` parts: of shape (parts, size / parts) inside the rule."""

    dim: int
    parts: int

    def open(self, z: jax.Array) -> jax.Array:
        """Split the dimension; one of size 1 (of a mask, a scale) stays one."""
        n, parts = z.shape[self.dim], 1 if z.shape[self.dim] == 1 else self.parts
        return z.reshape(*z.shape[: self.dim], parts, n // parts, *z.shape[self.dim + 1 :])

    def close(self, z: jax.Array) -> jax.Array:
        parts, rest = z.shape[self.dim : self.dim + 2]
        return z.reshape(*z.shape[: self.dim], parts * rest, *z.shape[self.dim + 2 :])

    def gather(self, z: jax.Array, axis: int) -> jax.Array:
        """What all parts hold, on a new leading axis, whole on every device. `axis` is that of the parts.

        A sum of nothing but one number and zeros is exact, and it is the one form of a gather that Auto and Explicit
        axes both take without a mesh at hand; it compiles to one all-reduce.
        """
        own = jnp.eye(self.parts, dtype=bool).reshape(self.parts, *(1,) * axis, -1, *(1,) * (z.ndim - axis - 1))
        return jnp.where(own, z[None], 0).sum(axis + 1, keepdims=True)

    def spread(self, z: jax.Array, axis: int, x: jax.Array) -> jax.Array:
        """`z` once for every part, lying where the parts of x lie: backward this is a sum over the parts."""
        shape = (*z.shape[:axis], self.parts, *z.shape[axis + 1 :])
        sharding = jax.typeof(x).sharding
        names = sharding.spec[self.dim]
        if names is None:  # Auto, or x lies on one device
            return jnp.broadcast_to(z, shape)
        spec = list(jax.typeof(z).sharding.spec)
        spec[axis] = names
        return lax.broadcast_in_dim(z, shape, range(z.ndim), out_sharding=NamedSharding(sharding.mesh, P(*spec)))


def parts_of(sharding: Any, dim: int) -> int:
    """In how many parts a dimension lies, where the sharding tells: that of an array, or of an Explicit type."""
    spec = getattr(sharding, "spec", ())
    names = spec[dim] if dim < len(spec) else None
    return math.prod(sharding.mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,)) if name)


def keep_sharding(new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` as `old` lies, where Explicit axis types make that part of the type: a carry of scan keeps its type."""
    now, wanted = jax.typeof(new).sharding, jax.typeof(old).sharding
    if now.spec == wanted.spec:
        return new
    mesh = now.mesh if wanted.mesh.empty else wanted.mesh  # a constant has none
    return jax.reshard(new, NamedSharding(mesh, wanted.spec))


def replicated(z: jax.Array) -> NamedSharding | None:
    """Whole on every device, where Explicit axis types ask how the result of a contraction of z shall lie."""
    sharding = jax.typeof(z).sharding
    return NamedSharding(sharding.mesh, P()) if any(name is not None for name in sharding.spec) else None


def cut_of(x: jax.Array, dims: tuple[int, ...]) -> Cut | None:
    """How x is cut along the dimensions that are averaged, as far as it can be known when the call is traced.

    Explicit axis types say it, and so does an array outside of jit. Under Auto a program cannot see it: where
    `jax.set_mesh` names a mesh, the first dimension, where the examples of a batch lie, is taken to be cut between the
    devices of its Auto axes if it is averaged. Without a mesh nothing is guessed: a wrong number of parts would make
    the compiler gather x itself.
    """
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
    known = [parts_of(sharding, dim) for dim in range(x.ndim)]
    for dim in dims:
        if known[dim] > 1 and x.shape[dim] and x.shape[dim] % known[dim] == 0:
            return Cut(dim, known[dim])
    if not isinstance(x, Tracer) or max(known, default=1) > 1 or 0 not in dims or len(dims) == x.ndim:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    parts = math.prod(size for size, kind in kinds if kind == AxisType.Auto)
    return Cut(0, parts) if parts > 1 and x.shape[0] and x.shape[0] % parts == 0 else None
