"""Layers that normalize with their stored statistics while the rest of the model trains: see `use_stored_stats`."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util

from jaxnorm.errors import ArgumentError
from jaxnorm.tools.find import Where
from jaxnorm.tools.freeze import running_norms

MARK = "stored_stats"


def use_stored_stats(apply: Callable, where: Where = None) -> Callable:
    """`apply`, in which chosen norms normalize with their stored statistics and leave them alone, in training too.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var of batch_stats: an affine map of x

    For the norms of jaxnorm and of Flax, whatever their constructor or the call says of `use_running_average`. To let
    them use the batch again, use the `apply` that was given: nothing is changed.

    Args:
        apply: `module.apply`, or another function whose first argument is the variables.
        where: which norms, as in `jaxnorm.tools.find_norms`, among those with running statistics.

    Returns:
        A function with the arguments of `apply`.

    Raises:
        ValueError: (ArgumentError) when called, as `find_norms`; when the variables have no running statistics; when a
            chosen layer has no `use_running_average` to set.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import BatchNorm, use_stored_stats
        >>> norm, x = BatchNorm(use_running_average=False, epsilon=0.0), jnp.array([[1.0], [3.0]])
        >>> variables = norm.init(jax.random.key(0), x)
        >>> y, state = use_stored_stats(norm.apply)(variables, x, mutable=["batch_stats"])
        >>> y.tolist(), state["batch_stats"]["mean"].tolist()
        ([[1.0], [3.0]], [0.0])

    Source: Ioffe and Szegedy 2015, section 3.1, equation of the inference network.

    Differs from: `jaxnorm.tools.freeze_stats`, whose layers use the batch and keep their statistics.
    """

    if isinstance(apply, nn.Module):
        raise ArgumentError("apply must be a function: give module.apply, not the module.")

    @functools.wraps(apply)
    def stored(variables: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            chosen = running_norms(variables, where).paths
            with nn.intercept_methods(_intercept(frozenset(chosen))):
                out = apply({**variables, MARK: _nested(chosen)}, *args, **kwargs)
        except ArgumentError as error:
            error.call = error.call or "jaxnorm.linen.use_stored_stats"
            raise
        if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping) and MARK in out[1]:  # mutable=True
            kept: Any = type(out[1])  # dict or FrozenDict
            return out[0], kept({name: value for name, value in out[1].items() if name != MARK})
        return out

    return stored


def _nested(paths: tuple[str, ...]) -> Any:
    """A collection that says which norms. Nobody reads it: by it `nn.jit`, which traces a module once for variables of
    one structure and knows nothing of interceptors, traces anew."""
    return traverse_util.unflatten_dict({(*path.split("/"), "chosen"): jnp.zeros(()) for path in paths})


def _intercept(chosen: frozenset[str]) -> Callable:
    def intercept(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or "/".join(module.path) not in chosen:
            return call(*args, **kwargs)
        if not hasattr(module, "use_running_average"):
            raise ArgumentError(
                f"{type(module).__name__} {'/'.join(module.path)!r} has no use_running_average to set. "
                "Leave it out with where, or give it one."
            )
        bound = inspect.signature(context.orig_method).bind(*args, **kwargs)
        bound.arguments.pop("use_running_average", None)
        said = module.use_running_average  # the module is that of this call alone, and frozen to all others
        object.__setattr__(module, "use_running_average", True)
        try:
            return call(*bound.args, **bound.kwargs)
        finally:
            object.__setattr__(module, "use_running_average", said)

    return intercept
