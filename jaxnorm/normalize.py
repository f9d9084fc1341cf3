"""The verbs that make y: `normalize` with given statistics, `standardize` with the statistics of x itself."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm import rule
from jaxnorm.errors import ArgumentError, named
from jaxnorm.layout import Names, kept, last, meet, place
from jaxnorm.mapped import Groups
from jaxnorm.moments import Moments, from_stats
from jaxnorm.operands import check_epsilon, feature_array, operands
from jaxnorm.running import RunningStats
from jaxnorm.stats import Stats, real_of, wide


@named
def normalize(
    x: ArrayLike,
    stats: Moments | RunningStats,
    layout: Names = "... c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    features: Names | None = None,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
    dtype=None,
) -> jax.Array:
    """Normalize `x` with given statistics, matched to its dimensions by name.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    With RunningStats this is batch norm in evaluation; with Moments it is any norm whose statistics were taken, or
    merged, elsewhere. Differentiable in `x`, `stats`, `scale`, `bias` and `epsilon`.

    Args:
        x: array laid out as `layout`.
        stats: Moments or RunningStats along axes of the layout.
        layout: a name for every dimension of `x`.
        scale: factor along `features`; none means 1.
        bias: summand along `features`; none means 0.
        features: the axes of `scale` and `bias`, in their order; by default those of RunningStats, and with Moments
            the last dimension of the layout that is not `...`. `features="n c"` is a scale for every example (AdaIN,
            FiLM), `"n h w c"` one for every place (SPADE). A composed dimension may be given whole, `"(g k)"`, or in
            its parts, `"g k"`.
        epsilon: added to the variance, in its unit: that of x squared.
        mask, weights: as the statistics were taken with. They change no y but where a value that does not count is
            not finite: it is read as 0, so that no gradient meets it.
        sizes: sizes of the axes that compose a dimension.
        dtype: dtype of y; that of `x` by default. Whatever it is, the arithmetic is float32 or wider.

    Returns:
        y, of the shape of `x`.

    Raises:
        LayoutError: when a layout, a shape or a dtype does not fit, or `stats` or `scale` has an axis `x` lacks.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> stats = jn.Moments(jnp.array([4.0]), jnp.array([1.0]), jnp.array([16.0]), ("c",))
        >>> jn.normalize(jnp.array([[1.0], [5.0]]), stats, "n c", epsilon=0.0).tolist()
        [[0.0], [2.0]]

        Adaptive instance norm takes its scale and bias, one for each example and channel, from a condition:

        >>> x = jnp.array([[[1.0], [3.0]], [[0.0], [4.0]]])
        >>> scale, bias = jnp.array([[1.0], [10.0]]), jnp.array([[0.0], [5.0]])
        >>> y, _ = jn.standardize(x, "n t c", "t", scale=scale, bias=bias, features="n c", epsilon=0.0)
        >>> y[:, :, 0].tolist()
        [[-1.0, 1.0], [-5.0, 15.0]]

    Source: Ioffe and Szegedy 2015, algorithm 2; Huang and Belongie 2017, equation 8 (AdaIN); Park et al. 2019,
        equation 1 (SPADE).

    Differs from: Flax, which returns float32 for bfloat16 `x` with float32 parameters (our Flax modules do too); torch,
        whose statistics match by position.
    """
    if not isinstance(stats, Moments | RunningStats):
        raise ArgumentError(f"stats must be Moments or RunningStats, got {type(stats).__name__}.")
    op = operands(x, layout, None, mask=mask, weights=weights, sizes=sizes, dtype=dtype)
    x_dtype = op.x.dtype
    real = real_of(wide(x_dtype))
    if jnp.iscomplexobj(stats.mean) and wide(x_dtype) == real:
        raise ArgumentError(f"the statistics are complex ({stats.mean.dtype}), x is not ({x_dtype}). Make x complex.")
    mean, var = jnp.asarray(stats.mean, wide(x_dtype)), jnp.asarray(stats.var, real)
    axes = meet(stats.axes, mean.shape, what="stats").names
    count = jnp.asarray(stats.count, real) if isinstance(stats, Moments) else jnp.ones((), real)
    count, mean, var = (place(jnp.broadcast_to(z, mean.shape), axes, op.frame, "stats") for z in (count, mean, var))
    if features is None:
        features = stats.axes if isinstance(stats, RunningStats) else last(layout)
    shift = jax.lax.stop_gradient(mean)  # the rest is 0, and that is the part which is differentiated
    placed = Stats(count, shift, mean - shift, var)
    var_eps = var + check_epsilon(epsilon, x_dtype)
    affine = _affine(
        jnp.where((count <= 0) & (var_eps <= 0), 1, var_eps),  # of nothing, and epsilon 0: y is finite
        scale,
        bias,
        features,
        op.frame,
        x_dtype,
    )
    return op.frame.join(rule.apply(op.plan, op.x, op.slots, placed, affine))


def _affine(var_eps, scale, bias, features, frame, x_dtype) -> rule.Affine:
    return rule.Affine(
        var_eps,
        feature_array(scale, features, frame, "scale", x_dtype),
        feature_array(bias, features, frame, "bias", x_dtype),
    )


@named
def standardize(
    x: ArrayLike,
    layout: Names = "... c",
    over: Names = "...",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    features: Names | None = None,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    center: bool = True,
    sizes: dict[str, int] | None = None,
    groups: Groups | None = None,
    dtype=None,
) -> tuple[jax.Array, Moments]:
    """Normalize `x` with its own statistics over named axes, and return them. Every norm is a call of this.

        y = (x - mean) / sqrt(m2 / count + epsilon) * scale + bias,    (count, mean, m2) = moments(x, layout, over)

    Kept for the backward pass: `x` in its own dtype, the mask, the statistics and `scale`. Over mapped axes: one
    collective forward, one backward. The moments are differentiable too.

    Args:
        x: array laid out as `layout`, real or complex.
        layout: a name for every dimension of `x`; `...` stands for any number, `(g k)` for a composed one.
        over: the axes averaged together: dimensions of `x` and mapped axes, `name?` for one that may be absent.
        scale: factor along `features`; none means 1.
        bias: summand along `features`; none means 0.
        features: the axes of `scale` and `bias`; by default the last dimension of the layout that is not `...`.
        epsilon: added to the variance, in its unit: that of x squared.
        mask: True where an element counts; broadcasts as in NumPy. Masked slots of y are normalized like the rest,
            with the same statistics; a value there that is not finite counts as 0.
        weights: how much an element counts, not negative; weight 0 is a masked slot.
        center: False leaves the mean where it is (RMS norm).
        sizes: sizes of the axes that compose a dimension.
        groups: {"devices": [[0, 1], [2, 3]]} averages within groups of the devices of one mapped axis.
        dtype: dtype of y; that of `x` by default.

    Returns:
        y, of the shape of `x`, and the Moments it was normalized with.

    Raises:
        LayoutError: when the layout, the shapes or a dtype do not fit.
        AxisError: when a name in `over` is neither a dimension nor a mapped axis, or is both.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> y, stats = jn.standardize(jnp.array([[1.0, 5.0], [3.0, 5.0]]), "n c", "n", epsilon=0.0, scale=jnp.ones(2))
        >>> stats.mean.tolist(), stats.var.tolist(), y[:, 0].tolist()
        ([2.0, 5.0], [1.0, 0.0], [-1.0, 1.0])

    Source: Ioffe and Szegedy 2015, algorithm 1; Wu and He 2018, equations 1 to 6 (every norm as a set of indices).

    Differs from: Flax, whose default variance is E[x^2] - E[x]^2; torch, which keeps no statistics of layer norm.
    """
    op = operands(x, layout, over, mask=mask, weights=weights, center=center, sizes=sizes, groups=groups, dtype=dtype)
    eps = check_epsilon(epsilon, op.x.dtype)
    affine = _affine(eps, scale, bias, last(layout) if features is None else features, op.frame, op.x.dtype)
    y, stats = rule.standardize(op.plan, op.x, op.slots, *affine)
    return op.frame.join(y), from_stats(stats, op.plan.dims, kept(layout, over))
