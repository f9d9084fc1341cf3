"""The arithmetic of every norm, on plain arrays, with its derivatives: the only place that multiplies.

Two steps. Statistics of x over some dimensions and devices:

    count = sum(w),   mean = sum(w x) / count,   m2 = sum(w |x - mean|^2)

and the affine step y = (x - mean) * rsqrt(var + epsilon) * scale + bias. Both are differentiated by hand, because
plain autodiff keeps three or four float32 arrays of the size of x for the backward pass. Each has a *tangent map*,
linear in the tangents and written once; it sits under `jax.checkpoint`, so what is kept is its non-linear input: x in
its own dtype, the mask and the small statistics. `custom_jvp`, not `custom_vjp`: the backward pass is the transpose of
the tangent map, so forward mode and every higher order exist (tests/test_derivatives.py).

With c = x - mean the tangent maps are

    d mean = sum(w dx) / count,   d m2 = 2 sum(w Re(conj(c) dx)),   d count = 0
    d y    = (dx - d mean) r s + c (ds r + s dr) + d bias,   r = rsqrt(var + epsilon), dr = -r^3 d(var + epsilon) / 2

and for weights that are differentiated too: d count = sum(dw), d mean += sum(dw c) / count, d m2 += sum(dw |c|^2).

A mean is carried as the pair shift + offset: shift is any number near the mean, constant under differentiation, offset
the small rest. x - shift is exact or nearly so however large the mean is, and no digit of c is lost: the variance of
N(1e6, 1) in float32 comes out to 3e-7, where x - mean with one rounded mean gives 7e-3.
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
from jax.ad_checkpoint import checkpoint_name

from jaxnorm.mapped import Mapped
from jaxnorm.sharded import Cut, keep_sharding

STATS_NAME = "jaxnorm_stats"  # what jax.checkpoint policies call the reduced statistics


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a call: the dimensions and mapped axes averaged, whether the mean is, the dtype of y."""

    dims: tuple[int, ...]
    mapped: Mapped
    center: bool
    dtype: str
    cut: Cut | None = None

    @property
    def local(self) -> tuple[int, ...]:
        """The dimensions averaged inside the rule, where the one that is cut is two, of which the first is kept."""
        return self.dims if self.cut is None else tuple(d + (d >= self.cut.dim) for d in self.dims)


class Slots(NamedTuple):
    """Which elements count and how much, broadcastable to x; and which devices do (see `Mapped.member`)."""

    valid: Array | None = None
    weights: Array | None = None
    member: Array | None = None


class Stats(NamedTuple):
    """Statistics with the rank of x and size 1 along what was averaged. The mean is shift + offset."""

    n: Array  # the count; size 1 also where it does not vary
    shift: Array
    offset: Array
    m2: Array


def wide(dtype: Any) -> Any:
    """The dtype statistics are computed in: float32 or wider, complex where x is."""
    return np.promote_types(dtype, np.float32)  # NumPy's: jnp's refuses under strict dtype promotion


def real_of(dtype: Any) -> Any:
    return jnp.finfo(dtype).dtype


def ratio(a: Array, n: Array) -> Array:
    """a / n, and 0 with a zero gradient where n is not positive. NaN stays NaN."""
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


def _clean(x: Array, dx: Array, slots: Slots) -> Array:
    """`dx` (x itself, or its tangent) widened, with 0 in masked slots where x is not finite."""
    dx = dx.astype(wide(x.dtype))
    return dx if slots.valid is None else jnp.where(slots.valid | jnp.isfinite(x), dx, 0)


def _sum(z: Array, plan: Plan, slots: Slots, weights: Array | None = None) -> Array:
    """The weighted sum over the slots that count. Masked ones are selected away, on both sides, before any product."""
    weights = slots.weights if weights is None else weights
    if slots.valid is not None:
        z = jnp.where(slots.valid, z, 0)
    if weights is not None:
        z = z * like(weights if slots.valid is None else jnp.where(slots.valid, weights, 0), z)
    return z.sum(plan.local, keepdims=True)


def _count(plan: Plan, x: Array, slots: Slots, weights: Array | None) -> Array:
    """The sum of the weights, from the mask's own shape: nothing the size of x is made for it."""
    w = jnp.ones((1,) * x.ndim, real_of(wide(x.dtype))) if weights is None else weights.astype(real_of(wide(x.dtype)))
    if slots.valid is not None:
        w = jnp.where(slots.valid, w, 0)
    repeats = math.prod(x.shape[d] for d in plan.local if w.shape[d] != x.shape[d])
    return w.sum(plan.local, keepdims=True) * float(repeats)  # as an int it may pass int32


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


def _statistics(plan: Plan, x: Array, slots: Slots) -> Stats:
    z = _clean(x, x, slots)
    n = _count(plan, x, slots, slots.weights)
    if plan.center:
        shift = _rounded(ratio(_sum(z, plan, slots), n))
        offset = ratio(_sum(z - shift, plan, slots), n)
    else:
        shift = offset = jnp.zeros_like(_sum(z, plan, slots))
    m2 = _sum(abs_sq((z - shift) - offset), plan, slots)
    if slots.weights is not None:  # its tangent has this shape
        n = jnp.broadcast_to(n, m2.shape)
    stats = Stats(n, shift, offset, m2)
    if plan.cut is not None:
        stats = _merge(plan, stats, slots, functools.partial(plan.cut.gather, axis=plan.cut.dim + 1))
    if plan.mapped.names:
        stats = _merge(plan, stats, slots, plan.mapped.gather, slots.member)
    return stats


def _kept(stats: Stats) -> Stats:
    """`stats` under their name for the policies of `jax.checkpoint`. Said in the rules, at the top: inside of a
    `custom_jvp` function no policy finds it, and a backward pass would cross the devices again."""
    return Stats(*(checkpoint_name(s, STATS_NAME) for s in stats))


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


def _spread(plan: Plan, x: Array, rows: list[Array]) -> list[Array]:
    """Rows as every part of x sees them. Stacked, so that backward, where this is a sum over the parts, it is one.

    Those of another shape than the first (a scale for every place) lie where x lies, and stay as they are.
    """
    if plan.cut is None:
        return rows
    small = [row for row in rows if row.shape == rows[0].shape]
    stack = iter(plan.cut.spread(jnp.stack(small), plan.cut.dim + 1, x))
    return [next(stack) if row.shape == rows[0].shape else row for row in rows]


def _centred(x: Array, stats: Stats, slots: Slots) -> Array:
    return (_clean(x, x, slots) - stats.shift) - stats.offset


def _statistics_tangent(plan: Plan, x: Array, slots: Slots, stats: Stats, dx: Array, dslots: Slots) -> Stats:
    c, d = _centred(x, stats, slots), _clean(x, dx, slots)
    if slots.valid is not None:  # a masked 1e38 is finite, its square is not
        c = jnp.where(slots.valid, c, 0)
    rows = [_sum(d, plan, slots), _sum(_dot(c, d), plan, slots)]
    if slots.weights is not None:
        dw = dslots.weights
        rows[0] += _sum(c, plan, slots, dw)
        rows[1] += _sum(abs_sq(c), plan, slots, dw) / 2
        rows.append(_along(_count(plan, x, slots, dw), rows[0]))
    sums = jnp.stack([row.astype(c.dtype) for row in rows])
    if plan.cut is not None:
        sums = sums.sum(plan.cut.dim + 1, keepdims=True)
    sums = plan.mapped.total(sums, slots.member)
    first, second = sums[0], jnp.real(sums[1])
    dcount = jnp.real(sums[2]) if slots.weights is not None else jnp.zeros_like(stats.n)
    doffset = ratio(first, stats.n) if plan.center else jnp.zeros_like(first)
    return Stats(dcount, jnp.zeros_like(stats.shift), doffset, 2 * second)


class Affine(NamedTuple):
    """var + epsilon, scale and bias, with the rank of x or absent."""

    var_eps: Array
    scale: Array | None
    bias: Array | None


def _factor(var_eps: Array, scale: Array | None) -> Array:
    r = jax.lax.rsqrt(var_eps)
    return r if scale is None else like(r, scale) * scale


def _apply(plan: Plan, x: Array, slots: Slots, stats: Stats, affine: Affine) -> Array:
    c = _centred(x, stats, slots)
    y = c * like(_factor(affine.var_eps, affine.scale), c)
    y = y if affine.bias is None else y + affine.bias
    if slots.valid is not None and plan.dtype == "float16":  # x / sqrt(epsilon) of an empty statistic may pass 65504
        largest = float(jnp.finfo(jnp.float16).max)
        y = jnp.where(stats.n <= 0, jnp.clip(y, -largest, largest), y)
    return y.astype(plan.dtype)


def _apply_tangent(
    plan: Plan, x: Array, slots: Slots, stats: Stats, affine: Affine, dx: Array, doffset: Array, daffine: Affine
) -> Array:
    factor, dfactor = jax.jvp(_factor, affine[:2], daffine[:2])
    c = _centred(x, stats, slots)
    dbias = [] if daffine.bias is None else [daffine.bias]
    doffset, dfactor, *dbias = _spread(plan, x, [doffset, like(dfactor, c), *dbias])
    dy = (_clean(x, dx, slots) - doffset) * like(factor, c) + c * dfactor
    return (dy + dbias[0] if dbias else dy).astype(plan.dtype)


def _var(stats: Stats, epsilon: Array) -> Array:
    """var + epsilon; 1 where nothing was counted and epsilon is 0, so that y is finite."""
    var_eps = ratio(stats.m2, stats.n) + epsilon
    return jnp.where((stats.n <= 0) & (var_eps <= 0), 1, var_eps)


def _kept_small(tangent_map):
    """Keep only the inputs of the tangent map for the backward pass, and compute the rest again there."""
    return jax.checkpoint(tangent_map, policy=jax.checkpoint_policies.nothing_saveable)


def _standardize(plan: Plan, x: Array, slots: Slots, epsilon: Array, scale: Array | None, bias: Array | None):
    stats = _statistics(plan, x, slots)
    return _apply(plan, x, slots, stats, Affine(_var(stats, epsilon), scale, bias)), stats


def _standardize_tangent(plan, x, slots, stats, epsilon, scale, dx, dslots, depsilon, dscale, dbias):
    dstats = _statistics_tangent(plan, x, slots, stats, dx, dslots)
    var_eps, dvar_eps = jax.jvp(
        lambda n, m2, eps: _var(stats._replace(n=n, m2=m2), eps),
        (stats.n, stats.m2, epsilon),
        (dstats.n, dstats.m2, depsilon),
    )
    affine, daffine = Affine(var_eps, scale, None), Affine(dvar_eps, dscale, dbias)
    return _apply_tangent(plan, x, slots, stats, affine, dx, dstats.offset, daffine), dstats


# The three functions the rest of the package calls. A rule calls its own function again for the primal output, so that
# the derivative of a derivative goes through the rule too.
_statistics_rule = jax.custom_jvp(_statistics, nondiff_argnums=(0,))
_apply_rule = jax.custom_jvp(_apply, nondiff_argnums=(0,))
_standardize_rule = jax.custom_jvp(_standardize, nondiff_argnums=(0,))


@_statistics_rule.defjvp
def _(plan, primals, tangents):
    (x, slots), (dx, dslots) = primals, tangents
    stats = _kept(_statistics_rule(plan, x, slots))
    return stats, _kept_small(functools.partial(_statistics_tangent, plan))(x, slots, stats, dx, dslots)


@_apply_rule.defjvp
def _(plan, primals, tangents):
    (x, slots, stats, affine), (dx, _, dstats, daffine) = primals, tangents
    y = _apply_rule(plan, x, slots, stats, affine)
    tangent_map = _kept_small(functools.partial(_apply_tangent, plan))
    return y, tangent_map(x, slots, stats, affine, dx, dstats.offset, daffine)


@_standardize_rule.defjvp
def _(plan, primals, tangents):
    x, slots, epsilon, scale, bias = primals
    stats = _kept(_statistics_rule(plan, x, slots))
    y = _apply_rule(plan, x, slots, stats, Affine(_var(stats, epsilon), scale, bias))
    tangent_map = _kept_small(functools.partial(_standardize_tangent, plan))
    return (y, stats), tangent_map(x, slots, stats, epsilon, scale, *tangents)


def _opened(cut: Cut | None, x: Array, slots: Slots, *affine: Array | None) -> Any:
    if cut is None:
        return x, slots, *affine
    x, valid, weights, *rest = jax.tree.map(cut.open, (x, slots.valid, slots.weights, *affine))
    return x, Slots(valid, weights, slots.member), *rest


def _closed(cut: Cut | None, results: Any) -> Any:
    return results if cut is None else jax.tree.map(cut.close, results)


@functools.partial(jax.jit, static_argnums=0)
def statistics(plan: Plan, x: Array, slots: Slots) -> Stats:
    """Statistics of x over the plan's dimensions and devices."""
    x, slots = _opened(plan.cut, x, slots)
    return _closed(plan.cut, _statistics_rule(plan, x, slots))


@functools.partial(jax.jit, static_argnums=0)
def apply(plan: Plan, x: Array, slots: Slots, stats: Stats, affine: Affine) -> Array:
    """The affine step with given statistics. Of them only offset is differentiated: affine holds the variance."""
    return _apply_rule(plan, x, slots, stats, affine)


@functools.partial(jax.jit, static_argnums=0)
def standardize(
    plan: Plan, x: Array, slots: Slots, epsilon: Array, scale: Array | None, bias: Array | None
) -> tuple[Array, Stats]:
    """Statistics and the affine step with them, under one rule: the gradient of x is added up before it is rounded."""
    x, slots, scale, bias = _opened(plan.cut, x, slots, scale, bias)
    return _closed(plan.cut, _standardize_rule(plan, x, slots, epsilon, scale, bias))
