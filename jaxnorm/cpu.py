"""What XLA's CPU backend has to be told to fuse loops that other backends fuse by themselves.

It takes the elementwise work before a reduction into the loop only where that reduction is its one reader. What several
loops share (x - mean, a bfloat16 widened) is written out whole, and what is small (1 / sqrt(var)) is computed again for
every element. Seen in the HLO of jax 0.10.2; what comes of it is in `benchmarks/results`. Other backends fuse siblings,
which a barrier would prevent: hence `lax.platform_dependent`, of which a program keeps one branch.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

SMALL = 2**16  # elements: below, the time of a loop is that of starting it, and fewer loops are better
CACHED = 2**26  # bytes: measured where the cores share 32 MB of cache


def is_out_of_cache(x: Array) -> bool:
    """Whether reading x once more takes longer than simpler loops save. In 16 bits it never does."""
    return x.nbytes >= CACHED and x.dtype.itemsize >= 4


def _on_cpu(form: Callable, size: int, *arrays: Array):
    """What `form` makes of the arrays, for loops over so many elements; elsewhere the arrays. Forms are functions that
    stay, so that JAX traces each of them once for a type."""
    return arrays if size < SMALL else lax.platform_dependent(*arrays, cpu=form, default=_as_they_are)


def _as_they_are(*arrays: Array) -> tuple[Array, ...]:
    return arrays


@functools.cache
def _nested(copy: int) -> Callable:
    def barriers(*arrays: Array) -> tuple[Array, ...]:
        for _ in range(copy):  # each array on its own: a barrier around several types them all as varying
            arrays = tuple(map(lax.optimization_barrier, arrays))
        return arrays

    return barriers


def private(copy: int, shape: tuple[int, ...], *arrays: Array) -> tuple[Array, ...]:
    """`arrays` for one loop over `shape` alone: copies of different numbers are not merged. Not for what is linear.

    Nested, because two barriers around the same operands are one to the compiler. What is small needs it as well: its
    broadcast to the size of x would be shared.
    """
    return _on_cpu(_nested(copy), math.prod(shape), *arrays)


def _divided(z: Array) -> tuple[Array]:
    return (z / lax.optimization_barrier(jnp.ones(z.shape, z.dtype)),)


def _selected(z: Array) -> tuple[Array]:
    return (jnp.where(lax.optimization_barrier(True), z, 0),)


def summed(z: Array, shape: tuple[int, ...]) -> Array:
    """`z`, sums over an array of `shape`, as they leave the loop that takes them. What follows would else be done in
    it, one row at a time (with 65536 rows of 64 a sixth of layer norm). That loop can divide, but not select."""
    return _on_cpu(_selected, math.prod(shape), z)[0]


def settled(z: Array, shape: tuple[int, ...]) -> Array:
    """`z`, something small, computed once before the loops over `shape` that read it.

    A barrier does not hold that long: the compiler drops it and then takes cheap arithmetic into every loop. What ends
    in a division it leaves outside, and it cannot know that this one is by 1.
    """
    return _on_cpu(_divided, math.prod(shape), z)[0]


def alone() -> bool:
    """Whether a question about a whole array is one about this device: none but it, or each has its own program."""
    mesh = jax.sharding.get_abstract_mesh()
    return set(mesh.manual_axes) == set(mesh.axis_names) if mesh.manual_axes else jax.device_count() == 1


def between(shape: tuple[int, ...], dims: tuple[int, ...]) -> int | None:
    """The last of several dimensions that are summed and lie between some that are not, as in instance norm.

    Summed on its own first it leaves the others to be cut between the cores: [16, 64, 64, 64] over both 64 in the
    middle takes 1.1 ms in one go and 0.6 in two.
    """
    dims = tuple(d for d in dims if shape[d] > 1)
    left = [d for d in range(len(shape)) if d not in dims and shape[d] > 1]
    return max(dims) if len(dims) > 1 and left and left[0] < min(dims) and left[-1] > max(dims) else None


def total(z: Array, dims: tuple[int, ...]) -> Array:
    """The sum over `dims`, which stay with size 1. Other backends take both sums for one."""
    first = between(z.shape, dims)
    if first is not None:
        z = settled(z.sum(first, keepdims=True), z.shape)
    return z.sum(dims, keepdims=True)


def both(zs: Sequence[Array], dims: tuple[int, ...]) -> list[Array]:
    """The sums of several arrays in one loop. Good where they are so small that starting a loop is what takes time."""
    zeros = [jnp.zeros((), z.dtype) for z in zs]
    sums = lax.reduce(tuple(zs), tuple(zeros), lambda a, b: tuple(map(lax.add, a, b)), dims)
    return [lax.expand_dims(z, sorted(dims)) for z in sums]


def spread(z: Array, shape: tuple[int, ...]) -> Array:
    """Something small and linear on its way to `shape`: backward it is summed as by `total`."""
    first = between(shape, tuple(d for d in range(z.ndim) if z.shape[d] != shape[d]))
    if first is None:
        return z
    return settled(jnp.broadcast_to(z, tuple(1 if d == first else n for d, n in enumerate(shape))), shape)


def _product(rows: Array, columns: Array) -> Array:
    return rows * columns


def _matrix(rows: Array, columns: Array) -> Array:
    matrix = lax.dot(rows.reshape(-1, 1), columns.reshape(1, -1), precision=lax.Precision.HIGHEST)
    return matrix.reshape(np.broadcast_shapes(rows.shape, columns.shape))


def outer(rows: Array, columns: Array) -> Array:
    """`rows * columns`, which vary along the leading dimensions and along the rest, and of which one is linear.

    Backward that one is a sum of products over the dimensions of the other, and here a matrix times a vector: XLA is
    faster at that than at sums, and computes the matrix once for several of them.
    """
    return lax.platform_dependent(rows, columns, cpu=_matrix, default=_product)


def is_outer(x: Array, rows: Array, columns: Array) -> bool:
    """Whether `outer` of the size of x can be had, and is worth it."""
    leading = max((d for d, n in enumerate(rows.shape) if n > 1), default=-1)
    rest = min((d for d, n in enumerate(columns.shape) if n > 1), default=x.ndim)
    return leading < rest and x.size >= SMALL and alone() and not is_out_of_cache(x) and not jnp.iscomplexobj(x)
