"""The family of batch norm: other batches, and other statistics to normalize with."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.elementwise import deviation
from jaxnorm.errors import ArgumentError, LayoutError, named
from jaxnorm.layout import Names, first, flat, kept, meet, parse
from jaxnorm.mapped import Groups
from jaxnorm.moments import Moments, broadcast_to, known, merge, moments
from jaxnorm.normalize import normalize
from jaxnorm.norms.basic import batch_norm
from jaxnorm.operands import check_count
from jaxnorm.running import RunningStats, check_running, update

Limit = ArrayLike | Callable[[jax.Array], ArrayLike] | None


@named
def ghost_batch_norm(
    x: ArrayLike,
    running: RunningStats,
    num_ghosts: int,
    layout: Names = "n ... c",
    over: Names = "n ...",
    *,
    features: Names | None = None,
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> tuple[jax.Array, RunningStats]:
    """Ghost batch norm: the batch in parts, each normalized on its own, on any number of devices.

        layout "(ghost n) ... c", over "n ...":   y = (x - mean) / sqrt(var + epsilon) * scale + bias, for each ghost

    The running statistics are updated with the moments of all ghosts merged. One ghost is batch norm. With a mapped
    axis in `over` a ghost is the elements of that part on all devices. Evaluation is `normalize`, as of batch norm.

    Args:
        x: array laid out as `layout`.
        running: RunningStats along the axes that are not averaged.
        num_ghosts: into how many parts the first dimension is cut; it must divide its size.
        layout: a name for every dimension of `x`, the examples first.
        over: the axes averaged together, the first name of the layout among them.
        features: by default the axes that are not averaged.
        sizes: sizes of the axes that compose a dimension.
        **options: scale, bias, momentum, epsilon, mask, weights, debias, unbiased, groups: as in `batch_norm`.

    Returns:
        y, of the shape and dtype of `x`, and the new RunningStats.

    Raises:
        LayoutError, AxisError: as `batch_norm`, and when `num_ghosts` does not divide the examples.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
        >>> y, running = jn.ghost_batch_norm(x, jn.running_stats(c=1), 2, momentum=0.0, epsilon=0.0)
        >>> y[:, 0].tolist(), running.mean.tolist()
        ([-1.0, 1.0, -1.0, 1.0], [11.0])

    Source: Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", algorithm 1.

    Differs from: Flax and torch have none. Keras' virtual_batch_size was this, on one device.
    """
    n = first(layout)
    size = meet(layout, jnp.shape(x), sizes).size(n)
    if not isinstance(num_ghosts, Integral) or num_ghosts < 1 or size % num_ghosts:
        raise LayoutError(f"num_ghosts={num_ghosts!r} does not divide the {size} entries along {n!r}.")
    ghosts = f"({n}_ghost {n})"
    dims = tuple(dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in parse(layout))
    names = kept(layout, over) if features is None else flat(parse(features, "features"))
    return batch_norm(
        x, running, (ghosts, *dims[1:]), over, features=tuple(ghosts if name == n else name for name in names),
        sizes={**(sizes or {}), f"{n}_ghost": int(num_ghosts)}, **options,
    )  # fmt: skip


def _limit(limit: Limit, num_updates: jax.Array, steps: tuple[float, ...], values: tuple[float, ...]) -> jax.Array:
    if limit is None:
        at, to = (jnp.array(z, jnp.float32) for z in (steps, values))
        return jnp.interp(num_updates.astype(jnp.float32), at, to)
    return jnp.asarray(limit(num_updates) if callable(limit) else limit, jnp.float32)


def _clipped(z: jax.Array, limit: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(z):
        return jax.lax.complex(jnp.clip(jnp.real(z), -limit, limit), jnp.clip(jnp.imag(z), -limit, limit))
    return jnp.clip(z, -limit, limit)


@named
def batch_renorm(
    x: ArrayLike,
    running: RunningStats,
    layout: Names = "... c",
    over: Names = "...",
    *,
    r_max: Limit = None,
    d_max: Limit = None,
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
    """Batch renormalization: training sees what evaluation will, within limits. For small or uneven batches.

        y = ((x - mean) / s * r + d) * scale + bias,   s = sqrt(var + epsilon), of the batch
        r = clip(s / s', 1 / r_max, r_max),   d = clip((mean - mean') / s', -d_max, d_max),   s', mean' running

    No gradient flows through r and d. r_max = 1 and d_max = 0 is batch norm; without limits y is what evaluation with
    the running statistics (of before the update) gives, with the gradient of batch norm. Evaluation is `normalize`.

    Args:
        x: array laid out as `layout`.
        running: RunningStats along the axes that are not averaged.
        layout, over: as in `batch_norm`.
        r_max, d_max: the limits: numbers, or functions of `running.num_updates` (an optax schedule is one). None is
            the paper's schedule: r_max 1 until update 5000, then linearly to 3 at 40000; d_max 0, then 5 at 25000.
            r_max is 1 or more, d_max 0 or more.
        scale, bias, features: as in `batch_norm`.
        momentum, debias, unbiased: as in `update`.
        epsilon: added to both variances, in their unit.
        mask, weights: which elements count and how much, as in `batch_norm`.
        sizes, groups: as in `batch_norm`.

    Returns:
        y, of the shape and dtype of `x`, and the new RunningStats.

    Raises:
        LayoutError, AxisError: as `batch_norm`.
        ValueError: (ArgumentError) as `batch_norm`, and when a limit is out of its range.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, running = jn.batch_renorm(x, jn.running_stats(c=1), r_max=3.0, d_max=5.0, epsilon=0.0)
        >>> y[:, 0].tolist()
        [1.0, 3.0]

    Source: Ioffe 2017, "Batch Renormalization", algorithm 1 and section 4 (the schedule).

    Differs from: Flax and torch have none; Keras 2's renorm had these limits under `renorm_clipping`, without schedule.
        `batch_norm` keeps a mean in two numbers: here, as in evaluation, y is good to a rounding of the mean.
    """
    check_running(running)
    for limit, least in ((r_max, 1), (d_max, 0)):
        if isinstance(limit, Real) and not float(limit) >= least:
            raise ArgumentError(f"r_max is 1 or more and d_max 0 or more, got r_max={r_max!r}, d_max={d_max!r}.")
    stats = moments(x, layout, over, mask=mask, weights=weights, sizes=sizes, groups=groups)
    check_count(x, stats.mean.size, layout, over, sizes, groups)
    t = running.num_updates
    r_max = _limit(r_max, t, (5e3, 4e4), (1.0, 3.0)).astype(stats.var.dtype)
    d_max = _limit(d_max, t, (5e3, 2.5e4), (0.0, 5.0)).astype(stats.var.dtype)
    ones = jnp.ones_like(running.var)
    old = broadcast_to(Moments(ones, running.mean, running.var, running.axes), stats)
    s, s_old = deviation(stats.var, epsilon), deviation(old.var.astype(stats.var.dtype), epsilon)
    # Which statistics give this y: with s / r for s, the mean moved by d of them. The rest is `normalize`.
    r = jax.lax.stop_gradient(jnp.clip(s / s_old, 1 / r_max, r_max))
    d = jax.lax.stop_gradient(_clipped((stats.mean - old.mean.astype(stats.mean.dtype)) / s_old, d_max))
    var = (s / r) ** 2 - jnp.asarray(epsilon, s.dtype)
    between = known(stats.mean - (d * (s / r)).astype(stats.mean.dtype), var, stats)
    y = normalize(
        x, between, layout, scale=scale, bias=bias, features=kept(layout, over) if features is None else features,
        epsilon=epsilon, mask=mask, weights=weights, sizes=sizes,
    )  # fmt: skip
    return y, update(running, stats, momentum, debias=debias, unbiased=unbiased)


@named
def frozen_batch_norm(
    x: ArrayLike,
    running: RunningStats,
    layout: Names = "... c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    **options: Any,
) -> jax.Array:
    """Frozen batch norm: a fixed scale and shift, of which nothing is trained.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   a gradient for x alone

    Args:
        x: array laid out as `layout`.
        running: RunningStats, as they stay.
        layout: a name for every dimension of `x`.
        scale, bias: along `features`; none means 1 and 0. No gradient reaches them.
        **options: features, epsilon, sizes, dtype: as in `normalize`.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError: as `normalize`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm as jn
        >>> def loss(scale):
        ...     return jn.frozen_batch_norm(jnp.ones((2, 1)), jn.running_stats(c=1), scale=scale).sum()
        >>> jax.grad(loss)(jnp.ones(1)).tolist()
        [0.0]

    Source: He et al. 2017, "Mask R-CNN", whose detectors freeze the backbone's.

    Differs from: torchvision's FrozenBatchNorm2d not at all; Flax has none.
    """
    check_running(running)
    running, scale, bias = jax.tree.map(jax.lax.stop_gradient, (running, scale, bias))
    return normalize(x, running, layout, scale=scale, bias=bias, **options)


@named
def streaming_norm(
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
    debias: bool = True,
    unbiased: bool = False,
    sizes: dict[str, int] | None = None,
    groups: Groups | None = None,
) -> tuple[jax.Array, RunningStats]:
    """Streaming norm: update the running statistics, then normalize with them, in training as in evaluation.

        running = update(running, moments(x)),   y = (x - running.mean) / sqrt(running.var + epsilon) * scale + bias

    Works with one example at a time where it has places to average over. The statistics are constants to the gradient.

    Args:
        x: array laid out as `layout`.
        running: RunningStats along the axes that are not averaged.
        layout, over, scale, bias, features: as in `batch_norm`.
        momentum, debias, unbiased: as in `update`; debias by default, so that the first y is that of batch norm.
        epsilon: added to the variance, in its unit.
        mask, weights: which elements count and how much, as in `batch_norm`.
        sizes, groups: as in `batch_norm`.

    Returns:
        y, of the shape and dtype of `x`, and the new RunningStats.

    Raises:
        LayoutError, AxisError: as `batch_norm`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> y, running = jn.streaming_norm(jnp.array([[1.0], [3.0]]), jn.running_stats(c=1), momentum=0.5, epsilon=0.0)
        >>> y[:, 0].tolist(), running.mean.tolist()
        ([-1.0, 1.0], [2.0])

    Source: Liao, Kawaguchi, Poggio 2016, "Streaming Normalization", section 4.

    Differs from: the paper, which also averages gradients over steps. Flax and torch have none.
    """
    check_running(running)
    stats = moments(x, layout, over, mask=mask, weights=weights, sizes=sizes, groups=groups)
    check_count(x, stats.mean.size, layout, over, sizes, groups)
    running = update(running, stats, momentum, debias=debias, unbiased=unbiased)
    y = normalize(
        x, running, layout, scale=scale, bias=bias, features=features, epsilon=epsilon, mask=mask, weights=weights,
        sizes=sizes,
    )  # fmt: skip
    return y, running


@named
def virtual_batch_norm(
    x: ArrayLike,
    reference: Moments,
    layout: Names = "n ... c",
    over: Names = "...",
    *,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> jax.Array:
    """Virtual batch norm: every example as if it had been added, alone, to one fixed reference batch.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   (mean, var) of merge(reference, moments(x, over="..."))

    No example depends on its batch-mates.

    Args:
        x: array laid out as `layout`.
        reference: `moments` of the reference batch at this layer, along axes of the layout.
        layout: a name for every dimension of `x`.
        over: the axes averaged within an example.
        epsilon: added to the variance, in its unit.
        mask, weights: which elements of `x` count and how much; they broadcast as in NumPy.
        sizes: sizes of the axes that compose a dimension.
        **options: scale, bias, features, dtype: as in `normalize`.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError: as `moments`, and when `reference` has an axis that the moments of an example lack.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> reference = jn.moments(jnp.array([[1.0], [3.0]]), "n c", "n")
        >>> (jn.virtual_batch_norm(jnp.array([[5.0], [-1.0]]), reference, epsilon=0.0) ** 2).round(5)[:, 0].tolist()
        [1.5, 1.5]

    Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 3.5.

    Differs from: TensorFlow's VBN, which averages E[x^2] - E[x]^2. Flax and torch have none.
    """
    if not isinstance(reference, Moments):
        raise ArgumentError(f"reference must be Moments, got {type(reference).__name__}: see moments.")
    counted = {"mask": mask, "weights": weights, "sizes": sizes}
    own = moments(x, layout, over, **counted)
    return normalize(x, merge(broadcast_to(reference, own), own), layout, epsilon=epsilon, **counted, **options)
