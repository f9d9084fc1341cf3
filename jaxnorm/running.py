"""RunningStats: the averages that batch norm carries from step to step, as explicit state."""

import dataclasses
import functools
import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxnorm.errors import ArgumentError, LayoutError, named
from jaxnorm.layout import Names
from jaxnorm.moments import Moments, along, named_sizes
from jaxnorm.sharded import keep_sharding


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean", "var", "num_updates"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class RunningStats:
    """Running mean and variance along named axes, and how many updates they have seen.

        mean = momentum * mean + (1 - momentum) * batch mean,   var likewise

    A frozen pytree, legal as a scan carry: an update changes no shape and no dtype. Before the first update it reads
    mean 0 and var 1. `num_updates` is one int32 for all channels, and counts an update in which any channel had data.
    So `debias` and `momentum=None` are exact for channels that had data in all of them; one that was masked out of an
    update keeps its value then, and later weighs as if it had taken part.

    Example:
        >>> import jaxnorm as jn
        >>> running = jn.running_stats(c=2)
        >>> running.axes, running.mean.tolist(), running.var.tolist(), int(running.num_updates)
        (('c',), [0.0, 0.0], [1.0, 1.0], 0)
    """

    mean: jax.Array
    var: jax.Array
    num_updates: jax.Array
    axes: tuple[str, ...]


@named
def running_stats(axes: Names = "c", **sizes: int) -> RunningStats:
    """Running statistics before any update: mean 0, var 1.

        mean = 0,   var = 1,   num_updates = 0

    Args:
        axes: names of the axes the statistics are kept along, as "c" or ("d", "c").
        **sizes: the size of each of them, as c=64.

    Returns:
        RunningStats, float32.

    Raises:
        LayoutError: when the sizes are not those of the axes.

    Example:
        >>> import jaxnorm as jn
        >>> jn.running_stats(c=64).var.shape
        (64,)

    Source: Ioffe and Szegedy 2015, section 3.1.

    Differs from: Flax's `batch_stats` and torch's buffers, which live in a module; the values are the same.
    """
    names, shape = named_sizes(axes, sizes)
    # distinct arrays: a donated state may not hold one buffer twice
    mean, var = jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32)
    return RunningStats(mean, var, jnp.zeros((), jnp.int32), names)


@named
def update(
    running: RunningStats,
    moments: Moments,
    momentum: ArrayLike | None = 0.99,
    *,
    debias: bool = False,
    unbiased: bool = False,
) -> RunningStats:
    """Running statistics after one more batch.

        new = momentum_t * old + (1 - momentum_t) * batch

        momentum_t = momentum                                             Flax's rule, to the bit
                   = momentum (1 - momentum^t) / (1 - momentum^(t + 1))   debias=True
                   = t / (t + 1)                                          momentum=None, t updates before this one

    With `debias` what is stored is always the bias-corrected average (that of Adam), ready to read after one step.
    Moments with count 0 leave their channel as it is. Axes that `running` lacks are merged first, which is what ghost
    batch norm needs. No gradient flows into running state.

    Args:
        running: the state so far.
        moments: of one batch, or of many merged, along at least the axes of `running`.
        momentum: the part of the old value that is kept, 0 to 1; None for the cumulative average, in which every
            update weighs the same.
        debias: warm the momentum up, so that the initial 0 and 1 carry no weight.
        unbiased: average the variance with Bessel's correction, count / (count - 1).

    Returns:
        RunningStats of the same shapes and dtypes. (Complex moments make a real mean complex, as in Flax.)

    Raises:
        LayoutError: when `moments` lacks an axis of `running` or has another size along it.
        ValueError: (ArgumentError) when momentum is not in [0, 1], or is 1 with `debias`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> batch = jn.moments(jnp.array([[1.0], [3.0]]), "n c", "n")
        >>> jn.update(jn.running_stats(c=1), batch, momentum=0.75).mean.tolist()
        [0.5]
        >>> jn.update(jn.running_stats(c=1), batch, momentum=0.75, debias=True).mean.tolist()
        [2.0]

    Source: Ioffe and Szegedy 2015, algorithm 2; Kingma and Ba 2015, section 3 (bias correction).

    Differs from: torch, whose momentum is the part of the *new* value (0.1 there is 0.9 here), whose None is the
        cumulative average too, and which stores the unbiased variance; Flax has neither debias nor None.
    """
    _check(running, moments, momentum, debias)
    traced = any(isinstance(z, Tracer) for z in jax.tree.leaves((running, moments)))
    run = _updated_once if traced else _updated  # operation by operation outside of jit, for the bits of Flax
    if isinstance(momentum, Real) or momentum is None:  # a number goes into the program as it is: Flax's to the bit
        return run(running, moments, None, None if momentum is None else float(momentum), debias, unbiased)
    return run(running, moments, momentum, None, debias, unbiased)


def check_running(running: Any) -> None:
    if not isinstance(running, RunningStats):
        raise ArgumentError(f"running must be RunningStats, got {type(running).__name__}: see running_stats.")


def _updated(
    running: RunningStats, moments: Moments, traced: Any, number: float | None, debias: bool, unbiased: bool
) -> RunningStats:
    mean, var, num_updates = (jnp.asarray(z) for z in (running.mean, running.var, running.num_updates))
    merged = along(moments, running.axes)
    if merged.mean.shape != mean.shape:
        raise LayoutError(f"moments along {merged.axes} have shape {merged.mean.shape}, the running ones {mean.shape}.")
    merged = jax.tree.map(jax.lax.stop_gradient, merged)
    t = num_updates.astype(np.promote_types(var.dtype, np.float32))
    old, new = _factors(t, number if traced is None else traced, debias)
    some = merged.count > 0

    def average(kept: jax.Array, batch: jax.Array) -> jax.Array:
        dtype = np.promote_types(kept.dtype, batch.dtype)
        # The factors are selected, not the results: products may mix replicated and sharded operands, a select may not.
        a, b = (jnp.where(some, jnp.asarray(f, dtype), g) for f, g in ((old, 1), (new, 0)))
        store = dtype if jnp.iscomplexobj(batch) else kept.dtype
        return keep_sharding((a * kept.astype(dtype) + b * batch.astype(dtype)).astype(store), kept)

    new_var = average(var, merged.var_unbiased if unbiased else merged.var)
    counted = num_updates + jnp.any(some).astype(num_updates.dtype)
    return RunningStats(average(mean, merged.mean), new_var, keep_sharding(counted, num_updates), running.axes)


_updated_once = jax.jit(_updated, static_argnums=(3, 4, 5), inline=True)  # traced once for many layers of one shape


def _factors(t: jax.Array, momentum: Any, debias: bool):
    """The weights of the old and the new value after t updates."""
    if momentum is None:
        return t / (t + 1), 1 / (t + 1)
    if not debias:
        return momentum, 1 - momentum
    tiny = float(jnp.finfo(jnp.float32).tiny)  # log(0) times t = 0 would be NaN
    log = math.log(max(momentum, tiny)) if isinstance(momentum, float) else jnp.log(jnp.maximum(momentum, tiny))
    old = momentum * jnp.expm1(t * log) / jnp.expm1((t + 1) * log)  # expm1: 1 - momentum^t keeps its digits
    return old, 1 - old


def _check(running: RunningStats, moments: Moments, momentum: Any, debias: bool) -> None:
    if not isinstance(running, RunningStats) or not isinstance(moments, Moments):
        kinds = type(running).__name__, type(moments).__name__
        raise ArgumentError("update takes RunningStats, then Moments, got {} and {}.".format(*kinds))
    missing = [name for name in running.axes if name not in moments.axes]
    if missing:
        raise LayoutError(
            f"the running statistics are kept along {missing[0]!r}, which the moments lack.\n"
            f"  running along {running.axes}, moments along {moments.axes}: averaged too much? See over."
        )
    if isinstance(momentum, str) or (isinstance(momentum, Real) and not 0 <= float(momentum) <= 1):
        raise ArgumentError(f"momentum is the part of the old value that is kept, 0 to 1, got {momentum!r}.")
    if debias and isinstance(momentum, Real) and float(momentum) == 1:
        raise ArgumentError("momentum=1 with debias never ends its warm-up. momentum=None is its limit.")
