"""What does without statistics: functions that bend large values as layer norm was seen to do."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.elementwise import affine, elementwise
from jaxnorm.errors import named
from jaxnorm.layout import Names, last


def _tanh(x, alpha, scale, bias):
    return affine(jnp.tanh(alpha * x), scale, bias)


@jax.custom_jvp
def erf(x: jax.Array) -> jax.Array:
    """The error function. Its derivative is said here because jax 0.12's raises under shard_map (check_vma=True)."""
    return jax.lax.erf(x)


@erf.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return erf(x), dx * (2 / math.sqrt(math.pi)) * jnp.exp(-x * x)


def _erf(x, alpha, shift, scale, bias):
    return affine(erf(alpha * x + shift), scale, bias)


@named
def dynamic_tanh(
    x: ArrayLike,
    alpha: ArrayLike,
    layout: Names = "... c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    features: Names | None = None,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """Dynamic tanh (DyT): what layer norm does to large values, without statistics.

        y = tanh(alpha x) * scale + bias

    Args:
        x: array laid out as `layout`, real.
        alpha: one number; 0.5 to start with.
        layout: a name for every dimension of `x`.
        scale, bias: along `features`; none means 1 and 0.
        features: by default the last name of the layout.
        mask: True where an element counts. It changes no y but where a value that does not count is not finite.
        sizes: sizes of the axes that compose a dimension.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError: when the layout, the shapes or a dtype do not fit.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.dynamic_tanh(jnp.array([[0.0, 100.0]]), jnp.array(0.5), scale=jnp.array([2.0, 2.0])).tolist()
        [[0.0, 2.0]]

    Source: Zhu et al. 2025, "Transformers without Normalization", equation 1.

    Differs from: Flax and torch have none.
    """
    along = last(layout) if features is None else features
    arrays = ("alpha", alpha, ()), ("scale", scale, along), ("bias", bias, along)
    return elementwise(_tanh, x, layout, *arrays, mask=mask, sizes=sizes, real=True)


@named
def dynamic_erf(
    x: ArrayLike,
    alpha: ArrayLike,
    shift: ArrayLike,
    layout: Names = "... c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    features: Names | None = None,
    mask: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """Dynamic erf (Derf): dynamic tanh with the error function and a shift.

        y = erf(alpha x + shift) * scale + bias

    Args:
        x: array laid out as `layout`, real.
        alpha, shift: one number each; 0.5 and 0 to start with.
        layout, scale, bias, features, mask, sizes: as in `dynamic_tanh`.

    Returns:
        y, of the shape and dtype of `x`.

    Raises:
        LayoutError: when the layout, the shapes or a dtype do not fit.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.dynamic_erf(jnp.array([[0.0, 100.0]]), jnp.array(0.5), jnp.array(0.0)).tolist()
        [[0.0, 1.0]]

    Source: Chen et al. 2025, "Stronger Normalization-Free Transformers", equation 3.

    Differs from: Flax and torch have none.
    """
    along = last(layout) if features is None else features
    arrays = ("alpha", alpha, ()), ("shift", shift, ()), ("scale", scale, along), ("bias", bias, along)
    return elementwise(_erf, x, layout, *arrays, mask=mask, sizes=sizes, real=True)
