"""The verb for what is not affine in x: a function of every element and of arrays placed by name.

    y = function(x, *arrays)

As in `rule.py` nothing the size of x is kept for the backward pass but x: the function is computed again there.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm import rule
from jaxnorm.errors import LayoutError
from jaxnorm.layout import Names
from jaxnorm.operands import check_epsilon, feature_array, operands
from jaxnorm.stats import Slots, clean

Placed = tuple[str, ArrayLike | None, Names]  # what it is called, and the axes it lies along


def elementwise(
    function: Callable[..., jax.Array],
    x: ArrayLike,
    layout: Names,
    *arrays: Placed,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
    real: bool = False,
) -> jax.Array:
    """`function` of x and of the arrays, each with its axes, in float32 or wider; y has the dtype of x.

    An array that is None stays None. `function` must be one that stays (of a module, not a lambda in a call): JAX
    compiles it once.
    """
    op = operands(x, layout, None, mask=mask, weights=weights, sizes=sizes)
    if real and jnp.iscomplexobj(op.x):
        raise LayoutError(f"x has dtype {op.x.dtype}, and this norm is of real numbers.\n{op.frame.given}")
    placed = tuple(feature_array(z, axes, op.frame, name, op.x.dtype) for name, z, axes in arrays)
    return op.frame.join(_run(function, op.plan.dtype, op.x, op.slots, placed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(function: Callable, dtype: str, x: jax.Array, slots: Slots, placed: tuple) -> jax.Array:
    def step(x, slots, placed):
        return in_range(function(clean(x, x, slots), *placed), slots, dtype).astype(dtype)

    return jax.checkpoint(step, policy=jax.checkpoint_policies.nothing_saveable)(x, slots, placed)


def in_range(y: jax.Array, slots: Slots, dtype: str) -> jax.Array:
    """y, but for masked slots that pass 65504 where it becomes a float16: no statistic holds them."""
    if slots.valid is None or dtype != "float16":
        return y
    largest = float(jnp.finfo(jnp.float16).max)
    return jnp.where(slots.valid, y, jnp.clip(y, -largest, largest))


def remembering(function: Callable) -> Callable:
    """Keep the arguments and the statistics of a norm made of several verbs, and nothing between them."""
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(rule.STATS_NAME))


def deviation(var: jax.Array, epsilon: ArrayLike) -> jax.Array:
    """sqrt(var + epsilon); 1 where both are 0, so that what is divided by it is finite."""
    square = var + check_epsilon(epsilon, var.dtype)
    return jnp.sqrt(jnp.where(square <= 0, 1, square))


def affine(z: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    z = z if scale is None else z * scale
    return z if bias is None else z + bias
