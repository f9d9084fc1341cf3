"""The affine step, and the rules by which it and the statistics are differentiated: with `stats.py` all there is.

    y = (x - mean) * rsqrt(var + epsilon) * scale + bias

Both steps are differentiated by hand, because plain autodiff keeps three or four float32 arrays of the size of x for
the backward pass. Each has a *tangent map*, linear in the tangents and written once; it sits under `jax.checkpoint`, so
what is kept is its non-linear input: x in its own dtype, the mask and the small statistics. `custom_jvp`, not
`custom_vjp`: the backward pass is the transpose of the tangent map, so forward mode and every higher order exist
(tests/test_derivatives.py). With c = x - mean that of the affine step is

    d y = (dx - d mean) r s + c (ds r + s dr) + d bias,   r = rsqrt(var + epsilon), dr = -r^3 d(var + epsilon) / 2

How it is factored decides how the backward pass runs. Where statistics and features together are small (batch, instance
and group norm) everything small is multiplied first, and backward there are two sums of the size of x, of g and g c.
Along rows (layer and RMS norm) g c is summed along rows and, for the scale, along columns: on CPU that is a matrix
times two vectors (`cpu.outer`). Without a scale, or out of the cache, the sums of a row and what follows from them are
one loop. What else the CPU needs is in `cpu.py`.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxnorm import cpu
from jaxnorm.sharded import parts_of
from jaxnorm.stats import (
    MANY,
    ROWWISE,
    Plan,
    Slots,
    Stats,
    by_channel,
    centred,
    clean,
    like,
    ratio,
    row_statistics,
    statistics_of,
    statistics_tangent,
    with_known_count,
)

STATS_NAME = "jaxnorm_stats"  # what jax.checkpoint policies call the reduced statistics


class Affine(NamedTuple):
    """var + epsilon, scale and bias, with the rank of x or absent."""

    var_eps: Array
    scale: Array | None
    bias: Array | None


def _is_rowwise(plan: Plan, x: Array, row: Array, *features: Array | None) -> bool:
    """Whether a statistic for every row of x meets a scale for every column: together they are as large as x."""
    shapes = [z.shape for z in features if z is not None]
    shapes.append((*row.shape[:-1], x.shape[-1]) if plan.groups else row.shape)
    return math.prod(np.broadcast_shapes(*shapes)) >= x.size


def _spread(plan: Plan, x: Array, rows: list[Array]) -> list[Array]:
    """Rows, linear ones, as every part of x sees them. Stacked, so that backward, where this is a sum over the parts,
    it is one. Those of another shape than the first (a scale for every place) lie where x lies, and stay as they are.
    """
    if plan.cut is not None:
        small = [row for row in rows if row.shape == rows[0].shape]
        stack = iter(plan.cut.spread(jnp.stack(small), plan.cut.dim + 1, x))
        rows = [next(stack) if row.shape == rows[0].shape else row for row in rows]
    return rows


def _times(a: Array, b: Array | None) -> Array:
    return a if b is None else like(a, b) * b


def _rsqrt(z: Array, x: Array) -> Array:
    """As a square root, which is rounded right: XLA's rsqrt on CPU, to which it turns 1 / sqrt(z), is off by up to 1.6
    units in the last place, this by 0.9. Where x is small it would be one more loop."""
    return jax.lax.rsqrt(z) if x.size < cpu.SMALL else jnp.sqrt(1 / z)


def _plus(a: Array, b: Array | None) -> Array:
    return a if b is None else a + b


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _apply(plan: Plan, x: Array, slots: Slots, stats: Stats, affine: Affine) -> Array:
    var_eps, scale, bias = affine
    offset, factor = by_channel(plan, x, stats.offset, _rsqrt(var_eps, x))
    rest = None
    if not _is_rowwise(plan, x, stats.m2, scale, bias):  # whatever can be is multiplied before x is read
        factor, rest, scale, bias = cpu.settled(_times(factor, scale), x.shape), bias, None, None
    if plan.center:
        rest = _plus(-offset * like(factor, offset), rest)
    rest = rest if rest is None else cpu.settled(rest, x.shape)
    c = centred(plan, x, slots, 3, stats.shift)
    y = _plus(_times(_plus(c * like(factor, c), rest), scale), bias)
    if slots.valid is not None and plan.dtype == "float16":  # x / sqrt(epsilon) of an empty statistic may pass 65504
        largest = float(jnp.finfo(jnp.float16).max)
        y = jnp.where(by_channel(plan, x, stats.n)[0] <= 0, jnp.clip(y, -largest, largest), y)
    return y.astype(plan.dtype)


def _apply_tangent(
    plan: Plan, x: Array, slots: Slots, stats: Stats, affine: Affine, d: Array, doffset: Array, daffine: Affine
) -> Array:
    (var_eps, scale, _), (dvar_eps, dscale, dbias) = affine, daffine
    r, dr = jax.jvp(jax.lax.rsqrt, (var_eps,), (dvar_eps,))
    offset, r, doffset, dr = by_channel(plan, x, stats.offset, r, doffset, dr)
    if not _is_rowwise(plan, x, stats.m2, scale, dbias):
        factor, dfactor = _times(r, scale), _times(dr, scale)
        if dscale is not None:
            dfactor = dfactor + like(r, dscale) * dscale
        if plan.center:
            dbias = _plus(-doffset * like(factor, doffset) - offset * like(dfactor, offset), dbias)
        rows = [like(dfactor, d)] if dbias is None else [like(dfactor, d), dbias]
        dfactor, *drest = (cpu.spread(row, x.shape) for row in _spread(plan, x, rows))
        dy = d * like(cpu.settled(factor, x.shape), d) + centred(plan, x, slots, 2, stats.shift) * dfactor
        return sum(drest, dy).astype(plan.dtype)
    rows = [like(dr, d)]
    if plan.center:
        rows.append(-doffset * like(r, doffset))
    dr, *drest = _spread(plan, x, rows)
    if scale is not None and dscale is not None and cpu.is_outer(x, r, scale):  # backward: g c first, once for all
        c = centred(plan, x, slots, 3, stats.shift, stats.offset)
        dy = c * (cpu.outer(dr, scale) + cpu.outer(r, dscale)) + d * r * scale
        for row in drest:
            dy = dy + cpu.outer(row, scale)
        if dbias is not None:
            dy = dy + cpu.outer(jnp.ones_like(r), dbias)
        return dy.astype(plan.dtype)
    c = centred(plan, x, slots, ROWWISE, stats.shift, stats.offset)
    dy = _times(sum(drest, d * like(r, d) + c * dr), scale)
    if dscale is not None:
        c = centred(plan, x, slots, 3, stats.shift, stats.offset)
        dy = dy + c * like(cpu.private(3, x.shape, r)[0], d) * dscale
    return _plus(dy, dbias).astype(plan.dtype)


def _kept(stats: Stats) -> Stats:
    """`stats` under their name for the policies of `jax.checkpoint`. Said in the rules, at the top: inside of a
    `custom_jvp` function no policy finds it, and a backward pass would cross the devices again."""
    return Stats(*(checkpoint_name(s, STATS_NAME) for s in stats))


def _var(stats: Stats, epsilon: Array) -> Array:
    """var + epsilon; 1 where nothing was counted and epsilon is 0, so that y is finite."""
    var_eps = ratio(stats.m2, stats.n) + epsilon
    if isinstance(stats.n, float):
        return var_eps
    return jnp.where((stats.n <= 0) & (var_eps <= 0), 1, var_eps)


def _kept_small(tangent_map):
    """Keep only the inputs of the tangent map for the backward pass, and compute the rest again there."""
    return jax.checkpoint(tangent_map, policy=jax.checkpoint_policies.nothing_saveable)


def _standardize(plan: Plan, x: Array, slots: Slots, epsilon: Array, scale: Array | None, bias: Array | None):
    local = not jax.tree.leaves(slots) and plan.cut is None and not plan.mapped.names
    rows = sorted(plan.dims) == list(range(x.ndim - len(plan.dims), x.ndim))

    def in_steps(x: Array) -> tuple[Array, Stats]:
        stats = statistics_of(dataclasses.replace(plan, in_one_kernel=local and rows), x, slots)
        var_eps = _var(with_known_count(plan, x, slots, stats), epsilon)
        return _apply(plan, x, slots, stats, Affine(var_eps, scale, bias)), stats

    def in_one_loop(x: Array) -> tuple[Array, Stats]:
        """Along rows and without a backward pass XLA's CPU backend does all of it in one loop, if nothing but sums and
        products stands in it: a row stays in the cache, and the mean is corrected for little."""
        stats = row_statistics(plan, x)
        c = centred(plan, x, slots, 0, stats.shift, stats.offset)
        r = _rsqrt(_var(with_known_count(plan, x, slots, stats), epsilon), x)
        return _plus(_times(c * like(r, c), scale), bias).astype(plan.dtype), stats

    quick = (plan.averaged(x) >= MANY or not plan.center) and not cpu.is_out_of_cache(x)  # plain sums, then y
    if not local or not rows or quick or x.size < cpu.SMALL:
        return in_steps(x)
    return jax.lax.platform_dependent(x, cpu=in_one_loop, default=in_steps)


def _standardize_tangent(plan, x, slots, stats, epsilon, scale, dx, dslots, depsilon, dscale, dbias):
    d = clean(x, dx, slots)  # widened once: backward, its two gradients are added before they are rounded
    stats = with_known_count(plan, x, slots, stats)
    dstats = statistics_tangent(plan, x, slots, stats, d, dslots, _is_rowwise(plan, x, stats.m2, scale, dbias))
    changing, changes = {"m2": stats.m2}, {"m2": dstats.m2}
    if not isinstance(stats.n, float):
        changing, changes = changing | {"n": stats.n}, changes | {"n": dstats.n}
    var_eps, dvar_eps = jax.jvp(
        lambda changing, epsilon: _var(stats._replace(**changing), epsilon), (changing, epsilon), (changes, depsilon)
    )
    affine, daffine = Affine(var_eps, scale, None), Affine(dvar_eps, dscale, dbias)
    return _apply_tangent(plan, x, slots, stats, affine, d, dstats.offset, daffine), dstats


# The three functions the rest of the package calls. A rule calls its own function again for the primal output, so that
# the derivative of a derivative goes through the rule too.
_statistics_rule = jax.custom_jvp(statistics_of, nondiff_argnums=(0,))
_apply_rule = jax.custom_jvp(_apply, nondiff_argnums=(0,))
_standardize_rule = jax.custom_jvp(_standardize, nondiff_argnums=(0,))


@_statistics_rule.defjvp
def _(plan, primals, tangents):
    (x, slots), (dx, dslots) = primals, tangents
    stats = _kept(_statistics_rule(plan, x, slots))

    def tangent_map(x, slots, stats, dx, dslots):
        return statistics_tangent(plan, x, slots, stats, clean(x, dx, slots), dslots)

    return stats, _kept_small(tangent_map)(x, slots, stats, dx, dslots)


@_apply_rule.defjvp
def _(plan, primals, tangents):
    (x, slots, stats, affine), (dx, _, dstats, daffine) = primals, tangents
    y = _apply_rule(plan, x, slots, stats, affine)

    def tangent_map(x, slots, stats, affine, dx, doffset, daffine):
        return _apply_tangent(plan, x, slots, stats, affine, clean(x, dx, slots), doffset, daffine)

    return y, _kept_small(tangent_map)(x, slots, stats, affine, dx, dstats.offset, daffine)


@_standardize_rule.defjvp
def _(plan, primals, tangents):
    x, slots, epsilon, scale, bias = primals
    stats = _kept(_statistics_rule(plan, x, slots))
    var_eps = _var(with_known_count(plan, x, slots, stats), epsilon)
    y = _apply_rule(plan, x, slots, stats, Affine(var_eps, scale, bias))
    tangent_map = _kept_small(functools.partial(_standardize_tangent, plan))
    return (y, stats), tangent_map(x, slots, stats, epsilon, scale, *tangents)


def _folded(plan: Plan, x: Array) -> Plan:
    """Group norm with the channels last: x keeps them in one dimension, and only sums know of groups."""
    last = x.ndim - 1
    whole = parts_of(jax.typeof(x).sharding, last) == 1 and (plan.cut is None or plan.cut.dim < last - 1)
    if x.size and len(plan.dims) > 1 and last in plan.dims and last - 1 not in plan.dims and whole:
        return dataclasses.replace(plan, dims=tuple(d for d in plan.dims if d != last), groups=x.shape[-2])
    return plan


def _opened(plan: Plan, x: Array, slots: Slots, *affine: Array | None) -> Any:
    arrays = (x, slots.valid, slots.weights, *affine)
    if plan.cut is not None:
        arrays = jax.tree.map(plan.cut.open, arrays)
    if plan.groups:
        ends = x.shape[-2:]

        def fold(z: Array) -> Array:
            few = z.shape[-2:] == (1, 1)
            z = z if few else jnp.broadcast_to(z, (*z.shape[:-2], *ends))
            return z.reshape(*z.shape[:-2], 1 if few else math.prod(ends))

        arrays = jax.tree.map(fold, arrays)
    x, valid, weights, *rest = arrays
    return x, Slots(valid, weights, slots.member), *rest


def _closed(plan: Plan, stats: Stats, *ys: Array) -> Any:
    if plan.groups:
        ys = tuple(y.reshape(*y.shape[:-1], plan.groups, -1) for y in ys)
        stats = jax.tree.map(lambda z: z[..., None], stats)
    return (*ys, stats) if plan.cut is None else jax.tree.map(plan.cut.close, (*ys, stats))


@functools.partial(jax.jit, static_argnums=0)
def statistics(plan: Plan, x: Array, slots: Slots) -> Stats:
    """Statistics of x over the plan's dimensions and devices."""
    plan = _folded(plan, x)
    return _closed(plan, _statistics_rule(plan, *_opened(plan, x, slots)))[0]


@functools.partial(jax.jit, static_argnums=0)
def apply(plan: Plan, x: Array, slots: Slots, stats: Stats, affine: Affine) -> Array:
    """The affine step with given statistics. Of them only offset is differentiated: affine holds the variance."""
    return _apply_rule(plan, x, slots, stats, affine)


@functools.partial(jax.jit, static_argnums=0)
def standardize(
    plan: Plan, x: Array, slots: Slots, epsilon: Array, scale: Array | None, bias: Array | None
) -> tuple[Array, Stats]:
    """Statistics and the affine step with them, under one rule: the gradient of x is added up before it is rounded."""
    plan = _folded(plan, x)
    x, slots, scale, bias = _opened(plan, x, slots, scale, bias)
    y, stats = _standardize_rule(plan, x, slots, epsilon, scale, bias)
    return _closed(plan, stats, y)
