"""Response norms: an entry divided by, or multiplied with, how strongly its neighbours respond."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.elementwise import affine, elementwise, remembering
from jaxnorm.errors import ArgumentError, LayoutError, named
from jaxnorm.layout import Names, flat, last, meet, parse, parse_list, text_of
from jaxnorm.normalize import standardize
from jaxnorm.norms.layer import squares
from jaxnorm.operands import check_epsilon, inexact, operands
from jaxnorm.stats import abs_sq, clean, like


def _responded(x: jax.Array, response: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    return x + affine(x * response, scale, bias)


@named
def global_response_norm(
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
    """Global response norm (GRN): channels compete by their length over space.

        y = x + x * N * scale + bias,   N = G / (mean(G over c) + epsilon),   G = sqrt(sum(|x|^2 over space))

    Args:
        x: array laid out as `layout`.
        layout: a name for every dimension of `x`.
        over: the axes of space.
        scale, bias: along `features`; none means 1 and 0. ConvNeXt-V2 starts with 0 and 0, where y is x.
        features: by default the last name of the layout. The mean is over all that `over` leaves but the examples,
            the first name.
        epsilon: added to the mean length, in its unit.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.global_response_norm(jnp.array([[[3.0, 1.0]]]), epsilon=0.0).tolist()
        [[[7.5, 1.5]]]

    Source: Woo et al. 2023, "ConvNeXt V2", equations 1 to 3.

    Differs from: Flax and torch have none; timm's module has the channels last or first, this any layout.
    """
    features = last(layout) if features is None else features

    @remembering
    def step(x, scale, bias):
        length = squares(x, layout, over, mask=mask, sizes=sizes)
        g = length.std  # the gradient of a channel of zeros is 0
        examples = flat(parse(layout))[0]
        names = meet(length.axes, length.mean.shape, what="moments").names
        dims = tuple(i for i, name in enumerate(names) if name != examples)
        average = g.mean(dims, keepdims=True) + check_epsilon(epsilon, g.dtype)
        response = g / jnp.where(average <= 0, 1, average)
        arrays = ("response", response, length.axes), ("scale", scale, features), ("bias", bias, features)
        return elementwise(_responded, x, layout, *arrays, mask=mask, sizes=sizes)

    return step(inexact(x, "x"), *(None if z is None else jnp.asarray(z) for z in (scale, bias)))


def _above(x: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.maximum(x, threshold)


@named
def filter_response_norm(
    x: ArrayLike,
    threshold: ArrayLike | None = None,
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
    """Filter response norm (FRN), with its activation, the thresholded linear unit (TLU).

        y = max(x / sqrt(mean(|x|^2 over space) + epsilon) * scale + bias, threshold)

    Args:
        x: array laid out as `layout`, real.
        threshold: along `features`; 0 to start with. None for no activation.
        layout: a name for every dimension of `x`.
        over: the axes averaged, within an example and a channel.
        scale, bias: along `features`; none means 1 and 0.
        features: by default the last name of the layout.
        epsilon: added to the mean square, in its unit; an array where it is learned, as for maps of one place.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError, AxisError: as `standardize`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[[1.0], [-7.0]]])
        >>> (jn.filter_response_norm(x, jnp.array([0.0]), epsilon=0.0) * 5)[0, :, 0].tolist()
        [1.0, 0.0]

    Source: Singh and Krishnan 2020, "Filter Response Normalization Layer", equations 1 to 3.

    Differs from: Flax and torch have none; timm's FilterResponseNormTlu is the same.
    """
    features = last(layout) if features is None else features

    @remembering
    def step(x, threshold, scale, bias, epsilon):
        y, _ = standardize(
            x, layout, over, scale=scale, bias=bias, features=features, epsilon=epsilon, mask=mask, center=False,
            sizes=sizes,
        )  # fmt: skip
        if threshold is None:
            return y
        return elementwise(_above, y, layout, ("threshold", threshold, features), mask=mask, sizes=sizes, real=True)

    x = inexact(x, "x")
    arrays = (None if z is None else jnp.asarray(z) for z in (threshold, scale, bias))
    return step(x, *arrays, check_epsilon(epsilon, x.dtype))


@named
def local_response_norm(
    x: ArrayLike,
    size: int = 5,
    layout: Names = "... c",
    over: Names = "c",
    *,
    alpha: float = 1e-4,
    power: float = 0.75,
    offset: float = 1.0,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """Local response norm (AlexNet): a channel by the strength of its neighbours.

        y = x / (offset + alpha / size * sum(|x|^2 over the window))^power

    Args:
        x: array laid out as `layout`.
        size: of the window along `over`: size // 2 channels before, (size - 1) // 2 behind.
        layout: a name for every dimension of `x`.
        over: the one dimension along which the window lies.
        alpha, power, offset: as in the formula.
        mask: True where an element counts; broadcasts as in NumPy.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError: when the layout and the shapes do not fit, or `over` is not one dimension.
        ValueError: (ArgumentError) when `size` is not a positive integer.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[1.0, 2.0, 3.0]])
        >>> (x / jn.local_response_norm(x, 3, alpha=3.0, power=1.0, offset=0.0)).round(4).tolist()
        [[5.0, 14.0, 13.0]]

    Source: Krizhevsky, Sutskever, Hinton 2012, "ImageNet Classification with Deep CNNs", section 3.3.

    Differs from: the paper and TensorFlow, whose alpha is not divided by size: torch's and this is. Flax has none.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ArgumentError(f"size is the length of the window, a positive integer, got {size!r}.")
    op = operands(x, layout, None, mask=mask, sizes=sizes)
    names = parse_list(over, "over")
    if len(names) != 1 or names[0] not in op.frame.names:
        raise LayoutError(f'over="{text_of(over)}" must be one dimension.\n{op.frame.given}')
    dim = op.frame.names.index(names[0])
    window = [1] * op.x.ndim
    pad = [(0, 0)] * op.x.ndim
    window[dim], pad[dim] = size, (size // 2, (size - 1) // 2)

    @jax.checkpoint
    def step(x, slots):
        z = clean(x, x, slots)
        square = abs_sq(z if slots.valid is None else jnp.where(slots.valid, z, 0))
        zero = np.zeros((), square.dtype)  # a number that JAX can see: only so it knows the window for a sum
        total = lax.reduce_window(square, zero, lax.add, window, [1] * x.ndim, pad)
        return (z * like((offset + alpha / size * total) ** -power, z)).astype(op.plan.dtype)

    return op.frame.join(step(op.x, op.slots))
