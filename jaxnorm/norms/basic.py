"""The norms: rows of one table over the verbs.

| norm     | over                           | features | state   |
|----------|--------------------------------|----------|---------|
| batch    | all but c (and mapped axes)    | c        | running |
| layer    | c (and a mapped axis)          | c        | none    |
| RMS      | c, not centred                 | c        | none    |
| instance | all but n and c                | c        | none    |
| group    | all but n and the group        | c        | none    |
"""

from numbers import Integral

import jax
from jax.typing import ArrayLike

from jaxnorm.errors import LayoutError, named
from jaxnorm.layout import Names, after_first, averaged, kept, last, meet, split_axis, text_of
from jaxnorm.mapped import Groups
from jaxnorm.normalize import standardize
from jaxnorm.operands import check_count, inexact, offset_scale
from jaxnorm.running import RunningStats, check_running, update


@named
def batch_norm(
    x: ArrayLike,
    running: RunningStats,
    layout: Names = "... c",
    over: Names = "...",
    *,
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
    groups: Groups | None = None,
) -> tuple[jax.Array, RunningStats]:
    """Batch norm in training: normalize with the batch's statistics and update the running ones.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   running = update(running, moments)

    Evaluation is `normalize(x, running, layout, ...)`. To use statistics without updating, or to update without
    using, call `standardize` and `update`. `over="n h w devices"` synchronizes over the mapped axis `devices`.

    Args:
        x: array laid out as `layout`.
        running: RunningStats along the axes that are not averaged; axes it lacks (ghosts) are merged.
        layout: a name for every dimension of `x`.
        over: the axes averaged together: dimensions of `x` and mapped axes.
        scale, bias: along `features`; none means 1 and 0.
        features: by default the axes that are not averaged.
        momentum: the part of the old running value that is kept; None for the cumulative average.
        epsilon: added to the variance, in its unit.
        mask: True where an element counts; weights: how much. Both broadcast as in NumPy.
        debias, unbiased: see `update`.
        sizes: sizes of the axes that compose a dimension, as in ghost batch norm.
        groups: {"devices": [[0, 1], [2, 3]]} averages within groups of devices.

    Returns:
        y, of the shape and dtype of `x`, and the new RunningStats.

    Raises:
        LayoutError, AxisError: as `standardize`; LayoutError when `running` has an axis that is averaged.
        ValueError: (ArgumentError) when every statistic is of one element, which shapes tell and a mask does not: see
            `tools.check_moments`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, running = jn.batch_norm(x, jn.running_stats(c=1), momentum=0.5, epsilon=0.0)
        >>> y.tolist(), running.mean.tolist(), running.var.tolist()
        ([[-1.0], [1.0]], [1.0], [1.0])

        Ghost batch norm (Hoffer et al. 2017) normalizes parts of the batch on their own: one layout away.

        >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
        >>> y, _ = jn.batch_norm(x, jn.running_stats(c=1), "(m n) c", "n", features="c", sizes={"m": 2}, epsilon=0.0)
        >>> y[:, 0].tolist()
        [-1.0, 1.0, -1.0, 1.0]

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1.

    Differs from: torch, whose running variance is the unbiased one (`unbiased=True`) and whose momentum is one minus
        ours; Flax under a mask and `axis_name`, which averages the devices' means whatever their counts.
    """
    check_running(running)
    y, stats = standardize(
        x, layout, over, scale=scale, bias=bias, epsilon=epsilon, mask=mask,
        features=kept(layout, over) if features is None else features, weights=weights, sizes=sizes, groups=groups,
    )  # fmt: skip
    check_count(x, stats.mean.size, layout, over, sizes, groups)
    return y, update(running, stats, momentum, debias=debias, unbiased=unbiased)


@named
def layer_norm(
    x: ArrayLike,
    layout: Names = "... c",
    over: Names = "c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    features: Names | None = None,
    epsilon: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """Layer norm: every example on its own, over its features.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var over c

    Args:
        x: array laid out as `layout`.
        layout: a name for every dimension of `x`.
        over: the axes averaged; with a mapped axis in the list the features may be sharded over devices.
        scale, bias: along `features`; none means 1 and 0.
        features: by default the dimensions averaged over.
        epsilon: added to the variance, in its unit.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.layer_norm(jnp.array([[1.0, 3.0], [2.0, 6.0]]), epsilon=0.0).tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4.

    Differs from: torch, whose epsilon is 1e-5; Flax's fast variance, wrong by 0.3 at mean 1e3 and std 1.
    """
    return standardize(
        x, layout, over, scale=scale, bias=bias, epsilon=epsilon, mask=mask,
        features=averaged(layout, over) if features is None else features, sizes=sizes,
    )[0]  # fmt: skip


@named
def rms_norm(
    x: ArrayLike,
    layout: Names = "... c",
    over: Names = "c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    features: Names | None = None,
    epsilon: ArrayLike = 1e-6,
    scale_offset: float = 0.0,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """RMS norm: layer norm that leaves the mean where it is.

        y = x / sqrt(mean(|x|^2) + epsilon) * (scale_offset + scale) + bias

    Args:
        x: array laid out as `layout`.
        layout: a name for every dimension of `x`.
        over: the axes averaged; with a mapped axis in the list the features may be sharded over devices.
        scale, bias: along `features`; none means a factor of 1 and a summand of 0.
        features: by default the dimensions averaged over.
        epsilon: added to the mean square, in its unit.
        scale_offset: 1.0 for models that store scale - 1, as Gemma does. Without `scale` it does nothing.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.rms_norm(jnp.array([[1.0, 7.0]]), epsilon=0.0, scale=jnp.array([5.0, 5.0])).tolist()
        [[1.0, 7.0]]

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.

    Differs from: torch, whose default epsilon is that of the dtype; Flax, which has no bias and no offset.
    """
    return standardize(
        x, layout, over, scale=offset_scale(scale, scale_offset), bias=bias, epsilon=epsilon, mask=mask,
        features=averaged(layout, over) if features is None else features, center=False, sizes=sizes,
    )[0]  # fmt: skip


@named
def instance_norm(
    x: ArrayLike,
    layout: Names = "n ... c",
    over: Names = "...",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    features: Names | None = None,
    epsilon: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """Instance norm: every channel of every example on its own, over space.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var over ..., one for each n and c

    Args:
        x: array laid out as `layout`.
        layout: a name for every dimension of `x`.
        over: the axes averaged.
        scale, bias: along `features`; none means 1 and 0. `features="n c"` makes it adaptive (AdaIN).
        features: by default the last dimension of the layout that is not `...`.
        epsilon: added to the variance, in its unit.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[[1.0], [3.0]], [[0.0], [8.0]]])
        >>> jn.instance_norm(x, epsilon=0.0)[:, :, 0].tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    Source: Ulyanov, Vedaldi, Lempitsky 2016, "Instance Normalization", equation 2.

    Differs from: torch, whose epsilon is 1e-5, whose channels come second, and which has no scale by default.
    """
    return standardize(
        x, layout, over, scale=scale, bias=bias, features=features, epsilon=epsilon, mask=mask, sizes=sizes
    )[0]


@named
def group_norm(
    x: ArrayLike,
    num_groups: int,
    layout: Names = "n ... c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    features: Names | None = None,
    epsilon: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """Group norm: the channels of every example in groups that share statistics.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   layout "n ... (g k)", mean and var over "... k"

    Averaged is everything but the first name of the layout and the group. Where that is too much (frames of a video,
    say) write the row itself: `standardize(x, "n t h w (g k)", "h w k", sizes={"g": 32}, ...)`.

    Args:
        x: array laid out as `layout`.
        num_groups: into how many groups the features axis is split; it must divide its size.
        layout: a name for every dimension of `x`; "n c ..." with features="c" is channels first.
        scale, bias: along the whole features axis; none means 1 and 0.
        features: the axis that is split; by default the last dimension of the layout that is not `...`.
        epsilon: added to the variance, in its unit.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError: as `standardize`, and when `num_groups` does not divide the features axis.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), 2, epsilon=0.0).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Source: Wu and He 2018, "Group Normalization", equation 7.

    Differs from: torch, whose epsilon is 1e-5 and whose channels come second; Flax's linen GroupNorm merges every
        dimension but the first without saying so, and nnx's is wrong where `reduction_axes` leaves one out.
    """
    rows, over, split, sizes = in_groups(x, num_groups, layout, features, sizes)
    return standardize(
        x, rows, over, scale=scale, bias=bias, features=split, epsilon=epsilon, mask=mask, sizes=sizes
    )[0]


def in_groups(
    x: ArrayLike, num_groups: int, layout: Names, features: Names | None, sizes: dict[str, int] | None
) -> tuple[Names, Names, Names, dict[str, int]]:
    """The row of a norm over groups of one axis: layout, over, features and sizes."""
    c = last(layout) if features is None else text_of(features)
    rows, split, member = split_axis(layout, c)
    length = meet(layout, inexact(x, "x").shape, sizes).size(c)
    if not isinstance(num_groups, Integral) or num_groups < 1 or length % num_groups:
        raise LayoutError(f"num_groups={num_groups!r} does not divide the {length} entries along {c!r}.")
    return rows, (*after_first(layout, c), member), split, {**(sizes or {}), f"{c}_group": int(num_groups)}
