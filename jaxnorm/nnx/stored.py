"""Layers that normalize with their stored statistics while the rest of the model trains: see `use_stored_stats`."""

import functools
import inspect
from typing import Any, TypeVar

from flax import nnx

from jaxnorm.errors import ArgumentError, named
from jaxnorm.tools.find import Where
from jaxnorm.tools.freeze import running_norms

M = TypeVar("M", bound=nnx.Module)


@named
def use_stored_stats(model: M, where: Where = None) -> M:
    """The model, in which chosen norms normalize with their stored statistics and leave them alone, in training too.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var as they are stored: an affine map of x

    A view, as `nnx.view` gives: it holds the Variables of the model, so that training one trains the other. For the
    norms of jaxnorm and of Flax, whatever they or a call say of `use_running_average`. To let them use the batch again,
    go on with the model that was given: nothing in it is changed.

    Args:
        model: an nnx.Module.
        where: which norms, as in `jaxnorm.tools.find_norms`, among those with running statistics.

    Returns:
        A model of the same class, with the same Variables.

    Raises:
        ValueError: (ArgumentError) as `find_norms`; when the model has no running statistics; when a chosen layer has
            no `use_running_average` to set.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import BatchNorm, use_stored_stats
        >>> model = nnx.Sequential(BatchNorm(1, epsilon=0.0, rngs=nnx.Rngs(0)))
        >>> use_stored_stats(model)(jnp.array([[1.0], [3.0]])).tolist(), model.layers[0].mean[...].tolist()
        ([[1.0], [3.0]], [0.0])

    Source: Ioffe and Szegedy 2015, section 3.1, equation of the inference network.

    Differs from: `nnx.view(model, use_running_average=True)`, which a call that says `use_running_average=False`
        overrules; `jaxnorm.tools.freeze_stats`, whose layers use the batch and keep their statistics.
    """
    if not isinstance(model, nnx.Module):
        raise ArgumentError(f"model must be an nnx.Module, got {type(model).__name__}.")
    chosen = {tuple(norm.path.split("/")) if norm.path else () for norm in running_norms(nnx.state(model), where)}
    view = nnx.clone(model, variables=False)
    for path, module in list(nnx.iter_modules(view)):
        names = tuple(map(str, path))
        if names in chosen:
            chosen.remove(names)
            module.__class__ = _stored(type(module))  # in the view alone. Of nnx's own, for jit to tell them apart
    if chosen:
        raise ArgumentError(f"{'/'.join(min(chosen))!r} is no module whose statistics could be used.")
    return view


@functools.cache
def _stored(kind: Any) -> Any:
    """The class of a norm, one for each, in which calls use stored statistics."""
    signature = inspect.signature(kind.__call__)
    if "use_running_average" not in signature.parameters:
        raise ArgumentError(f"a call of {kind.__name__} has no use_running_average to set. Leave it out with where.")

    class Stored(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(self, *args, **kwargs)
            bound.arguments["use_running_average"] = True
            return kind.__call__(*bound.args, **bound.kwargs)

    Stored.__name__, Stored.__qualname__, Stored.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Stored
