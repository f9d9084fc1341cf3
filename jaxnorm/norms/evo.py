"""EvoNorms: norm and activation found as one layer."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.elementwise import affine, deviation, elementwise, remembering
from jaxnorm.errors import named
from jaxnorm.layout import Names, averaged, first, kept
from jaxnorm.moments import moments
from jaxnorm.norms.basic import in_groups
from jaxnorm.operands import check_count, inexact
from jaxnorm.running import RunningStats, check_running, update


def _b0(x, batch, instance, v, scale, bias):
    own = instance if v is None else v * x + instance
    return affine(x / jnp.maximum(batch, own), scale, bias)


@named
def evo_norm_b0(
    x: ArrayLike,
    running: RunningStats,
    layout: Names = "n ... c",
    over: Names = "n ...",
    *,
    v: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    features: Names | None = None,
    momentum: ArrayLike | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    debias: bool = False,
    unbiased: bool = False,
    sizes: dict[str, int] | None = None,
    groups: Any = None,
    train: bool = True,
) -> tuple[jax.Array, RunningStats]:
    """EvoNorm B0: batch and instance statistics, whichever is larger, and no activation behind.

        y = x / max(sqrt(var_batch + epsilon), v x + sqrt(var_instance + epsilon)) * scale + bias

    Args:
        x: array laid out as `layout`, real, the examples first.
        running: RunningStats along the axes that are not averaged.
        layout: a name for every dimension of `x`.
        over: the axes of the batch variance, mapped ones among them; the instance's is over all of them that are
            dimensions but the first name.
        v: along `features`; 1 to start with, which none means 0.
        scale, bias, features: as in `batch_norm`.
        momentum, debias, unbiased: as in `update`.
        epsilon: added to both variances, in their unit.
        mask, weights: which elements count and how much, as in `batch_norm`.
        sizes, groups: as in `batch_norm`.
        train: False takes the running variance for the batch's, and changes nothing.

    Returns:
        y, of the shape and dtype of `x`, and the new RunningStats.

    Raises:
        LayoutError, AxisError: as `batch_norm`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]])
        >>> y, _ = jn.evo_norm_b0(x, jn.running_stats(c=1), v=jnp.ones(1), epsilon=0.0)
        >>> (x / y)[:, :, 0].round(3).tolist()
        [[2.0, 4.0], [4.0, 8.0]]

    Source: Liu et al. 2020, "Evolving Normalization-Activation Layers", table 2.

    Differs from: the paper, whose running variance is that of a momentum of 0.9. Flax and torch have none.
    """
    check_running(running)
    inner = tuple(name for name in averaged(layout, over) if name != first(layout))
    along = kept(layout, over) if features is None else features

    @remembering
    def step(x, running, v, scale, bias):
        counted = {"mask": mask, "weights": weights, "sizes": sizes}
        if train:
            stats = moments(x, layout, over, groups=groups, **counted)
            check_count(x, stats.mean.size, layout, over, sizes, groups)
            running = update(running, stats, momentum, debias=debias, unbiased=unbiased)
            var, axes = stats.var, stats.axes
        else:
            var, axes = running.var, running.axes
        own = moments(x, layout, inner or "nothing?", **counted)
        batch, instance = (deviation(z, epsilon) for z in (var, own.var))
        arrays = [("running", batch, axes), ("instance", instance, own.axes)]
        arrays += [("v", v, along), ("scale", scale, along), ("bias", bias, along)]
        return elementwise(_b0, x, layout, *arrays, **counted, real=True), running

    return step(inexact(x, "x"), running, *(None if z is None else jnp.asarray(z) for z in (v, scale, bias)))


def _s0(x, group, v, scale, bias):
    swish = x * jax.nn.sigmoid(x if v is None else v * x)
    return affine(swish / group, scale, bias)


@named
def evo_norm_s0(
    x: ArrayLike,
    num_groups: int,
    layout: Names = "n ... c",
    *,
    v: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    features: Names | None = None,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """EvoNorm S0: swish over the deviation of a group. Of one example alone, and no activation behind.

        y = x sigmoid(v x) / sqrt(var_group + epsilon) * scale + bias

    Args:
        x: array laid out as `layout`, real, the examples first.
        num_groups: into how many groups the features axis is split; it must divide its size.
        layout: a name for every dimension of `x`.
        v: along the features axis; 1 to start with, which none means too.
        scale, bias: along the features axis; none means 1 and 0.
        features: the axis that is split; by default the last name of the layout.
        epsilon: added to the variance, in its unit.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError: as `group_norm`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[[0.0], [40.0]]])
        >>> jn.evo_norm_s0(x, 1, epsilon=0.0)[0, :, 0].tolist()
        [0.0, 2.0]

    Source: Liu et al. 2020, "Evolving Normalization-Activation Layers", table 2.

    Differs from: Flax and torch have none; timm's EvoNorm2dS0 is the same.
    """
    rows, over, split, sizes = in_groups(x, num_groups, layout, features, sizes)

    @remembering
    def step(x, v, scale, bias):
        stats = moments(x, rows, over, mask=mask, sizes=sizes)
        arrays = [("group", deviation(stats.var, epsilon), stats.axes)]
        arrays += [("v", v, split), ("scale", scale, split), ("bias", bias, split)]
        return elementwise(_s0, x, rows, *arrays, mask=mask, sizes=sizes, real=True)

    return step(inexact(x, "x"), *(None if z is None else jnp.asarray(z) for z in (v, scale, bias)))
