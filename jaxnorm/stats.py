"""Statistics of x over dimensions and devices, and their tangent map: half of the arithmetic (`rule.py` is the other).

    count = sum(w),   mean = sum(w x) / count,   m2 = sum(w |x - mean|^2)

With c = x - mean the tangent map, linear in the tangents of x and of the weights, is

    d count = sum(dw),   d mean = (sum(w dx) + sum(dw c)) / count,   d m2 = 2 sum(w Re(conj(c) dx)) + sum(dw |c|^2)

A mean is carried as the pair shift + offset: shift is any number near the mean, constant under differentiation, offset
the small rest. x - shift is exact or nearly so however large the mean is, and no digit of c is lost: the variance of
N(1e6, 1) in float32 comes out to 1e-7, where x - mean with one rounded mean gives 7e-3. Sums are taken about the shift,
and moved to the mean with the offset, which is so small that nothing cancels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxnorm import cpu
from jaxnorm.mapped import Mapped
from jaxnorm.sharded import Cut, keep_sharding

ROWWISE = 2  # the copy of x that the sums along rows, and what is made of them, have in common
PART = 16  # the shift is taken from one part of so many (_part)
FAR = 0.7  # standard deviations: of a mean that is larger digits are lost that show (_mean)
MANY = 256  # elements averaged: of fewer, some mean among many is far from 0 by chance


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a call: the dimensions and mapped axes averaged, whether the mean is, the dtype of y."""

    dims: tuple[int, ...]
    mapped: Mapped
    center: bool
    dtype: str
    cut: Cut | None = None
    groups: int = 0  # the last dimension is that many groups of channels averaged together
    in_one_kernel: bool = False  # from x to y, as whole rows are without a gradient: x is read once

    @property
    def local(self) -> tuple[int, ...]:
        """The dimensions averaged inside the rule, where the one that is cut is two, of which the first is kept."""
        return self.dims if self.cut is None else tuple(d + (d >= self.cut.dim) for d in self.dims)

    def averaged(self, x: Array) -> int:
        """How many elements of `x` are averaged together, masked ones too."""
        return math.prod(x.shape[d] for d in self.local) * (x.shape[-1] // self.groups if self.groups else 1)


class Slots(NamedTuple):
    """Which elements count and how much, broadcastable to x; and which devices do (see `Mapped.member`)."""

    valid: Array | None = None
    weights: Array | None = None
    member: Array | None = None


class Stats(NamedTuple):
    """Statistics with the rank of x and size 1 along what was averaged. The mean is shift + offset."""

    n: Any  # the count; size 1 also where it does not vary. Inside of the rules a float where it is known
    shift: Array
    offset: Array
    m2: Array


def wide(dtype: Any) -> Any:
    """The dtype statistics are computed in: float32 or wider, complex where x is."""
    return np.promote_types(dtype, np.float32)  # NumPy's: jnp's refuses under strict dtype promotion


def real_of(dtype: Any) -> Any:
    return jnp.finfo(dtype).dtype


def ratio(a: Array, n: Array | float) -> Array:
    """a / n, and 0 with a zero gradient where n is not positive. NaN stays NaN. A float is known to be positive."""
    if isinstance(n, float | int):
        return a / n
    none = n <= 0
    return jnp.where(none, 0, a / like(jnp.where(none, 1, n), a))


def like(a: Array, z: Array) -> Array:
    """`a` in the dtype of `z`: a real factor of complex numbers, which strict dtype promotion wants said."""
    return a.astype(z.dtype)


def abs_sq(z: Array) -> Array:
    return jnp.real(z) ** 2 + jnp.imag(z) ** 2 if jnp.iscomplexobj(z) else z * z


def pool(n: Array, shift: Array, offset: Array, m2: Array) -> tuple[Array, Array, Array, Array]:
    """Merge along the leading axis. A mean is kept as the pair shift + offset: a number near it, and the rest.

    With N = sum n_i and s = sum(n_i shift_i) / N, rounded (any number near the mean would do),

        o_i = (shift_i - s) + offset_i,   offset = sum(n_i o_i) / N,   m2 = sum(m2_i + n_i |o_i - offset|^2)

    (Chan, Golub and LeVeque 1983, for many parts at once.) Only differences from s are squared, so no digit is lost
    where the mean is large; m2 is a sum of squares, so it is never negative. Sums and no gather along the leading
    axis: it may be sharded.
    """
    some = n > 0
    total = n.sum(0)
    s = jax.lax.stop_gradient(_rounded(ratio(jnp.where(some, like(n, shift) * shift, 0).sum(0), total)))
    o = jnp.where(some, (shift - s[None]) + offset, 0)
    mean = ratio((like(n, o) * o).sum(0), total)
    return total, s, mean, (jnp.where(some, m2, 0) + n * abs_sq(o - mean[None])).sum(0)


def clean(x: Array, dx: Array, slots: Slots) -> Array:
    """`dx` (x itself, or its tangent) widened, with 0 in masked slots where x is not finite."""
    dx = dx.astype(wide(x.dtype))
    return dx if slots.valid is None else jnp.where(slots.valid | jnp.isfinite(x), dx, 0)


def _counted(z: Array, slots: Slots, weights: Array | None) -> Array:
    """`z` by its weights, in the slots that count. Masked ones are selected away, on both sides, before any product."""
    if slots.valid is not None:
        z = jnp.where(slots.valid, z, 0)
    if weights is not None:
        z = z * like(weights if slots.valid is None else jnp.where(slots.valid, weights, 0), z)
    return z


def _sum(z: Array, plan: Plan, slots: Slots, weights: Array | None = None) -> Array:
    z = _counted(z, slots, slots.weights if weights is None else weights)
    return _of_groups(plan, cpu.total(z, plan.local))


def _of_groups(plan: Plan, z: Array) -> Array:
    """Sums of channels added up to sums of groups. Apart from the sum over space: that is much smaller then."""
    return z.reshape(*z.shape[:-1], plan.groups, -1).sum(-1) if plan.groups else z


def by_channel(plan: Plan, x: Array, *rows: Array) -> list[Array]:
    """What every channel has of its group. Repeated before it meets x, and not inside of the loop over x."""
    if not plan.groups:
        return list(rows)
    each = x.shape[-1] // plan.groups
    rows = tuple(jnp.broadcast_to(z[..., None], (*z.shape, each)).reshape(*z.shape[:-1], -1) for z in rows)
    return [cpu.settled(z, x.shape) for z in rows]


def _count(plan: Plan, x: Array, slots: Slots, weights: Array | None) -> Array:
    """The sum of the weights, from the mask's own shape: nothing the size of x is made for it."""
    w = jnp.ones((1,) * x.ndim, real_of(wide(x.dtype))) if weights is None else weights.astype(real_of(wide(x.dtype)))
    if slots.valid is not None:
        w = jnp.where(slots.valid, w, 0)
    repeats = math.prod(x.shape[d] for d in plan.local if w.shape[d] != x.shape[d])
    w = w.sum(plan.local, keepdims=True)
    if plan.groups and w.shape[-1] == 1:
        repeats *= x.shape[-1] // plan.groups
    elif plan.groups:
        w = _of_groups(plan, w)
    return w * float(repeats)  # as an int it may pass int32


def _whole(plan: Plan, x: Array, slots: Slots) -> float | None:
    """How many elements are averaged here, where that is known: nothing is masked or weighted, and there are some."""
    if slots.valid is not None or slots.weights is not None:
        return None
    return float(plan.averaged(x)) or None


def with_known_count(plan: Plan, x: Array, slots: Slots, stats: Stats) -> Stats:
    """The statistics, of all devices, with a count that is a number where it is known: then no loop asks about it."""
    n = _whole(plan, x, slots)
    if n is None or slots.member is not None:
        return stats
    return stats._replace(n=n * plan.mapped.size * (plan.cut.parts if plan.cut else 1))


def _dot(c: Array, d: Array) -> Array:
    return jnp.real(jnp.conj(c) * d) if jnp.iscomplexobj(c) else c * d


def _rounded(shift: Array) -> Array:
    """`shift` with one bit less, so that every loop sees the same number.

    XLA computes sum * (1 / n) again inside each loop that uses it, and contracts it with the subtraction there: each
    loop would see another shift, off by a rounding of the mean (seen: 6 times the error in y at mean 100). An
    optimization_barrier does not hold that late; a rounding that changes the value has to be carried out.
    """
    if jnp.iscomplexobj(shift):
        return jax.lax.complex(_rounded(jnp.real(shift)), _rounded(jnp.imag(shift)))
    info = jnp.finfo(shift.dtype)
    return jax.lax.reduce_precision(shift, info.nexp, info.nmant - 1)


def centred(plan: Plan, x: Array, slots: Slots, copy: int, *means: Array) -> Array:
    """x - shift, exact or nearly so, and - offset if that is given, for one loop; x itself where the mean stays."""
    x, *rows = cpu.private(copy, x.shape, x, *(by_channel(plan, x, *means) if plan.center else ()))
    c = clean(x, x, slots)
    for mean in rows:
        c = c - mean
    return c


def _part(plan: Plan, x: Array, slots: Slots) -> Array | None:
    """A sixteenth of what is averaged, or somewhat more: enough for a shift. None where it is not worth it or not here.

    The mean of any k of n elements is at most sqrt(var (n - k) / k) from that of all (Samuelson 1968). So whatever
    stands there, moving the sums about it to the mean makes their rounding errors at most some 15 times as large (4e-6
    of the variance, seen), and where the part is like the rest not at all. Under a mask or weights a part may hold
    nothing, and of an array that is sharded it lies on one device.
    """
    dims = [d for d in plan.local if x.shape[d] >= 2 * PART]
    if not dims or x.size < cpu.SMALL or not cpu.alone() or slots.valid is not None or slots.weights is not None:
        return None
    return jax.lax.slice_in_dim(x, 0, -(-x.shape[dims[0]] // PART), axis=dims[0])


def _mean(plan: Plan, x: Array, slots: Slots, n: Array | float) -> tuple[Array, Array, Array]:
    """The mean as shift and offset, and m2.

    Where siblings fuse, the sums about the shift are one pass over x, and so is all of it with a shift that a part of x
    gives: not where one kernel has a whole row, whose sums cost nothing. On CPU a sum of x - shift takes twice as long
    as one of x, so the sums about 0 come first; those about the mean follow where some mean is far from 0.
    """

    def near_the_mean(first: Array, n: Array | float) -> Array:
        return cpu.settled(_rounded(ratio(first, n)), x.shape)

    def shift_of(x: Array, n: Array | float) -> Array:
        return near_the_mean(_sum(clean(x, x, slots), plan, slots), n)

    def sums_about(shift: Array, x: Array) -> tuple[Array, Array]:
        first, second = (centred(plan, x, slots, copy, shift) for copy in (1, 2))
        return _sum(first, plan, slots), _sum(abs_sq(second), plan, slots)

    def in_two_passes(x: Array) -> tuple[Array, Array, Array]:
        shift = shift_of(x, n)
        first, square = sums_about(shift, x)
        return shift, cpu.summed(first, x.shape), cpu.summed(square, x.shape)

    def in_one_pass(x: Array) -> tuple[Array, Array, Array]:
        part = None if plan.in_one_kernel else _part(plan, x, slots)
        if part is None:
            return in_two_passes(x)
        shift = shift_of(part, part.size / x.size * n)
        return shift, *sums_about(shift, x)

    def together(x: Array) -> tuple[Array, Array, Array]:
        shift = shift_of(x, n)
        c = centred(plan, x, slots, 1, shift)
        sums = cpu.both([_counted(z, slots, slots.weights) for z in (c, abs_sq(c))], plan.local)
        return shift, _of_groups(plan, sums[0]), _of_groups(plan, sums[1])

    def about_zero_if_near(x: Array) -> tuple[Array, Array, Array]:
        """Good where no mean is larger than FAR standard deviations: XLA's sums are good to 3 parts in 2^24 (measured),
        and y stays within 4 units in the last place. Else about the mean that the first sum gives."""
        first = _sum(clean(x, x, slots), plan, slots)
        (x,) = cpu.private(1, x.shape, x)
        square = _sum(abs_sq(clean(x, x, slots)), plan, slots)
        mean_sq = abs_sq(ratio(first, n)) * n
        near_zero = (mean_sq <= FAR**2 * (square - mean_sq)).all()  # a NaN is not: squares may have overflown

        def about_mean(first: Array, _: Array, x: Array) -> tuple[Array, Array, Array]:
            shift = near_the_mean(first, n)
            return shift, *sums_about(shift, x)

        def near(first: Array, square: Array, _: Array) -> tuple[Array, Array, Array]:
            return jnp.zeros_like(first), first, square

        return jax.lax.cond(near_zero, near, about_mean, first, square, x)

    averaged = plan.averaged(x)
    if x.size >= cpu.SMALL:
        on_cpu, elsewhere = about_zero_if_near if averaged >= MANY else in_two_passes, in_one_pass
    elif x.ndim - 1 in plan.local and averaged <= 128:  # in one loop sums are taken one after another: digits go
        on_cpu, elsewhere = together, in_two_passes
    else:
        on_cpu = elsewhere = in_two_passes
    # Of arrays that the compiler shards the question alone would be one more collective.
    forms = {"cpu": on_cpu} if cpu.alone() and on_cpu is not elsewhere else {}
    shift, first, square = jax.lax.platform_dependent(x, **forms, default=elsewhere)
    offset = ratio(first, n)
    return shift, offset, jnp.maximum(square - n * abs_sq(offset), 0)  # hardly anything cancels: see _part


@functools.partial(jax.jit, static_argnums=0, inline=True)
def statistics_of(plan: Plan, x: Array, slots: Slots) -> Stats:
    n = _count(plan, x, slots, slots.weights)
    if not plan.center:
        m2 = cpu.summed(_sum(abs_sq(clean(x, x, slots)), plan, slots), x.shape)
        shift = offset = jnp.zeros(m2.shape, wide(x.dtype))
    else:
        known = _whole(plan, x, slots)
        shift, offset, m2 = _mean(plan, x, slots, n if known is None else known)
    if slots.weights is not None:  # its tangent has this shape
        n = jnp.broadcast_to(n, m2.shape)
    stats = Stats(n, shift, offset, m2)
    if plan.cut is not None:
        stats = _merge(plan, stats, slots, functools.partial(plan.cut.gather, axis=plan.cut.dim + 1))
    if plan.mapped.names:
        stats = _merge(plan, stats, slots, plan.mapped.gather, slots.member)
    return stats


def row_statistics(plan: Plan, x: Array) -> Stats:
    """The statistics of whole rows on CPU, in plain sums: see `rule.py`."""
    n, slots = _whole(plan, x, Slots()), Slots()
    assert n is not None
    shift = offset = jnp.zeros((1,) * x.ndim, wide(x.dtype))
    if plan.center:
        shift = _sum(clean(x, x, slots), plan, slots) / n
        offset = _sum(centred(plan, x, slots, 0, shift), plan, slots) / n
    m2 = _sum(abs_sq(centred(plan, x, slots, 0, shift)), plan, slots)
    if plan.center:
        m2 = jnp.maximum(m2 - n * abs_sq(offset), 0)  # as in `_mean`
    shift, offset = (jnp.broadcast_to(z, m2.shape) for z in (shift, offset))
    return Stats(_count(plan, x, slots, None), shift, offset, m2)


def _along(z: Array, rows: Array) -> Array:
    """`z` of the shape of `rows`, lying as they lie: a mask may be sharded in another way than x."""
    return keep_sharding(jnp.broadcast_to(z, rows.shape), rows)


def _merge(
    plan: Plan, stats: Stats, slots: Slots, gather: Callable[[Array], Array], member: Array | None = None
) -> Stats:
    """One collective: what differs is stacked on a new leading axis, which keeps a sharded channel axis sharded.

    What is the same on every device crosses nothing: the count of whole batches, the zeros of a mean that stays.
    """
    counted = slots.valid is not None or slots.weights is not None
    names = ["n"] * counted + ["shift", "offset"] * plan.center + ["m2"]
    rows = [_along(getattr(stats, name), stats.m2).astype(stats.shift.dtype) for name in names]
    there = dict(zip(names, jnp.moveaxis(gather(jnp.stack(rows)), 1, 0), strict=True))
    m2 = jnp.real(there["m2"])
    n = jnp.real(there["n"]) if counted else jnp.zeros_like(m2) + stats.n[None]
    if member is not None:
        n = n * member.reshape((-1,) + (1,) * (n.ndim - 1)).astype(n.dtype)
    none = jnp.zeros_like(there["m2"])
    merged = Stats(*pool(n, there.get("shift", none), there.get("offset", none), m2))
    if counted or member is not None:
        return merged
    return merged._replace(n=stats.n * float(len(m2)))  # the same everywhere, and typed so


def statistics_tangent(
    plan: Plan, x: Array, slots: Slots, stats: Stats, d: Array, dslots: Slots, rowwise: bool = False
) -> Stats:
    """Of the raw moments first, which are plain sums: M1 = sum(w c), M2 = sum(w |c|^2). About the shift; along rows
    about the mean itself, because there one loop can hold both sums and what follows from them only if they are apart.
    """
    offset = stats.offset
    about = (stats.shift, offset) if rowwise else (stats.shift,)
    c = centred(plan, x, slots, ROWWISE if rowwise else 1, *about)
    if slots.valid is not None:  # a masked 1e38 is finite, its square is not
        c = jnp.where(slots.valid, c, 0)
    rows = [_sum(z, plan, slots) for z in (d, 2 * _dot(c, d))]
    rows = rows if rowwise else [cpu.settled(row, x.shape) for row in rows]
    if slots.weights is not None:
        dw = dslots.weights
        rows[0] += _sum(c, plan, slots, dw)
        rows[1] += _sum(abs_sq(c), plan, slots, dw)
        rows.append(_along(_count(plan, x, slots, dw), rows[0]))
    if plan.cut is not None or plan.mapped.names:  # one collective
        sums = jnp.stack([row.astype(c.dtype) for row in rows])
        if plan.cut is not None:
            sums = sums.sum(plan.cut.dim + 1, keepdims=True)
        rows = list(plan.mapped.total(sums, slots.member))
    first, second, *counts = rows
    second = jnp.real(second)
    if counts:
        dcount = jnp.real(counts[0])
    elif isinstance(stats.n, float | int):
        dcount = jnp.zeros((1,) * x.ndim, real_of(c.dtype))
    else:
        dcount = jnp.zeros_like(stats.n)
    if not plan.center:
        return Stats(dcount, jnp.zeros_like(stats.shift), jnp.zeros_like(stats.offset), second)
    if not rowwise:
        second = second - 2 * _dot(offset, first)
        if counts:
            second, first = second + abs_sq(offset) * dcount, first - offset * like(dcount, first)
    return Stats(dcount, jnp.zeros_like(stats.shift), ratio(first, stats.n), second)
