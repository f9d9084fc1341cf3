"""The family of layer norm: lengths in place of deviations, parts, gates, residuals, places."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.elementwise import elementwise, remembering
from jaxnorm.errors import ArgumentError, LayoutError, named
from jaxnorm.layout import ELLIPSIS, Names, averaged, parse, parse_list, text_of
from jaxnorm.moments import Moments, known, moments
from jaxnorm.normalize import normalize, standardize
from jaxnorm.norms.basic import layer_norm, rms_norm
from jaxnorm.operands import as_array, operands


def squares(x: ArrayLike, layout: Names, over: Names, **options: Any) -> Moments:
    """Moments whose variance is the sum of the squares, not their mean."""
    m = moments(x, layout, over, center=False, **options)
    return known(m.mean, m.m2, m)


@named
def l2_norm(
    x: ArrayLike,
    layout: Names = "... c",
    over: Names = "c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    features: Names | None = None,
    epsilon: ArrayLike = 1e-12,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """Unit (L2) norm: every vector to length 1.

        y = x / sqrt(sum(|x|^2) + epsilon) * scale + bias

    Args:
        x: array laid out as `layout`.
        layout: a name for every dimension of `x`.
        over: the axes summed; with a mapped axis in the list the vectors may be sharded over devices.
        scale, bias: along `features`; none means 1 and 0.
        features: by default the dimensions summed over.
        epsilon: added to the sum of squares, in its unit.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.l2_norm(jnp.array([[3.0, 4.0]])).round(6).tolist()
        [[0.6000000238418579, 0.800000011920929]]

    Source: Ranjan, Castillo, Chellappa 2017, "L2-constrained Softmax Loss", equation 3.

    Differs from: torch's F.normalize and Keras' UnitNormalization, which divide by max(length, epsilon).
    """
    return normalize(
        x, squares(x, layout, over, mask=mask, sizes=sizes), layout, scale=scale, bias=bias, epsilon=epsilon, mask=mask,
        features=averaged(layout, over) if features is None else features, sizes=sizes,
    )  # fmt: skip


@named
def scale_norm(
    x: ArrayLike,
    scale: ArrayLike,
    layout: Names = "... c",
    over: Names = "c",
    *,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """ScaleNorm: every vector to one length, which is learned.

        y = scale * x / sqrt(sum(|x|^2) + epsilon)

    Args:
        x: array laid out as `layout`.
        scale: one number; sqrt(c) to start with.
        layout, over, mask, sizes: as in `l2_norm`.
        epsilon: added to the sum of squares, in its unit.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.scale_norm(jnp.array([[3.0, 4.0]]), jnp.array(10.0), epsilon=0.0).tolist()
        [[6.0, 8.0]]

    Source: Nguyen and Salazar 2019, "Transformers without Tears", equation 4.

    Differs from: the authors' code, which divides by max(length, epsilon). Flax and torch have none.
    """
    return l2_norm(x, layout, over, scale=scale, features=(), epsilon=epsilon, mask=mask, sizes=sizes)


@named
def partial_rms_norm(
    x: ArrayLike,
    fraction: float = 0.0625,
    layout: Names = "... c",
    over: Names = "c",
    *,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> jax.Array:
    """Partial RMS norm (pRMSNorm): the root mean square of the first few features for all of them.

        y = x / sqrt(mean(|x_i|^2, i < ceil(fraction c)) + epsilon) * scale + bias

    Args:
        x: array laid out as `layout`.
        fraction: of the features, more than 0 and up to 1, which is RMS norm.
        layout: a name for every dimension of `x`.
        over: the one dimension averaged.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.
        **options: scale, bias, features, epsilon, scale_offset: as in `rms_norm`.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError: as `rms_norm`, and when `over` is not one dimension.
        ValueError: (ArgumentError) when `fraction` is not in (0, 1].

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.partial_rms_norm(jnp.array([[2.0, 4.0, 6.0, 8.0]]), 0.25, epsilon=0.0).tolist()
        [[1.0, 2.0, 3.0, 4.0]]

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 4.1 (6.25 % by default).

    Differs from: Flax and torch have none.
    """
    if not isinstance(fraction, Real) or not 0 < float(fraction) <= 1:
        raise ArgumentError(f"fraction is the part of the features, more than 0 and up to 1, got {fraction!r}.")
    names = parse_list(over, "over")
    if len(names) != 1 or (names[0],) not in parse(layout):
        raise LayoutError(f'over="{text_of(over)}" must be one dimension of the layout "{text_of(layout)}".')
    frame = operands(x, layout, over, mask=mask, sizes=sizes).frame  # says what is wrong with them
    size, behind = frame.size(names[0]), parse(layout)[parse(layout).index((names[0],)) + 1 :]
    after = sum(len(frame.ellipsis) if dim == (ELLIPSIS,) else 1 for dim in behind)
    counts = (jnp.arange(size) < math.ceil(fraction * size - 1e-9)).reshape(-1, *(1,) * after)
    if mask is not None:
        rank = max(counts.ndim, jnp.ndim(mask))
        counts, mask = (z.reshape((1,) * (rank - z.ndim) + z.shape) for z in (counts, jnp.asarray(mask)))
        counts = counts & mask.astype(bool)
    return rms_norm(x, layout, over, mask=counts, sizes=sizes, **options)


@named
def qk_norm(
    query: ArrayLike,
    key: ArrayLike,
    layout: Names = "... d",
    over: Names = "d",
    *,
    query_scale: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-6,
    center: bool = False,
    sizes: dict[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """QK norm: queries and keys normalized before their product, so that attention's logits stay in bounds.

        query / sqrt(mean(|query|^2) + epsilon) * query_scale,   key likewise, for every head

    Args:
        query, key: arrays laid out as `layout`, the length of a head last.
        layout: a name for every dimension of both.
        over: the axes averaged.
        query_scale, key_scale: along `over`; none means 1.
        epsilon: added to the mean square, in its unit.
        center: subtract the mean first: layer norm, as in ViT-22B.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        The query and the key, of their shapes and dtypes.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> query, key = jn.qk_norm(jnp.array([[1.0, 7.0]]), jnp.array([[3.0, 3.0]]), epsilon=0.0)
        >>> (query * 5).tolist(), key.tolist()
        ([[1.0, 7.0]], [[1.0, 1.0]])

    Source: Henry et al. 2020, "Query-Key Normalization for Transformers" (which takes `l2_norm`); Dehghani et al. 2023,
        "Scaling Vision Transformers to 22 Billion Parameters", section 2.

    Differs from: Flax's MultiHeadDotProductAttention(normalize_qk=True), which is layer norm without bias.
    """

    def one(x: ArrayLike, scale: ArrayLike | None) -> jax.Array:
        features = averaged(layout, over)
        return standardize(
            x, layout, over, scale=scale, features=features, epsilon=epsilon, center=center, sizes=sizes
        )[0]

    return one(query, query_scale), one(key, key_scale)


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


def _gated(x: jax.Array, gate: jax.Array) -> jax.Array:
    return x * jax.nn.silu(gate)


@named
def gated_rms_norm(
    x: ArrayLike,
    gate: ArrayLike,
    layout: Names = "... c",
    over: Names = "c",
    *,
    gate_first: bool = False,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> jax.Array:
    """Gated RMS norm: RMS norm times the silu of a gate.

        y = rms_norm(x) * silu(gate),   or with gate_first rms_norm(x * silu(gate))

    Args:
        x, gate: arrays laid out as `layout`, of one shape.
        layout, over: as in `rms_norm`.
        gate_first: gate, then normalize, as Mamba2 does.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.
        **options: scale, bias, features, epsilon, scale_offset: as in `rms_norm`.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.gated_rms_norm(jnp.array([[3.0, 3.0]]), jnp.array([[0.0, 50.0]]), epsilon=0.0).tolist()
        [[0.0, 50.0]]

    Source: Dao and Gu 2024, "Transformers are SSMs" (Mamba-2), section 7.

    Differs from: mamba_ssm's RMSNormGated, which multiplies before it rounds to the dtype of x, and has groups: here
        `group_norm`'s way, a layout.
    """
    x, gate = as_array(x, "x"), as_array(gate, "gate")
    if x.shape != gate.shape:
        raise LayoutError(f"x has shape {x.shape}, the gate {gate.shape}: they are multiplied, entry by entry.")

    @remembering
    def step(x, gate, given):
        if mask is not None:  # what stands in a masked slot of the gate counts as 0, if it is not finite
            gate = elementwise(_as_it_is, gate, layout, mask=mask, sizes=sizes)
        placed = "gate", gate, layout
        if gate_first:
            x = elementwise(_gated, x, layout, placed, mask=mask, sizes=sizes)
        y = rms_norm(x, layout, over, mask=mask, sizes=sizes, **options, **given)
        return y if gate_first else elementwise(_gated, y, layout, placed, mask=mask, sizes=sizes)

    given = {name: jnp.asarray(options.pop(name)) for name in ("scale", "bias") if options.get(name) is not None}
    return step(x, gate, given)


@named
def add_norm(x: ArrayLike, residual: ArrayLike, norm: Callable = layer_norm, **options: Any) -> tuple[Any, jax.Array]:
    """Residual add and norm in one call.

        total = x + residual,   y = norm(total)

    Args:
        x, residual: arrays of one shape.
        norm: any norm of one array: `layer_norm`, `rms_norm`, ...
        **options: what else `norm` takes.

    Returns:
        y, and the total that the next residual adds to, in the wider of the dtypes of `x` and `residual`.

    Raises:
        LayoutError: when the shapes differ; and what `norm` raises.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> y, total = jn.add_norm(jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 2.0]]), epsilon=0.0)
        >>> y.tolist(), total.tolist()
        ([[-1.0, 1.0]], [[1.0, 3.0]])

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 5.4.

    Differs from: the fused kernels of that name, which are one kernel: here XLA fuses the sum into the norm's loops.
    """
    x, residual = as_array(x, "x"), as_array(residual, "residual")
    if x.shape != residual.shape:
        raise LayoutError(f"x has shape {x.shape}, the residual {residual.shape}: they are added, entry by entry.")
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(x.dtype, residual.dtype)
    total = x.astype(dtype) + residual.astype(dtype)
    return norm(total, **options), total


@named
def positional_norm(
    x: ArrayLike,
    layout: Names = "n ... c",
    over: Names = "c",
    *,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> tuple[jax.Array, Moments]:
    """Positional norm (PONO): every place over its channels, with the statistics as an output.

        y = (x - mean) / sqrt(var + epsilon),   mean and var over c

    A decoder takes them for its bias and scale (moment shortcut): `film(z, m.std, m.mean, features=m.axes)`.

    Args:
        x: array laid out as `layout`.
        layout: a name for every dimension of `x`.
        over: the axes averaged.
        epsilon: added to the variance, in its unit.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`, and the Moments.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> y, stats = jn.positional_norm(jnp.array([[[1.0, 3.0]]]), epsilon=0.0)
        >>> y.tolist(), stats.mean.tolist(), stats.std.tolist()
        ([[[-1.0, 1.0]]], [[2.0]], [[1.0]])

    Source: Li et al. 2019, "Positional Normalization", equations 1 and 2.

    Differs from: the authors' code, whose variance is unbiased. Flax and torch have none.
    """
    return standardize(x, layout, over, epsilon=epsilon, mask=mask, sizes=sizes)
