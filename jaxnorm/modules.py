"""What every Flax module of jaxnorm needs, drop-in or not: checks of names, dtypes, who an error is about. No flax in
here."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm.errors import ArgumentError, AxisError, LayoutError, nearest, point
from jaxnorm.layout import ELLIPSIS, Frame, Names, averaged, flat, parse, parse_list, text_of

NOTHING = ("nothing?",)  # over no axis at all: one that may be absent, and is


def check_names(layout: Names | None, default: Names, over: Names | None, features: Names | None) -> None:
    """What can be said of the names before there is an x."""
    given, layout = layout is not None, layout or default
    names = flat(parse(layout))
    listed = () if over is None else parse_list(over, "over")
    if not given and listed and not averaged(layout, over or ()):
        raise LayoutError(
            f'over="{text_of(over or ())}" names no dimension of the layout "{text_of(layout)}". '
            "Name the dimensions with layout=, or averaged ones that it has."
        )
    for name in flat(parse(features or (), "features")):
        if name not in names:
            raise LayoutError(
                f"features names {name!r}, which the layout lacks.{nearest(name, names)}\n"
                f'{point(text_of(features or ()), name, "features")}\n  layout "{text_of(layout)}"'
            )


def lengths_of(frame: Frame, names: Names) -> tuple[int, ...]:
    """The sizes along `names`; a composed dimension counts whole."""
    dims: list[tuple[str, ...]] = []
    for dim in parse(names):
        dims.extend([(name,) for name in frame.ellipsis] if dim == (ELLIPSIS,) else [dim])
    return tuple(math.prod(frame.size(name) for name in dim) for dim in dims)


def hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(value.items())
    return tuple(hashable(v) for v in value) if isinstance(value, list | tuple) else value


def inexact(x: jax.Array) -> jax.Array:
    """Integers as float32, as Flax takes them. Nothing else is cast: what is kept for the backward pass is x."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def result_dtype(dtype: Any, *arrays: jax.Array | None) -> Any:
    """Flax's dtype of y: `dtype`, or what x and the parameters promote to, also where JAX is strict about promotion."""
    if dtype is None:
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(*(array for array in arrays if array is not None))
            if not jnp.issubdtype(dtype, jnp.inexact):
                dtype = jnp.promote_types(jnp.float32, dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ArgumentError(f"dtype must be a floating or complex one, got {jnp.dtype(dtype).name}.")
    return dtype


@contextlib.contextmanager
def naming(module: Any, path: tuple[str, ...] = ()):
    """Errors raised inside say which module it is, and where in the model: `jaxnorm.linen.LayerNorm 'mlp/norm'`."""
    try:
        yield
    except (ArgumentError, AxisError, LayoutError) as error:
        kind = type(module)
        home = kind.__module__
        if home.startswith("jaxnorm."):
            home = ".".join(home.split(".")[:2])  # from where it is imported, not the file it is written in
        error.call = f"{home}.{kind.__qualname__}" + (f" {'/'.join(path)!r}" if path else "")
        raise
