"""Whitening: batch norm that also takes away how channels go together. Its statistics are a mean and a covariance."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.elementwise import affine, in_range, remembering
from jaxnorm.errors import ArgumentError, LayoutError, named
from jaxnorm.layout import Names, channels
from jaxnorm.moments import Moments, moments, named_sizes
from jaxnorm.operands import check_count, check_epsilon, feature_array, operands
from jaxnorm.running import RunningStats, update
from jaxnorm.sharded import replicated
from jaxnorm.stats import clean, ratio


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean", "cov", "num_updates"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class RunningCovariance:
    """Running mean and covariance of the channels, in groups that are whitened together.

        cov = momentum * cov + (1 - momentum) * batch covariance,   mean likewise

    `cov` has the shape (c / group_size, group_size, group_size). Before the first update it is the identity.

    Example:
        >>> import jaxnorm as jn
        >>> running = jn.running_covariance(2, c=4)
        >>> running.axes, running.cov.shape, int(running.num_updates)
        (('c',), (2, 2, 2), 0)
    """

    mean: jax.Array
    cov: jax.Array
    num_updates: jax.Array
    axes: tuple[str, ...]


@named
def running_covariance(group_size: int, axes: Names = "c", **sizes: int) -> RunningCovariance:
    """Running statistics of whitening before any update: mean 0, covariance the identity.

        mean = 0,   cov = I for every group,   num_updates = 0

    Args:
        group_size: how many consecutive channels are whitened together; it must divide their number.
        axes: the name of the channel axis.
        **sizes: its size, as c=64.

    Returns:
        RunningCovariance, float32.

    Raises:
        LayoutError: when there is not one axis, or `group_size` does not divide it.

    Example:
        >>> import jaxnorm as jn
        >>> jn.running_covariance(2, c=2).cov.tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]

    Source: Huang et al. 2018, "Decorrelated Batch Normalization", algorithm 1.

    Differs from: the authors' code, which keeps the whitening matrix: the average of a covariance is one.
    """
    names, shape = named_sizes(axes, sizes)
    if len(names) != 1:
        raise LayoutError(f"whitening has one axis of channels, got {names}.")
    _check_group(group_size, shape[0])
    cov = jnp.tile(jnp.eye(group_size, dtype=jnp.float32), (shape[0] // group_size, 1, 1))
    return RunningCovariance(jnp.zeros(shape, jnp.float32), cov, jnp.zeros((), jnp.int32), names)


def _check_group(group_size: Any, channels: int) -> None:
    if not isinstance(group_size, int) or group_size < 1 or channels % group_size:
        raise LayoutError(f"group_size={group_size!r} does not divide the {channels} channels.")


@jax.custom_jvp
def inverse_root(s: jax.Array) -> jax.Array:
    """s^(-1/2) of symmetric positive matrices.

    Its derivative is written for the function and not for the eigenvectors, which have none where eigenvalues meet:
    with s = V diag(e) V', W = s^(-1/2) and B = V' ds V,   dW = -V (B_ij / (sqrt(e_i e_j) (sqrt(e_i) + sqrt(e_j)))) V'.
    """
    values, vectors = _eigen(s)
    return (vectors / jnp.sqrt(values)[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)


def _eigen(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and vectors. What is smaller than the rounding of the largest value is that rounding: of channels
    that repeat each other, or of fewer examples than channels, `eigh` finds values below zero."""
    values, vectors = jnp.linalg.eigh(s)
    least = values.max(-1, keepdims=True) * (s.shape[-1] * float(jnp.finfo(s.dtype).eps))
    return jnp.maximum(values, jnp.where(least > 0, least, 1)), vectors


@inverse_root.defjvp
def _(primals, tangents):
    (s,), (ds,) = primals, tangents
    w = inverse_root(s)
    values, vectors = _eigen(s)
    root, back = jnp.sqrt(values), jnp.swapaxes(vectors, -1, -2)
    between = root[..., :, None] * root[..., None, :] * (root[..., :, None] + root[..., None, :])
    return w, -vectors @ ((back @ ds @ vectors) / between) @ back


def newton_inverse_root(s: jax.Array, num_iterations: int) -> jax.Array:
    """s^(-1/2) by Newton's iteration, of matrix products alone: exact for many iterations, milder for few."""
    trace = jnp.trace(s, axis1=-2, axis2=-1)[..., None, None]
    trace = jnp.where(trace > 0, trace, 1)
    eye = jnp.eye(s.shape[-1], dtype=s.dtype)[None]
    # With q = s p carried along, p (3 - q p) / 2 is the paper's (3 p - p^3 s) / 2, and does not diverge by rounding
    # (Higham 2008, "Functions of Matrices", section 6.3).
    q, p = s / trace, jnp.broadcast_to(eye, s.shape)
    for _ in range(num_iterations):
        step = (3 * eye - p @ q) / 2
        q, p = q @ step, step @ p
    return p / jnp.sqrt(trace)


def _whiten(root, x, running, layout, over, scale, bias, momentum, epsilon, mask, weights, groups, train):
    """y and the new running statistics; `root` makes a whitening matrix of a covariance."""
    if not isinstance(running, RunningCovariance):
        raise ArgumentError(f"running must be RunningCovariance, got {type(running).__name__}: see running_covariance.")
    c = channels(layout, over)
    op = operands(x, layout, over, mask=mask, weights=weights, groups=groups)
    if running.axes != (c,) or running.mean.shape != (op.frame.size(c),):
        raise LayoutError(
            f"the running covariance is kept along the channels, {c!r}.\n"
            f"  running along {running.axes} of shape {running.mean.shape}\n{op.frame.given}"
        )
    if jnp.iscomplexobj(op.x):
        raise LayoutError(f"whitening is of real x, got {op.x.dtype}.\n{op.frame.given}")
    dim, size = op.frame.names.index(c), running.cov.shape[-1]
    if op.slots.weights is not None and op.slots.weights.shape[dim] != 1:
        raise LayoutError(f"weights of whitening are the same for all channels: {c!r} of size 1.\n{op.frame.given}")

    @remembering
    def step(x, slots, running, scale, bias):
        z = jnp.moveaxis(clean(x, x, slots), dim, -1)

        def rows(a):  # (..., groups, members)
            return jnp.broadcast_to(jnp.moveaxis(a, dim, -1), z.shape).reshape(*z.shape[:-1], z.shape[-1] // size, size)

        def back(a):
            return jnp.moveaxis(a.reshape(z.shape), -1, dim)

        if train:
            # A place counts for a group where all channels of the group count: only so is a covariance positive.
            counts = jnp.ones((1,) * (z.ndim + 1), z.dtype)
            if slots.valid is not None:
                counts = rows(slots.valid).all(-1, keepdims=True).astype(z.dtype)
            if slots.weights is not None:
                counts = counts * rows(slots.weights)[..., :1].astype(z.dtype)
            counts = jnp.broadcast_to(counts, rows(x).shape)
            stats = moments(x, layout, over, weights=back(counts), groups=groups)
            check_count(x, stats.mean.size, layout, over, None, groups)
            centred = rows(clean(x, x, slots)) - stats.mean.reshape(*(1,) * (z.ndim - 1), -1, size)
            counted = jnp.where(counts > 0, centred, 0)
            sums = jnp.einsum("...gi,...gj->gij", counted * counts, counted, out_sharding=replicated(x))
            # A second collective, and not one gather of all moments: that has no derivative but under check_vma=True.
            sums = op.plan.mapped.total(sums, slots.member)
            count, mean = stats.count.reshape(-1, size)[:, :1, None], stats.mean
            cov = ratio(sums, jnp.broadcast_to(count, sums.shape))
            running = _updated(running, stats, cov, momentum)
        else:
            cov, mean = running.cov.astype(z.dtype), running.mean.astype(z.dtype)
            centred = rows(clean(x, x, slots)) - mean.reshape(*(1,) * (z.ndim - 1), -1, size)
        w = root(cov + check_epsilon(epsilon, op.x.dtype) * jnp.eye(size, dtype=z.dtype)[None])
        y = jnp.einsum("gij,...gj->...gi", w, centred)
        if slots.valid is not None:
            # A channel that is masked at a place is whitened there like the rest, and is not mixed into the others.
            valid, own = rows(slots.valid), jnp.diagonal(w, axis1=-2, axis2=-1)
            y = jnp.einsum("gij,...gj->...gi", w, jnp.where(valid, centred, 0))
            y = y + jnp.where(valid, 0, centred) * own.reshape(*(1,) * (z.ndim - 1), *own.shape)
        y = affine(back(y), scale, bias)
        return in_range(y, slots, op.plan.dtype).astype(op.plan.dtype), running

    placed = (feature_array(z, c, op.frame, name, op.x.dtype) for z, name in ((scale, "scale"), (bias, "bias")))
    return step(op.x, op.slots, running, *placed)


def _updated(running: RunningCovariance, stats: Moments, cov: jax.Array, momentum: Any) -> RunningCovariance:
    """The covariance averaged by the rule of `update`, as if it were a mean along axes of its own."""
    as_mean = RunningStats(running.mean, jnp.ones_like(running.mean), running.num_updates, running.axes)
    mean = update(as_mean, stats, momentum)
    axes, size = ("group", "row", "column"), cov.shape[-1]
    count = jnp.broadcast_to(stats.count.reshape(-1, size)[:, :1, None], cov.shape)
    whole = RunningStats(running.cov, jnp.ones_like(running.cov), running.num_updates, axes)
    new = update(whole, Moments(count, cov, jnp.zeros_like(cov), axes), momentum)
    return RunningCovariance(mean.mean, new.mean, mean.num_updates, running.axes)


@named
def decorrelated_batch_norm(
    x: ArrayLike,
    running: RunningCovariance,
    layout: Names = "n ... c",
    over: Names = "n ...",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    momentum: ArrayLike | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    groups: Any = None,
    train: bool = True,
) -> tuple[jax.Array, RunningCovariance]:
    """Decorrelated batch norm (DBN): ZCA whitening of groups of channels.

        y = W (x - mean) * scale + bias,   W = (cov + epsilon I)^(-1/2) for each group of consecutive channels

    Args:
        x: array laid out as `layout`, real.
        running: RunningCovariance, which says the size of the groups.
        layout: a name for every dimension of `x`.
        over: the axes averaged: all dimensions but the channels, and mapped axes, which whitening crosses twice: for
            the mean, then for the covariance about it.
        scale, bias: along the channels; none means 1 and 0.
        momentum: the part of the old running value that is kept; None for the cumulative average.
        epsilon: added to the diagonal of the covariance, in its unit.
        mask, weights: which elements count and how much. A place counts for a group of channels where all of them do;
            weights are the same for all channels.
        groups: as in `batch_norm`.
        train: False takes the running statistics, and changes nothing.

    Returns:
        y, of the shape and dtype of `x`, and the new RunningCovariance.

    Raises:
        LayoutError, AxisError: as `standardize`, and when another axis than the channels is left.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[2.0, 1.0], [-2.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
        >>> y, _ = jn.decorrelated_batch_norm(x, jn.running_covariance(2, c=2), epsilon=0.0)
        >>> abs(y.T @ y / 4 - jnp.eye(2)).max().round(5).tolist()
        0.0

    Source: Huang et al. 2018, "Decorrelated Batch Normalization", algorithm 1.

    Differs from: the authors' code, which averages W and not the covariance. Flax and torch have none.
    """
    return _whiten(
        inverse_root, x, running, layout, over, scale, bias, momentum, epsilon, mask, weights, groups, train
    )


@named
def iterative_norm(
    x: ArrayLike,
    running: RunningCovariance,
    layout: Names = "n ... c",
    over: Names = "n ...",
    *,
    num_iterations: int = 5,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    momentum: ArrayLike | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    groups: Any = None,
    train: bool = True,
) -> tuple[jax.Array, RunningCovariance]:
    """Iterative normalization (IterNorm): whitening by Newton's iteration, of matrix products alone.

        y = P_T (x - mean) / sqrt(trace S) * scale + bias,   S = cov + epsilon I
        P_0 = I,   P_k+1 = (3 P_k - P_k^3 S / trace S) / 2

    Args:
        x, running, layout, over: as in `decorrelated_batch_norm`.
        num_iterations: T; few whiten the strong directions only, which is milder.
        scale, bias, momentum, epsilon, mask, weights, groups, train: as in `decorrelated_batch_norm`.

    Returns:
        y, of the shape and dtype of `x`, and the new RunningCovariance.

    Raises:
        LayoutError, AxisError: as `decorrelated_batch_norm`.
        ValueError: (ArgumentError) when `num_iterations` is not a positive integer.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[2.0, 1.0], [-2.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
        >>> y, _ = jn.iterative_norm(x, jn.running_covariance(2, c=2), epsilon=0.0, num_iterations=12)
        >>> abs(y.T @ y / 4 - jnp.eye(2)).max().round(5).tolist()
        0.0

    Source: Huang et al. 2019, "Iterative Normalization: Beyond Standardization towards Efficient Whitening",
        algorithm 1.

    Differs from: the authors' code, which averages the whitening matrix. Flax and torch have none.
    """
    if not isinstance(num_iterations, int) or num_iterations < 1:
        raise ArgumentError(f"num_iterations must be a positive integer, got {num_iterations!r}.")
    root = functools.partial(newton_inverse_root, num_iterations=num_iterations)
    return _whiten(root, x, running, layout, over, scale, bias, momentum, epsilon, mask, weights, groups, train)
