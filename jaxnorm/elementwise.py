"""The verb for what is not affine in x: a function of every element and of arrays placed by name.

    y = function(x, *arrays)

As in `rule.py` nothing the size of x is kept for the backward pass but x: the function is computed again there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike

from jaxnorm import rule
from jaxnorm.layout import Names
from jaxnorm.operands import feature_array, operands
from jaxnorm.stats import clean

Placed = tuple[ArrayLike | None, Names]


def elementwise(
    function: Callable[..., jax.Array],
    x: ArrayLike,
    layout: Names,
    *arrays: Placed,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    sizes: dict[str, int] | None = None,
) -> jax.Array:
    """`function` of x and of the arrays, each with its axes, in float32 or wider; y has the dtype of x.

    An array that is None stays None. `function` must be one that stays (of a module, not a lambda in a call): JAX
    compiles it once.
    """
    op = operands(x, layout, None, mask=mask, weights=weights, sizes=sizes)
    placed = tuple(feature_array(z, axes, op.frame, "an argument", op.x.dtype) for z, axes in arrays)
    return op.frame.join(_run(function, op.plan.dtype, op.x, op.slots, placed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(function: Callable, dtype: str, x: jax.Array, slots: Any, placed: tuple) -> jax.Array:
    def step(x, slots, placed):
        return function(clean(x, x, slots), *placed).astype(dtype)

    return jax.checkpoint(step, policy=jax.checkpoint_policies.nothing_saveable)(x, slots, placed)


def remembering(function: Callable) -> Callable:
    """Keep the arguments and the statistics of a norm made of several verbs, and nothing between them."""
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(rule.STATS_NAME))


def affine(z: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    z = z if scale is None else z * scale
    return z if bias is None else z + bias
