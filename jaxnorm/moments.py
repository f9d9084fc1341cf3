"""Moments: count, mean and centred sum of squares along named axes. A commutative monoid under `merge`."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm import rule
from jaxnorm.errors import ArgumentError, LayoutError, named
from jaxnorm.layout import ELLIPSIS, Names, kept, meet, parse_list, place
from jaxnorm.mapped import Groups
from jaxnorm.operands import operands
from jaxnorm.sharded import keep_sharding
from jaxnorm.stats import Stats, pool, ratio


@functools.partial(jax.tree_util.register_dataclass, data_fields=["count", "mean", "m2"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and centred sum of squares of the elements averaged, one of each along the axes that are left.

        mean = sum(w x) / count,   m2 = sum(w |x - mean|^2),   count = sum(w)

    A frozen pytree. `axes` (static) says what its dimensions are; `...` among them stands for those of the layout.
    Moments of no elements have count, mean and m2 zero.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> stats = jn.moments(jnp.array([[1.0, 2.0], [3.0, 6.0]]), "n c", "n")
        >>> stats.axes, stats.mean.tolist(), stats.var.tolist(), stats.var_unbiased.tolist()
        (('c',), [2.0, 4.0], [1.0, 4.0], [2.0, 8.0])
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array
    axes: tuple[str, ...]

    @property
    def var(self) -> jax.Array:
        """m2 / count, the variance of the elements as they are; 0 where nothing was counted."""
        return ratio(self.m2, self.count)

    @property
    def var_unbiased(self) -> jax.Array:
        """m2 / (count - 1), Bessel's estimate of the variance they were drawn from; 0 up to a count of 1."""
        return ratio(self.m2, self.count - 1)

    @property
    def std(self) -> jax.Array:
        """The square root of `var`, with a zero gradient where that is 0."""
        flat = self.var <= 0
        return jnp.where(flat, 0, jnp.sqrt(jnp.where(flat, 1, self.var)))


@named
def moments(
    x: ArrayLike,
    layout: Names = "... c",
    over: Names = "...",
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    center: bool = True,
    sizes: dict[str, int] | None = None,
    groups: Groups | None = None,
) -> Moments:
    """Count, mean and centred sum of squares of `x` over named axes.

        count = sum(w),   mean = sum(w x) / count,   m2 = sum(w |x - mean|^2)

    Computed in float32 or wider about a shift near the mean, so no digit is lost to a large mean.
    Over mapped axes the moments of all devices are merged, each with its own count, in one collective.

    Args:
        x: array laid out as `layout`, real or complex.
        layout: a name for every dimension of `x`; `...` stands for any number, `(g k)` for a composed one.
        over: the axes whose elements are averaged: dimensions of `x` and mapped axes of vmap, pmap or shard_map.
            `name?` is a mapped axis that may be absent.
        mask: True where an element counts. Broadcasts against `x` as in NumPy. What stands in a masked slot, NaN
            included, reaches nothing.
        weights: how much an element counts, not negative; broadcasts like `mask`. Weight 0 is a masked slot.
        center: False gives moments about 0: mean 0, and m2 the sum of squares.
        sizes: sizes of the axes that compose a dimension, all but one of them.
        groups: {"devices": [[0, 1], [2, 3]]} averages within groups of the devices of one mapped axis.

    Returns:
        Moments along the axes of the layout that `over` leaves, in the order of the layout.

    Raises:
        LayoutError: when the layout, the shapes or the dtype of what is given do not fit.
        AxisError: when a name in `over` is neither a dimension nor a mapped axis, or is both.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[1.0, 2.0], [3.0, jnp.nan]])
        >>> stats = jn.moments(x, "n c", "n", mask=jnp.isfinite(x))
        >>> stats.count.tolist(), stats.mean.tolist(), stats.m2.tolist()
        ([2.0, 1.0], [2.0, 2.0], [2.0, 0.0])

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.

    Differs from: Flax's E[x^2] - E[x]^2, which at mean 1e4 and std 1 has no correct digit in float32; torch's
        `var_mean`, which gives the unbiased variance.
    """
    op = operands(x, layout, over, mask=mask, weights=weights, center=center, sizes=sizes, groups=groups)
    return from_stats(rule.statistics(op.plan, op.x, op.slots), op.plan.dims, kept(layout, over))


def from_stats(stats: Stats, dims: tuple[int, ...], axes: tuple[str, ...]) -> Moments:
    """The rule's statistics without the dimensions that were averaged."""
    mean = stats.shift + stats.offset
    count = jnp.broadcast_to(stats.n, mean.shape)
    return Moments(jnp.squeeze(count, dims), jnp.squeeze(mean, dims), jnp.squeeze(stats.m2, dims), axes)


@named
def empty_moments(axes: Names, **sizes: int) -> Moments:
    """Moments of no elements: the neutral element of `merge`.

        merge(empty, m) = m

    Args:
        axes: names of the axes, as "c" or ("n", "c").
        **sizes: the size of each of them, as c=64.

    Returns:
        Moments along `axes`, all zero, float32.

    Raises:
        LayoutError: when the sizes are not those of the axes.

    Example:
        >>> import jaxnorm as jn
        >>> jn.empty_moments("c", c=2).count.tolist()
        [0.0, 0.0]

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983, equation 2.1 with n = 0.

    Differs from: Flax and torch have no moments.
    """
    names, shape = named_sizes(axes, sizes)
    count, mean, m2 = (jnp.zeros(shape, jnp.float32) for _ in range(3))  # three buffers: it can be donated
    return Moments(count, mean, m2, names)


def named_sizes(axes: Names, sizes: dict[str, int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names = parse_list(axes, "axes")
    if set(names) != set(sizes) or ELLIPSIS in names:
        wanted = ", ".join(f"{name}=..." for name in names if name != ELLIPSIS)
        raise LayoutError(f"axes \"{' '.join(names)}\" need the sizes {wanted}, got {sizes}. '...' has no size here.")
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise LayoutError(f"the size of {name!r} must be an integer, got {size!r}.")
    return names, tuple(sizes[name] for name in names)


@named
def merge(*moments: Moments) -> Moments:
    """Moments of all the elements that the given moments were taken of.

        n = n1 + n2,   mean = mean1 + d n2 / n,   m2 = m2_1 + m2_2 + |d|^2 n1 n2 / n,   d = mean2 - mean1

    Associative and commutative up to rounding, with `empty_moments` as neutral element. Microbatches, steps, files,
    hosts: whatever is counted in parts is put together with this.

    Args:
        *moments: one or more Moments along the same axes, in any order of them.

    Returns:
        Moments along the axes of the first.

    Raises:
        LayoutError: when the axes or their sizes differ, or nothing is given.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> a = jn.moments(jnp.array([[0.0], [2.0]]), "n c", "n")
        >>> b = jn.moments(jnp.array([[7.0]]), "n c", "n")
        >>> both = jn.merge(a, b)
        >>> both.count.tolist(), both.mean.tolist(), both.m2.tolist()
        ([3.0], [3.0], [26.0])

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983, equations 2.1a and 2.1b.

    Differs from: Flax averages means and variances over devices, which is right only for equal counts and, for the
        variance, only of E[x^2]; torch's `update_bn` averages variances without the term in d.
    """
    if not moments:
        raise LayoutError("merge() needs at least one Moments. empty_moments(axes, **sizes) is the neutral element.")
    for m in moments:
        if not isinstance(m, Moments):
            raise ArgumentError(f"merge takes Moments, one argument each, got {type(m).__name__}.")
    head = moments[0]
    same = [transpose_to(m, head.axes) for m in moments]
    for m in same:
        if m.mean.shape != head.mean.shape:
            raise LayoutError(f"moments along {head.axes} have shapes {head.mean.shape} and {m.mean.shape}.")
    mean_dtype = functools.reduce(np.promote_types, (m.mean.dtype for m in same))
    real_dtype = functools.reduce(np.promote_types, (m.m2.dtype for m in same))
    count = jnp.stack(
        [keep_sharding(jnp.broadcast_to(m.count, m.mean.shape).astype(real_dtype), m.mean) for m in same]
    )
    mean = jnp.stack([m.mean.astype(mean_dtype) for m in same])
    m2 = jnp.stack([m.m2.astype(real_dtype) for m in same])
    n, shift, offset, m2 = pool(count, mean, jnp.zeros_like(mean), m2)
    return Moments(n, shift + offset, m2, head.axes)


def transpose_to(m: Moments, axes: tuple[str, ...]) -> Moments:
    """The same moments with their dimensions in the order of `axes`."""
    if m.axes == axes:
        return m
    if set(m.axes) != set(axes) or ELLIPSIS in axes:
        raise LayoutError(
            f"moments along {m.axes} cannot be merged with moments along {axes}: the axes must be the same."
        )
    order = [m.axes.index(name) for name in axes]
    return Moments(jnp.transpose(m.count, order), jnp.transpose(m.mean, order), jnp.transpose(m.m2, order), axes)


def known(mean: jax.Array, var: jax.Array, like: Moments) -> Moments:
    """Moments of this mean and variance along the axes of `like`, and of nothing where those are of nothing."""
    some = jnp.where(like.count > 0, 1, 0).astype(var.dtype)
    return Moments(jnp.broadcast_to(some, var.shape), mean, var, like.axes)


def broadcast_to(m: Moments, like: Moments) -> Moments:
    """The same moments, matched by name, for every entry of `like` along the axes that they lack."""
    frame = meet(like.axes, like.mean.shape, what="moments")
    own = meet(m.axes, m.mean.shape, what="moments").names

    def onto(z: jax.Array) -> jax.Array:
        return keep_sharding(jnp.broadcast_to(place(jnp.asarray(z), own, frame, "moments"), like.mean.shape), like.mean)

    count, mean, m2 = (onto(jnp.broadcast_to(z, m.mean.shape)) for z in (m.count, m.mean, m.m2))
    return Moments(count, mean, m2, like.axes)


def along(m: Moments, axes: tuple[str, ...]) -> Moments:
    """Moments as running statistics along `axes` lie: what else they lie along is merged."""
    return transpose_to(merge_along(m, tuple(name for name in m.axes if name not in axes)), axes)


def merge_along(m: Moments, names: tuple[str, ...]) -> Moments:
    """Merge the parts that lie along the named axes of one Moments (the ghosts of ghost batch norm)."""
    if not names:
        return m
    frame = meet(m.axes, m.mean.shape, what="moments")
    gone = [frame.names.index(name) for name in frame.expand(names)]
    order = gone + [i for i in range(len(frame.names)) if i not in gone]

    def front(z: jax.Array) -> jax.Array:
        z = jnp.transpose(z, order)
        return z.reshape((math.prod(z.shape[: len(gone)]), *z.shape[len(gone) :]))

    mean = front(m.mean)
    n, shift, offset, m2 = pool(front(m.count), mean, jnp.zeros_like(mean), front(m.m2))
    return Moments(n, shift + offset, m2, tuple(name for name in m.axes if name not in names))
