"""Cross-iteration batch norm: the statistics of past steps, moved to the weights of this one."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.errors import ArgumentError, LayoutError, named
from jaxnorm.layout import Names, channels, meet
from jaxnorm.mapped import checks_vma, resolve_over
from jaxnorm.moments import Moments, moments
from jaxnorm.normalize import normalize
from jaxnorm.operands import as_array, inexact
from jaxnorm.sync import reduce_gradients

FIELDS = ["kernel", "mean", "var", "dmean", "dvar", "counted", "num_updates"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=FIELDS, meta_fields=[])
@dataclasses.dataclass(frozen=True)
class CrossIterationHistory:
    """The last steps of one layer, the newest first: its kernels, the batch statistics and their derivatives by it.

        mean, var: [steps, c];   kernel, dmean, dvar: [steps, *kernel.shape], of which the last axis is c
        counted: [steps, c], 1 where the step had data of the channel, 0 where it had none or there was no step

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> history = jn.cross_iteration_history(jnp.zeros((5, 2)), window=4)
        >>> history.mean.shape, history.dmean.shape, int(history.num_updates)
        ((3, 2), (3, 5, 2), 0)
    """

    kernel: jax.Array
    mean: jax.Array
    var: jax.Array
    dmean: jax.Array
    dvar: jax.Array
    counted: jax.Array
    num_updates: jax.Array


@named
def cross_iteration_history(kernel: ArrayLike, window: int = 4) -> CrossIterationHistory:
    """The history of a layer before any step.

        all zeros, window - 1 steps

    Args:
        kernel: the kernel of the layer, or one of its shape and dtype; the outputs are its last axis.
        window: how many steps are averaged, this one among them.

    Returns:
        CrossIterationHistory.

    Raises:
        ValueError: (ArgumentError) when `window` is not an integer of 1 or more.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.cross_iteration_history(jnp.zeros((5, 2)), window=3).mean.shape
        (2, 2)

    Source: Yao et al. 2021, "Cross-Iteration Batch Normalization", section 3.

    Differs from: the authors' code, whose buffers live in the layer.
    """
    if not isinstance(window, int) or window < 1:
        raise ArgumentError(f"window is a number of steps, 1 or more, got {window!r}.")
    kernel = jnp.asarray(kernel)
    past, per_channel = (window - 1, *kernel.shape), (window - 1, kernel.shape[-1])
    of_kernel, of_channel = (functools.partial(jnp.zeros, shape, jnp.float32) for shape in (past, per_channel))
    return CrossIterationHistory(
        of_kernel(), of_channel(), of_channel(), of_kernel(), of_kernel(), of_channel(), jnp.zeros((), jnp.int32)
    )


@named
def cross_iteration_batch_norm(
    apply: Callable[[jax.Array, jax.Array], jax.Array],
    kernel: ArrayLike,
    x: ArrayLike,
    history: CrossIterationHistory,
    layout: Names = "... c",
    over: Names = "...",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, CrossIterationHistory]:
    """Cross-iteration batch norm (CBN): for small batches, with the statistics of the last steps too.

        z = apply(kernel, x)
        mean_t(kernel) = mean_t + sum(d mean_t / d kernel (kernel - kernel_t)),   nu = E[z^2] likewise
        mean, nu = averages over the steps of mean_t and max(nu_t, mean_t^2),   var = nu - mean^2
        y = (z - mean) / sqrt(var + epsilon) * scale + bias

    Past steps are constants to the gradient. The derivative is that of a channel by its own part of the kernel, which
    is all of it for a convolution or a dense layer.

    Args:
        apply: the layer without bias, a function of kernel and x, linear in the kernel. The kernel's last axis is the
            outputs, the last of z.
        kernel: its weights.
        x: what `apply` takes.
        history: of this layer, from `cross_iteration_history`.
        layout: a name for every dimension of z, the channels last.
        over: the axes averaged: all but the channels, and mapped axes, which are crossed once for the statistics and
            once for their derivatives.
        scale, bias: along the channels; none means 1 and 0.
        epsilon: added to the variance, in its unit.
        mask, weights: which elements of z count and how much.

    Returns:
        y, of the shape and dtype of z, and the new history.

    Raises:
        LayoutError, AxisError: as `batch_norm`, and when the history is of another kernel.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> kernel, x = jnp.array([[2.0]]), jnp.array([[1.0], [3.0]])
        >>> history = jn.cross_iteration_history(kernel)
        >>> y, history = jn.cross_iteration_batch_norm(lambda k, x: x @ k, kernel, x, history, epsilon=0.0)
        >>> y[:, 0].tolist(), history.mean[0].tolist(), history.dmean[0, 0].tolist()
        ([-1.0, 1.0], [4.0], [2.0])

    Source: Yao et al. 2021, "Cross-Iteration Batch Normalization", equations 6 to 11.

    Differs from: the authors' code, which waits for a number of steps (burn-in) and averages E[z^2]: here the variance
        is moved and pooled centred, which is the same without its rounding. Flax and torch have none.
    """
    kernel, x = inexact(kernel, "kernel"), as_array(x, "x")
    if not isinstance(history, CrossIterationHistory):
        kind = type(history).__name__
        raise ArgumentError(f"history must be CrossIterationHistory, got {kind}: see cross_iteration_history.")
    if history.kernel.shape[1:] != kernel.shape:
        raise LayoutError(f"the history is of a kernel of shape {history.kernel.shape[1:]}, not {kernel.shape}.")

    def statistics(kernel: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Moments]:
        m = moments(apply(kernel, x), layout, over, mask=mask, weights=weights)
        return (m.mean, m.var), m

    z = jax.eval_shape(apply, kernel, x)
    frame, c = meet(layout, z.shape), channels(layout, over)
    if frame.size(c) != kernel.shape[-1]:
        raise LayoutError(f"the layer gives {frame.size(c)} entries along {c!r}, its kernel has {kernel.shape[-1]}.")
    (mean, var), back, now = jax.vjp(statistics, kernel, has_aux=True)
    # Statistics are the same on all devices. Each has the derivative by its own copy of the kernel; where JAX does not
    # know that, the cotangent is counted on each of them.
    mapped = resolve_over(over, frame)[1]
    ones = jnp.ones_like(mean) / (1 if checks_vma() else mapped.size)
    derivatives = [back(z)[0] for z in ((ones, jnp.zeros_like(ones)), (jnp.zeros_like(ones), ones))]
    dmean, dvar = reduce_gradients(derivatives, mapped.names) if mapped.names else derivatives
    mean, var = now.mean, now.var

    # To the kernel of now: a mean moves by its derivative, a variance by its own, less the square of what the mean does
    old = jax.tree.map(jax.lax.stop_gradient, history)
    moved = jax.lax.stop_gradient(kernel).astype(old.kernel.dtype)[None] - old.kernel
    dims = tuple(range(1, moved.ndim - 1))
    by = jnp.sum(old.dmean * moved, dims)
    means = old.mean + by
    variances = jnp.maximum(old.var + jnp.sum(old.dvar * moved, dims) - by**2, 0)
    here = (now.count > 0).astype(mean.dtype)
    past = old.counted.astype(mean.dtype)
    steps = jnp.maximum(here + past.sum(0), 1)
    share, past = here / steps, past / steps[None]
    pooled = share * mean + jnp.sum(past * means, 0)
    spread = share * (mean - pooled) ** 2 + jnp.sum(past * (means - pooled[None]) ** 2, 0)
    variance = share * var + jnp.sum(past * variances, 0) + spread
    stats = Moments((steps > 0).astype(variance.dtype), pooled, variance, now.axes)
    y = normalize(
        apply(kernel, x), stats, layout, scale=scale, bias=bias, epsilon=epsilon, mask=mask, weights=weights
    )
    some = jnp.any(now.count > 0)  # a batch of nothing says nothing

    def pushed(name: str, new: jax.Array) -> jax.Array:
        past = getattr(old, name)
        new = jax.lax.stop_gradient(new).astype(past.dtype)
        return jnp.where(some, jnp.concatenate([new[None], past])[: len(past)], past)

    newest = {"kernel": kernel, "mean": mean, "var": var, "dmean": dmean, "dvar": dvar, "counted": here}
    steps = {name: pushed(name, new) for name, new in newest.items()}
    return y, CrossIterationHistory(**steps, num_updates=old.num_updates + some.astype(jnp.int32))
