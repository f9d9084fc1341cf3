"""What devices have to agree on after a step: running statistics of their own, and gradients of shared parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.errors import ArgumentError, named
from jaxnorm.layout import Names
from jaxnorm.mapped import resolve_axes, varying_over
from jaxnorm.operands import as_array
from jaxnorm.running import RunningStats
from jaxnorm.stats import pool, ratio


@named
def sync_state(running: RunningStats, over: Names = "devices") -> RunningStats:
    """Running statistics that every device kept for itself, pooled over the devices.

        mean = sum(t mean_i) / T,   var = sum(t (var_i + |mean_i - mean|^2)) / T,   t = num_updates_i,   T = sum(t)

    The second term of the variance is that between the devices, which an average of variances lacks. A device weighs
    as much as the updates it has seen: one that never had data does not count. What comes out is the same on every
    device, and JAX knows it: it leaves `shard_map` with `out_specs=P()`.

    Args:
        running: the state of this device.
        over: mapped axes of vmap, pmap or shard_map; `name?` is one that may be absent.

    Returns:
        RunningStats of the same axes, shapes and dtypes. `num_updates` is the largest of the devices'.

    Raises:
        AxisError: when a name in `over` is no mapped axis.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm as jn
        >>> def local(x):
        ...     _, running = jn.batch_norm(x, jn.running_stats(c=1), "n c", "n", momentum=0.0)
        ...     return running, jn.sync_state(running, "devices")
        >>> x = jnp.array([[[0.0], [2.0]], [[4.0], [6.0]]])  # two devices
        >>> own, pooled = jax.vmap(local, axis_name="devices")(x)
        >>> own.mean.ravel().tolist(), own.var.ravel().tolist()
        ([1.0, 5.0], [1.0, 1.0])
        >>> pooled.mean.ravel().tolist(), pooled.var.ravel().tolist()
        ([3.0, 3.0], [5.0, 5.0])

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983, equation 2.1b.

    Differs from: timm's `distribute_bn` and Flax's advice to `pmean` the batch statistics: both average the variances.
        torch has nothing: a checkpoint holds the statistics of process 0.
    """
    if not isinstance(running, RunningStats):
        raise ArgumentError(f"running must be RunningStats, got {type(running).__name__}.")
    mapped = resolve_axes(over)
    if not mapped.names:
        return running
    mean, var, updates = (jnp.asarray(z) for z in (running.mean, running.var, running.num_updates))
    wide = np.promote_types(np.promote_types(mean.dtype, var.dtype), np.float32)
    rows = (jnp.broadcast_to(updates.astype(wide), mean.shape), mean.astype(wide), var.astype(wide))
    t, means, variances = jnp.moveaxis(mapped.gather(jnp.stack(rows)), 1, 0)
    t, variances = jnp.real(t), jnp.real(variances)
    t = jnp.where(t.sum(0, keepdims=True) > 0, t, 1)  # before any update all are alike: mean 0 and var 1 stay
    total, shift, offset, m2 = pool(t, means, jnp.zeros_like(means), t * variances)
    pooled_mean, pooled_var = (shift + offset).astype(mean.dtype), ratio(m2, total).astype(var.dtype)
    most = mapped.gather(updates).max(0)
    return RunningStats(pooled_mean, pooled_var, most, running.axes)


@named
def reduce_gradients(grads: Any, over: Names = "devices", *, mean: bool = False) -> Any:
    """Gradients of the sum of all devices' losses, exactly once, wherever the gradient was taken inside the map.

        g = sum(d loss_i / d params),   with mean=True   g = sum(d loss_i / d params) / devices

    Every device differentiates its own loss, the one of its own part of the batch. Under pmap, vmap and
    `shard_map(check_vma=False)` it then holds a partial sum, which is summed here. Under `shard_map` (check_vma=True)
    JAX has summed the gradients of replicated parameters before it returns them: those are left as they are, and a
    `psum` or `pmean` of them, the habit from pmap, would be wrong by the number of devices. Parameters that differ
    from device to device have gradients that JAX has not summed; so they are here.

    The loss must be the device's own, of its own data. A `psum` inside of it is differentiated too, which multiplies
    the gradient by the number of devices everywhere but under check_vma=True. And a loss that is the same on every
    device (of parameters or synced statistics alone) counts once under check_vma=True and once for each device
    elsewhere: make it vary, `jax.lax.pcast(loss, "devices", to="varying")`, or add it to one that does.

    Args:
        grads: any tree of arrays. Gradients of integers (float0) stay as they are.
        over: mapped axes of vmap, pmap or shard_map along which the parameters are the same. Not one along which they
            are cut (FSDP): each device has the gradient of another part there. `name?` is one that may be absent: under
            jit over sharded arrays none is bound, and gradients are those of the whole already.
        mean: divide by the number of devices: the gradient of the mean of their losses.

    Returns:
        The tree, summed over the devices, the same on all of them. Leaves of one dtype cross in one collective.

    Raises:
        AxisError: when a name in `over` is no mapped axis.
        ValueError: (ArgumentError) when a leaf is no array of floating or complex numbers.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm as jn
        >>> def local(w, x):
        ...     grads = jax.grad(lambda w: jnp.sum(w * x))(w)
        ...     return grads, jn.reduce_gradients(grads, "devices")
        >>> own, summed = jax.vmap(local, (None, 0), axis_name="devices")(1.0, jnp.array([2.0, 3.0]))
        >>> own.tolist(), summed.tolist()
        ([2.0, 3.0], [5.0, 5.0])

    Source: the types of shard_map say over which axes a value varies ("vma" in JAX's documentation of shard_map).

    Differs from: `jax.lax.pmean(grads, "devices")`, which is right under pmap and N times too large under shard_map;
        torch's DistributedDataParallel, which always averages.
    """
    mapped = resolve_axes(over)
    if not mapped.names:
        return grads
    paths, tree = jax.tree.flatten_with_path(grads)
    leaves = [leaf for _, leaf in paths]
    pending: dict[tuple[str, ...], list[int]] = {}
    for i, (path, leaf) in enumerate(paths):
        if getattr(leaf, "dtype", None) == jax.dtypes.float0:  # the gradient of an integer: nothing
            continue
        leaves[i] = as_array(leaf, f"grads{jax.tree_util.keystr(path)}")
        if not jnp.issubdtype(leaves[i].dtype, jnp.inexact):
            raise ArgumentError(f"grads{jax.tree_util.keystr(path)} has dtype {leaves[i].dtype}: no gradient has.")
        names = varying_over(leaves[i], mapped.names)
        if names:
            pending.setdefault(names, []).append(i)
    for names, places in pending.items():
        summed = jax.lax.psum([leaves[i] for i in places], names)
        for i, leaf in zip(places, summed, strict=True):
            leaves[i] = leaf
    if mean:
        leaves = [g if g.dtype == jax.dtypes.float0 else g / jnp.asarray(mapped.size, g.dtype) for g in leaves]
    return jax.tree.unflatten(tree, leaves)
