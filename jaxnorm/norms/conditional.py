"""Norms whose scale and bias come from a condition: a style, a class, a map. Any norm takes them so, by `features`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxnorm.elementwise import affine, deviation, elementwise
from jaxnorm.errors import LayoutError, named
from jaxnorm.layout import Names, channels, first, meet
from jaxnorm.moments import moments
from jaxnorm.normalize import standardize
from jaxnorm.norms.basic import batch_norm, layer_norm
from jaxnorm.operands import offset_scale
from jaxnorm.running import RunningStats


@named
def adaptive_instance_norm(
    x: ArrayLike,
    style: ArrayLike,
    layout: Names = "n ... c",
    over: Names = "...",
    *,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    style_mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """Adaptive instance norm (AdaIN): the statistics of one picture for those of another.

        y = (x - mean(x)) / sqrt(var(x) + epsilon) * sqrt(var(style) + epsilon) + mean(style),   for each n and c

    Args:
        x: the content, laid out as `layout`.
        style: laid out likewise; it may have other sizes along `over`.
        layout: a name for every dimension of both.
        over: the axes averaged.
        epsilon: added to both variances, in their unit.
        mask, style_mask: True where an element of `x`, of `style` counts.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x, style = jnp.array([[[1.0], [3.0]]]), jnp.array([[[10.0], [30.0], [10.0], [30.0]]])
        >>> jn.adaptive_instance_norm(x, style, epsilon=0.0)[0, :, 0].tolist()
        [10.0, 30.0]

    Source: Huang and Belongie 2017, "Arbitrary Style Transfer in Real-time", equation 8.

    Differs from: the authors' code, whose variances are unbiased. Flax and torch have none.
    """
    target = moments(style, layout, over, mask=style_mask, sizes=sizes)
    scale = deviation(target.var, epsilon)
    return standardize(
        x, layout, over, scale=scale, bias=target.mean, features=target.axes, epsilon=epsilon, mask=mask, sizes=sizes
    )[0]


@named
def adaptive_layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    layout: Names = "n ... c",
    over: Names = "c",
    *,
    features: Names = "n c",
    scale_offset: float = 1.0,
    **options: Any,
) -> jax.Array:
    """Adaptive layer norm (adaLN): scale and bias for every example, from a condition.

        y = (x - mean) / sqrt(var + epsilon) * (scale_offset + scale) + bias

    A condition that gives 0 leaves layer norm: adaLN-Zero starts there, with a gate of 0 on the block behind it, which
    is `x + film(block(y), gate)`. The modules make all three.

    Args:
        x: array laid out as `layout`.
        scale, bias: along `features`.
        layout: a name for every dimension of `x`.
        over: the axes averaged.
        features: the axes of scale and bias.
        scale_offset: 1 where a scale of 0 shall leave x as normalized.
        **options: epsilon, mask, sizes: as in `layer_norm`.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x, scale, bias = jnp.array([[[1.0, 3.0]]]), jnp.array([[0.0, 1.0]]), jnp.array([[5.0, 0.0]])
        >>> jn.adaptive_layer_norm(x, scale, bias, epsilon=0.0)[0, 0].tolist()
        [4.0, 2.0]

    Source: Perez et al. 2018; Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", section 3.2.

    Differs from: diffusers' AdaLayerNorm modules, where the layer that reads the condition is part of it.
    """
    return layer_norm(
        x, layout, over, scale=offset_scale(scale, scale_offset), bias=bias, features=features, **options
    )


@named
def film(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None = None,
    layout: Names = "n ... c",
    *,
    features: Names = "n c",
    scale_offset: float = 0.0,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """Feature-wise linear modulation (FiLM): the affine step alone.

        y = x * (scale_offset + scale) + bias

    Args:
        x: array laid out as `layout`.
        scale, bias: along `features`; none means no factor and no summand.
        layout: a name for every dimension of `x`.
        features: the axes of scale and bias.
        scale_offset: 1 where a scale of 0 shall leave x as it is.
        mask: True where an element counts. It changes no y but where a value that does not count is not finite.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError: when the layout, the shapes or a dtype do not fit.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.film(jnp.ones((2, 1)), jnp.array([[2.0], [3.0]]), jnp.array([[0.0], [1.0]]))[:, 0].tolist()
        [2.0, 4.0]

    Source: Perez et al. 2018, "FiLM: Visual Reasoning with a General Conditioning Layer", equation 2.

    Differs from: Flax and torch have none.
    """
    scale = offset_scale(scale, scale_offset)
    arrays = ("scale", scale, features), ("bias", bias, features)
    return elementwise(affine, x, layout, *arrays, mask=mask, sizes=sizes)


@named
def conditional_batch_norm(
    x: ArrayLike,
    running: RunningStats,
    labels: ArrayLike,
    layout: Names = "n ... c",
    over: Names = "n ...",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    **options: Any,
) -> tuple[jax.Array, RunningStats]:
    """Class-conditional batch norm: shared statistics, scale and bias of each example's class.

        y = (x - mean) / sqrt(var + epsilon) * scale[labels] + bias[labels]

    Evaluation is `normalize(x, running, layout, scale=scale[labels], bias=bias[labels], features="n c")`.

    Args:
        x: array laid out as `layout`, the examples first.
        running: RunningStats along the axes that are not averaged.
        labels: integers along the first name of the layout, 0 to classes - 1.
        layout, over: as in `batch_norm`.
        scale, bias: along "classes c", c the axis that is not averaged; none means 1 and 0.
        **options: momentum, epsilon, mask, weights, debias, unbiased, sizes, groups: as in `batch_norm`.

    Returns:
        y, of the shape and dtype of `x`, and the new RunningStats.

    Raises:
        LayoutError, AxisError: as `batch_norm`, and when the labels are not integers along the examples, or lie outside
            of the classes where their values are known.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x, bias = jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [10.0]])
        >>> jn.conditional_batch_norm(x, jn.running_stats(c=1), jnp.array([0, 1]), epsilon=0.0, bias=bias)[0].tolist()
        [[-1.0], [11.0]]

    Source: Dumoulin, Shlens, Kudlur 2017, "A Learned Representation for Artistic Style", equation 5; de Vries et al.
        2017.

    Differs from: Flax and torch have none.
    """
    sizes = options.get("sizes")
    features, tables = by_label(x, labels, {"scale": scale, "bias": bias}, layout, over, sizes)
    return batch_norm(x, running, layout, over, **tables, features=features, **options)


def by_label(
    x: ArrayLike, labels: ArrayLike, tables: dict[str, Any], layout: Names, over: Names, sizes: dict[str, int] | None
) -> tuple[Names, dict[str, jax.Array]]:
    """Rows of the tables for each example, and the axes they lie along."""
    labels = jnp.asarray(labels)
    n, c = first(layout), channels(layout, over)
    size = meet(layout, jnp.shape(x), sizes).size(n)
    if labels.shape != (size,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise LayoutError(
            f"labels are integers, one for each of the {size} entries along {n!r}, got {labels.dtype}{labels.shape}."
        )
    given = {name: jnp.asarray(z) for name, z in tables.items() if z is not None}
    shapes = {z.shape for z in given.values()}
    if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
        raise LayoutError(f'scale and bias lie along "classes {c}", one and the same: got shapes {sorted(shapes)}.')
    if given:
        count = next(iter(shapes))[0]
        values = None if isinstance(labels, Tracer) or not size else np.asarray(labels)
        if values is not None and not 0 <= values.min() <= values.max() < count:
            raise LayoutError(f"labels lie in {values.min()} to {values.max()}, and there are {count} classes.")
        # A traced label that is out of range gives NaN: not the scale of another class.
        labels = labels.astype(jnp.int32)
        at = jnp.where(labels < 0, count, labels)
        given = {name: rows_of(z, at) for name, z in given.items()}
    return (n, c), given


def rows_of(table: jax.Array, at: jax.Array) -> jax.Array:
    """table[at], NaN out of range, lying as `at` lies."""
    sharding = jax.typeof(at).sharding
    out = NamedSharding(sharding.mesh, P(*sharding.spec, None)) if any(sharding.spec) else None
    return table.at[at].get(mode="fill", fill_value=jnp.nan, out_sharding=out)


@named
def spade(
    x: ArrayLike,
    running: RunningStats,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    layout: Names = "n ... c",
    over: Names = "n ...",
    *,
    features: Names | None = None,
    scale_offset: float = 1.0,
    **options: Any,
) -> tuple[jax.Array, RunningStats]:
    """Spatially adaptive batch norm (SPADE): scale and bias for every place, from a map of labels, say.

        y = (x - mean) / sqrt(var + epsilon) * (scale_offset + scale) + bias

    Evaluation is `normalize(x, running, layout, scale=scale_offset + scale, bias=bias, features=layout)`.

    Args:
        x: array laid out as `layout`.
        running: RunningStats along the axes that are not averaged.
        scale, bias: along `features`.
        layout, over: as in `batch_norm`.
        features: the axes of scale and bias; by default all of the layout.
        scale_offset: 1 where a scale of 0 shall leave x as normalized.
        **options: momentum, epsilon, mask, weights, debias, unbiased, sizes, groups: as in `batch_norm`.

    Returns:
        y, of the shape and dtype of `x`, and the new RunningStats.

    Raises:
        LayoutError, AxisError: as `batch_norm`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x, scale = jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [4.0]])
        >>> jn.spade(x, jn.running_stats(c=1), scale, None, epsilon=0.0)[0].tolist()
        [[-1.0], [5.0]]

    Source: Park et al. 2019, "Semantic Image Synthesis with Spatially-Adaptive Normalization", equation 1.

    Differs from: the authors' code, in which two convolutions that make scale and bias are part of it.
    """
    scale = offset_scale(scale, scale_offset)
    features = layout if features is None else features
    return batch_norm(x, running, layout, over, scale=scale, bias=bias, features=features, **options)
