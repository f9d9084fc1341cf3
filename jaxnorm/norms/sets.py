"""Several sets of running statistics under one scale and bias."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxnorm.errors import ArgumentError, named, nearest
from jaxnorm.layout import Names, flat, parse, text_of
from jaxnorm.norms.basic import batch_norm
from jaxnorm.running import RunningStats


@named
def split_batch_norm(
    x: ArrayLike,
    running: RunningStats | Mapping[str, RunningStats],
    which: Any,
    layout: Names = "... c",
    over: Names = "...",
    **options: Any,
) -> tuple[jax.Array, Any]:
    """Batch norm with several sets of running statistics, one for each kind of data, under one scale and bias.

        y, running[which] = batch_norm(x, running[which], ...)

    Kinds are clean and adversarial, real and fake, one for each domain.

    Args:
        x: array laid out as `layout`, all of one set.
        running: a dict of RunningStats by name; or one RunningStats whose first axis is the set, as
            `running_stats("set c", set=2, c=64)`, where `which` may be traced.
        which: the name of the set, or its index.
        layout, over: as in `batch_norm`.
        **options: scale, bias, features, momentum, epsilon, mask, weights, debias, unbiased, sizes, groups: as in
            `batch_norm`.

    Returns:
        y, of the shape and dtype of `x`, and `running` with the one set updated. `num_updates` of stacked statistics
        is shared: with `debias` or `momentum=None` keep a dict.

    Raises:
        LayoutError, AxisError: as `batch_norm`.
        ValueError: (ArgumentError) when there is no such set, or `debias` and `momentum=None` meet stacked statistics.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> running = {"clean": jn.running_stats(c=1), "adversarial": jn.running_stats(c=1)}
        >>> y, running = jn.split_batch_norm(jnp.array([[1.0], [3.0]]), running, "clean", momentum=0.5)
        >>> running["clean"].mean.tolist(), running["adversarial"].mean.tolist()
        ([1.0], [0.0])

        >>> stacked = jn.running_stats("set c", set=2, c=1)
        >>> y, stacked = jn.split_batch_norm(jnp.array([[1.0], [3.0]]), stacked, jnp.array(1), momentum=0.5)
        >>> stacked.mean.tolist()
        [[0.0], [1.0]]

    Source: Xie et al. 2020, "Adversarial Examples Improve Image Recognition", section 4 (auxiliary batch norm).

    Differs from: timm's SplitBatchNorm, which cuts every batch into fixed parts. Flax has none.
    """
    own = select_stats(running, which)
    if isinstance(running, RunningStats) and running.axes[0] in flat(parse(layout)):
        raise ArgumentError(
            f"the first axis of stacked statistics is the set, and {running.axes[0]!r} is one of the layout "
            f'"{text_of(layout)}". Make them with running_stats("set c", set=2, c=64).'
        )
    if isinstance(running, RunningStats) and (options.get("debias") or options.get("momentum", 0.0) is None):
        raise ArgumentError("stacked statistics share num_updates: debias and momentum=None need a dict of them.")
    y, new = batch_norm(x, own, layout, over, **options)
    if isinstance(running, Mapping):
        return y, type(running)({**running, which: new})  # type: ignore[call-arg]

    def put(old: jax.Array, one: jax.Array) -> jax.Array:  # the mean of complex x is complex
        old = jnp.asarray(old)
        return old.astype(np.promote_types(old.dtype, one.dtype)).at[which].set(one)

    mean, var = put(running.mean, new.mean), put(running.var, new.var)
    return y, RunningStats(mean, var, new.num_updates, running.axes)


@named
def select_stats(running: RunningStats | Mapping[str, RunningStats], which: Any) -> RunningStats:
    """One set of the running statistics of `split_batch_norm`, for evaluation with `normalize`.

        running[which]

    Args:
        running: a dict of RunningStats, or one RunningStats whose first axis is the set.
        which: a name, or an index, traced or not. As everywhere in JAX a traced index out of range is clamped.

    Returns:
        RunningStats of that set.

    Raises:
        ValueError: (ArgumentError) when there is no such set.

    Example:
        >>> import jaxnorm as jn
        >>> jn.select_stats(jn.running_stats("set c", set=3, c=2), 1).mean.shape
        (2,)

    Source: Xie et al. 2020, section 4.

    Differs from: Flax and torch, where a set of statistics is a module of its own.
    """
    if isinstance(running, Mapping):
        if not isinstance(which, str) or which not in running:
            known = ", ".join(map(repr, running))
            raise ArgumentError(f"there are no statistics {which!r}, only {known}.{nearest(str(which), running)}")
        return running[which]
    if not isinstance(running, RunningStats) or len(running.axes) < 1:
        raise ArgumentError(f"running must be a dict of RunningStats or stacked ones, got {type(running).__name__}.")
    if isinstance(which, str) or jnp.shape(which) or not jnp.issubdtype(jnp.result_type(which), jnp.integer):
        raise ArgumentError(f"which must be one integer, the index along {running.axes[0]!r}, got {which!r}.")
    if not isinstance(which, Tracer) and not 0 <= int(np.asarray(which)) < len(running.mean):
        raise ArgumentError(f"there is no set {which} along {running.axes[0]!r}, which has {len(running.mean)}.")
    mean, var = jnp.asarray(running.mean)[which], jnp.asarray(running.var)[which]
    return RunningStats(mean, var, running.num_updates, running.axes[1:])
