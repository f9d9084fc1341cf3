"""From what a user passes to what the rule takes: every array checked, widened and placed by name."""

import dataclasses
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxnorm.errors import ArgumentError, LayoutError
from jaxnorm.layout import Frame, Names, meet, place_features
from jaxnorm.mapped import Groups, Mapped, bound_names, resolve_over
from jaxnorm.sharded import cut_of
from jaxnorm.stats import Plan, Slots, real_of, wide


@dataclasses.dataclass(frozen=True)
class Operands:
    frame: Frame
    plan: Plan
    x: jax.Array
    slots: Slots


def operands(
    x,
    layout: Names,
    over: Names | None,
    *,
    mask=None,
    weights=None,
    center: bool = True,
    sizes: Mapping[str, int] | None = None,
    groups: Groups | None = None,
    dtype=None,
) -> Operands:
    """Read a call: names become positions here, and nothing below this line knows a name."""
    x = inexact(x, "x")
    frame = meet(layout, x.shape, sizes, over)
    dims, mapped = ((), Mapped()) if over is None else resolve_over(over, frame, groups)
    valid, weights = _slots(mask, weights, frame, dims)
    x = frame.split(x)
    plan = Plan(dims, mapped, center, jnp.dtype(x.dtype if dtype is None else dtype).name, cut_of(x, dims))
    return Operands(frame, plan, x, Slots(valid, weights, mapped.member(groups)))


def as_array(x, what: str) -> jax.Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise LayoutError(f"{what} must be an array, got {type(x).__name__}.") from error


def inexact(x, what: str) -> jax.Array:
    x = as_array(x, what)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise LayoutError(
            f"{what} has dtype {x.dtype}, and statistics of integers are no integers. Convert it first, as in "
            f"{what}.astype(jnp.float32). Its shape is {x.shape}."
        )
    return x


def _slots(mask, weights, frame: Frame, dims: tuple[int, ...]) -> tuple[jax.Array | None, jax.Array | None]:
    """Mask and weights as arrays of the rank of split x. Weight 0 masks, so that 0 * NaN never happens."""
    valid = None
    if mask is not None:
        mask = as_array(mask, "mask")
        if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
            raise LayoutError(
                f"mask has dtype {mask.dtype}: pass how much an element counts as weights=, not mask=.\n{frame.given}"
            )
        valid = _broadcastable(mask.astype(bool), "mask", frame, dims)
    if weights is None:
        return valid, None
    weights = _broadcastable(as_array(weights, "weights"), "weights", frame, dims)
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise LayoutError(f"weights have dtype {weights.dtype}: they must be real floats.\n{frame.given}")
    if not isinstance(weights, Tracer) and (np.asarray(weights) < 0).any():
        raise LayoutError(f"weights must not be negative.\n{frame.given}")
    counts = weights != 0
    return (counts if valid is None else valid & counts), weights


def check_count(x, statistics: int, layout: Names, over: Names, sizes: Any, groups: Groups | None) -> None:
    """In training a statistic of one element says nothing: y would be bias, and the running variance would go to 0.

    `statistics` is how many there are. One element in each is found from shapes; a mask that leaves one is not.
    """
    if jnp.size(x) != statistics:  # as every batch has it
        return
    frame = meet(layout, jnp.shape(x), sizes, over)
    dims, mapped = resolve_over(over, frame, groups)
    together = mapped.size
    if mapped.grouped is not None and groups is not None:
        together = together // mapped.length * min(len(group) for group in groups[mapped.grouped])
    if math.prod(frame.sizes[dim] for dim in dims) * together == 1:
        raise ArgumentError(
            f"every statistic would be of one element, y bias and the running variance 0.\n{frame.given}\n"
            f"  mapped axes bound here: {', '.join(bound_names()) or 'none'}\n"
            "  Train on more examples; or name the mapped axis along which they lie in over (Flax: axis_name); or "
            "normalize with the running statistics (use_running_average=True); or take group_norm."
        )


def _broadcastable(array: jax.Array, what: str, frame: Frame, dims: tuple[int, ...]) -> jax.Array:
    ones = (1,) * (len(frame.shape) - array.ndim)
    shape = (*ones, *array.shape)
    if len(shape) != len(frame.shape) or any(a not in (1, n) for a, n in zip(shape, frame.shape, strict=True)):
        raise LayoutError(
            f"{what} of shape {array.shape} does not broadcast to x. Give it the dimensions of x, with size 1 where it "
            f"does not vary.\n{frame.given}"
        )
    if array.ndim < len(frame.shape) and array.shape == frame.shape[: array.ndim]:
        # It fits the first dimensions of x too. Where that makes sense, one of which is averaged, who wrote it may have
        # meant that: a mask of examples, in a batch of as many examples as channels.
        first = frame.names[: sum(map(len, frame.parts[: array.ndim]))]
        if any(frame.names[dim] in first and frame.sizes[dim] > 1 for dim in dims):
            raise LayoutError(
                f"{what} of shape {array.shape} fits the first dimensions of x, and the last ones too. Give it all "
                f"dimensions of x, with size 1 where it does not vary.\n{frame.given}"
            )
    return frame.split(array.reshape(shape))


def feature_array(array, features: Names, frame: Frame, what: str, x_dtype) -> jax.Array | None:
    """scale or bias, placed by name, in the dtype of the arithmetic."""
    if array is None:
        return None
    array = jnp.asarray(array)
    if jnp.iscomplexobj(array) and not jnp.issubdtype(x_dtype, jnp.complexfloating):
        raise LayoutError(f"{what} has dtype {array.dtype}, x has {x_dtype}: make x complex.\n{frame.given}")
    return place_features(array.astype(wide(x_dtype)), features, frame, what)


def offset_scale(scale: ArrayLike | None, scale_offset: float) -> jax.Array | None:
    """scale_offset + scale, added in float32: 1 + 1e-3 has no bfloat16."""
    if scale is None:
        return None
    scale = jnp.asarray(scale)
    return scale.astype(wide(scale.dtype)) + scale_offset if scale_offset else scale


def check_epsilon(epsilon: Any, x_dtype) -> jax.Array:
    if isinstance(epsilon, Real):
        epsilon = float(epsilon)
        if not epsilon >= 0:
            raise ArgumentError(f"epsilon must not be negative, got {epsilon!r}.")
    elif not isinstance(epsilon, jax.Array | np.ndarray) or epsilon.shape:
        raise ArgumentError(f"epsilon must be a number, got {epsilon!r}.")
    return jnp.asarray(epsilon, real_of(wide(x_dtype)))
