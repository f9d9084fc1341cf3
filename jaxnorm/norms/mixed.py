"""Norms made of norms: statistics mixed by learned weights, or one norm behind another."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm.elementwise import remembering
from jaxnorm.errors import LayoutError, named
from jaxnorm.layout import Names, averaged, channels, first, kept
from jaxnorm.moments import Moments, broadcast_to, merge_along, moments
from jaxnorm.normalize import normalize
from jaxnorm.norms.basic import batch_norm, group_norm
from jaxnorm.operands import check_count, inexact
from jaxnorm.running import RunningStats, check_running, update
from jaxnorm.sharded import keep_sharding


@named
def switchable_norm(
    x: ArrayLike,
    running: RunningStats,
    mean_logits: ArrayLike,
    var_logits: ArrayLike,
    layout: Names = "n ... c",
    over: Names = "n ...",
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
    groups: Any = None,
    train: bool = True,
) -> tuple[jax.Array, RunningStats]:
    """Switchable norm: learns how much of instance, layer and batch norm.

        mean = sum(softmax(mean_logits) means),   var = sum(softmax(var_logits) vars),   of instance, layer, batch
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: array laid out as `layout`, the examples first.
        running: RunningStats along the axes that are not averaged.
        mean_logits, var_logits: three numbers each, for instance, layer and batch; ones to start with.
        layout: a name for every dimension of `x`.
        over: the axes of the batch statistics, mapped ones among them. The instance's are over all of them that are
            dimensions but the first name, the layer's over those and the features.
        scale, bias, features: as in `batch_norm`.
        momentum, debias, unbiased: as in `update`.
        epsilon: added to the variance, in its unit.
        mask, weights: which elements count and how much, as in `batch_norm`.
        sizes, groups: as in `batch_norm`.
        train: False takes the running statistics for the batch's, and changes nothing.

    Returns:
        y, of the shape and dtype of `x`, and the new RunningStats.

    Raises:
        LayoutError, AxisError: as `batch_norm`, and when the logits are not three.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x, instance = jnp.array([[[1.0], [3.0]], [[0.0], [8.0]]]), jnp.array([50.0, 0.0, 0.0])
        >>> y, _ = jn.switchable_norm(x, jn.running_stats(c=1), instance, instance, epsilon=0.0)
        >>> y[:, :, 0].tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    Source: Luo et al. 2019, "Differentiable Learning-to-Normalize via Switchable Normalization", equations 3 to 5.

    Differs from: the authors' code, whose batch statistics are each device's own. Flax and torch have none.
    """
    mean_logits, var_logits = jnp.asarray(mean_logits), jnp.asarray(var_logits)
    if mean_logits.shape != (3,) or var_logits.shape != (3,):
        raise LayoutError(
            "mean_logits and var_logits are three numbers each, for instance, layer and batch: got shapes "
            f"{mean_logits.shape} and {var_logits.shape}."
        )
    check_running(running)
    counted: dict[str, Any] = {"mask": mask, "weights": weights, "sizes": sizes}
    inner = tuple(name for name in averaged(layout, over) if name != first(layout))
    features = kept(layout, over) if features is None else features

    @remembering
    def step(x, running, mean_logits, var_logits, scale, bias):
        instance = moments(x, layout, inner or "nothing?", **counted)
        layer = broadcast_to(merge_along(instance, kept(layout, over)), instance)
        batch = Moments(jnp.ones_like(running.var), running.mean, running.var, running.axes)
        if train:
            batch = moments(x, layout, over, groups=groups, **counted)
            check_count(x, batch.mean.size, layout, over, sizes, groups)
            running = update(running, batch, momentum, debias=debias, unbiased=unbiased)
        parts = instance, layer, broadcast_to(batch, instance)
        mean = mixed(mean_logits, [m.mean for m in parts])
        var = mixed(var_logits, [m.var for m in parts])
        some = jnp.stack([keep_sharding(m.count.astype(var.dtype), var) for m in parts]).sum(0)
        stats = Moments(some, mean, some * var, instance.axes)
        affine = {"scale": scale, "bias": bias, "features": features}
        return normalize(x, stats, layout, **affine, epsilon=epsilon, **counted), running

    arrays = (None if z is None else jnp.asarray(z) for z in (scale, bias))
    return step(inexact(x, "x"), running, mean_logits, var_logits, *arrays)


def mixed(logits: jax.Array, parts: list[jax.Array]) -> jax.Array:
    """Parts by their softmax shares."""
    share = jax.nn.softmax(logits.astype(np.promote_types(logits.dtype, np.float32)))
    instance, layer, batch = (share[i].astype(part.dtype) * part for i, part in enumerate(parts))
    return instance + layer + batch


@named
def batch_channel_norm(
    x: ArrayLike,
    running: RunningStats,
    num_groups: int,
    layout: Names = "n ... c",
    over: Names = "n ...",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    channel_scale: ArrayLike | None = None,
    channel_bias: ArrayLike | None = None,
    momentum: ArrayLike | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    debias: bool = False,
    unbiased: bool = False,
    sizes: dict[str, int] | None = None,
    groups: Any = None,
    train: bool = True,
) -> tuple[jax.Array, RunningStats]:
    """Batch-channel norm (BCN): batch norm, and group norm of what it gives, which keeps every channel alive.

        y = group_norm(batch_norm(x) * scale + bias) * channel_scale + channel_bias

    Args:
        x: array laid out as `layout`, the examples first.
        running: RunningStats along the axes that are not averaged.
        num_groups: of the group norm; it must divide the channels.
        layout, over: as in `batch_norm`; the group norm's axes are those of `group_norm`.
        scale, bias: of the batch norm, along the axis that is not averaged.
        channel_scale, channel_bias: of the group norm, along the same axis.
        momentum, debias, unbiased: as in `update`.
        epsilon: added to both variances, in their unit.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes, groups: as in `batch_norm`.
        train: False takes the running statistics, and changes nothing.

    Returns:
        y, of the shape and dtype of `x`, and the new RunningStats.

    Raises:
        LayoutError, AxisError: as `batch_norm` and `group_norm`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[1.0, 5.0], [3.0, 9.0]])
        >>> y, _ = jn.batch_channel_norm(x, jn.running_stats(c=2), 1, epsilon=1e-12, bias=jnp.array([0.0, 3.0]))
        >>> y.round(3).tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    Source: Qiao et al. 2019, "Rethinking Normalization and Elimination Singularity in Neural Networks", section 4.

    Differs from: the paper's version for micro-batches, which is `streaming_norm` before `group_norm`. Flax and torch
        have none.
    """
    check_running(running)
    c = channels(layout, over)
    given = {"scale": scale, "bias": bias, "channel_scale": channel_scale, "channel_bias": channel_bias}
    given = {name: jnp.asarray(z) for name, z in given.items() if z is not None}

    @remembering
    def step(x, running, given):
        affine = {name: given.get(name) for name in ("scale", "bias")}
        if train:
            y, running = batch_norm(
                x, running, layout, over, **affine, momentum=momentum, epsilon=epsilon, mask=mask, debias=debias,
                unbiased=unbiased, sizes=sizes, groups=groups,
            )  # fmt: skip
        else:
            y = normalize(x, running, layout, **affine, epsilon=epsilon, mask=mask, sizes=sizes)
        affine = {name: given.get(f"channel_{name}") for name in ("scale", "bias")}
        return group_norm(y, num_groups, layout, **affine, features=c, epsilon=epsilon, mask=mask, sizes=sizes), running

    return step(inexact(x, "x"), running, given)
