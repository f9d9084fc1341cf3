"""Norms of weights: a kernel in, a kernel out. In a layout the last name is the output: `"h w i o"`, `"i o"`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey
from jax.typing import ArrayLike

from jaxnorm.elementwise import affine, elementwise
from jaxnorm.errors import ArgumentError, AxisError, LayoutError, named
from jaxnorm.layout import Names, averaged, kept, meet, text_of
from jaxnorm.mapped import resolve_over
from jaxnorm.moments import moments, named_sizes
from jaxnorm.normalize import normalize, standardize
from jaxnorm.norms.layer import squares
from jaxnorm.operands import inexact
from jaxnorm.sharded import replicated
from jaxnorm.stats import real_of, wide


@named
def weight_norm(
    kernel: ArrayLike,
    layout: Names = "... o",
    over: Names = "...",
    *,
    scale: ArrayLike | None = None,
    features: Names | None = None,
    epsilon: ArrayLike = 1e-12,
) -> jax.Array:
    """Weight norm: the length of each output's weights as a parameter of its own.

        kernel / sqrt(sum(|kernel|^2) + epsilon) * scale

    With the kernel's own lengths for scale it is the identity: so a wrapped layer starts.

    Args:
        kernel: array laid out as `layout`.
        layout: a name for every dimension of the kernel.
        over: the axes summed: all but the outputs.
        scale: along `features`; none means 1.
        features: by default the axes that are not summed.
        epsilon: added to the sum of squares, in its unit.

    Returns:
        The kernel, of its shape and dtype.

    Raises:
        LayoutError: when the layout and the shapes do not fit.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.weight_norm(jnp.array([[3.0, 0.0], [4.0, 2.0]]), scale=jnp.array([10.0, 1.0])).tolist()
        [[6.0, 0.0], [8.0, 1.0]]

    Source: Salimans and Kingma 2016, "Weight Normalization", equation 2.

    Differs from: flax.nnx.WeightNorm, whose scales are not trained and which overwrites the wrapped kernel; torch's
        weight_norm has the outputs first: `layout="o ..."`.
    """
    features = kept(layout, over) if features is None else features
    return normalize(
        kernel, squares(kernel, layout, over), layout, scale=scale, features=features, epsilon=epsilon
    )


@named
def weight_standardization(
    kernel: ArrayLike,
    layout: Names = "... o",
    over: Names = "...",
    *,
    scale: ArrayLike | None = None,
    features: Names | None = None,
    epsilon: ArrayLike = 1e-5,
) -> jax.Array:
    """Weight standardization: each output's weights to mean 0 and variance 1.

        (kernel - mean) / sqrt(var + epsilon) * scale

    Args:
        kernel: array laid out as `layout`.
        layout: a name for every dimension of the kernel.
        over: the axes averaged: all but the outputs.
        scale: along `features`; none means 1.
        features: by default the axes that are not averaged.
        epsilon: added to the variance, in its unit.

    Returns:
        The kernel, of its shape and dtype.

    Raises:
        LayoutError: when the layout and the shapes do not fit.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.weight_standardization(jnp.array([[3.0, 0.0], [5.0, 8.0]]), epsilon=0.0).tolist()
        [[-1.0, -1.0], [1.0, 1.0]]

    Source: Qiao et al. 2019, "Weight Standardization", equation 7.

    Differs from: the authors' code, whose deviation is unbiased and has epsilon outside of the root.
    """
    features = kept(layout, over) if features is None else features
    return standardize(kernel, layout, over, scale=scale, features=features, epsilon=epsilon)[0]


@named
def scaled_weight_standardization(
    kernel: ArrayLike,
    layout: Names = "... o",
    over: Names = "...",
    *,
    scale: ArrayLike | None = None,
    gain: float = 1.0,
    features: Names | None = None,
    epsilon: float = 1e-4,
) -> jax.Array:
    """Scaled weight standardization: of nets without norms, so that a layer keeps the variance of its input.

        (kernel - mean) / sqrt(fan_in var + epsilon) * gain * scale,   fan_in the weights of one output

    Args:
        kernel: array laid out as `layout`.
        layout: a name for every dimension of the kernel.
        over: the axes averaged: all but the outputs.
        scale: along `features`, learned; none means 1.
        gain: of the activation before: 1.7139 for relu.
        features: by default the axes that are not averaged.
        epsilon: added to fan_in times the variance, in its unit.

    Returns:
        The kernel, of its shape and dtype.

    Raises:
        LayoutError: when the layout and the shapes do not fit.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> kernel = jn.scaled_weight_standardization(jnp.array([[3.0], [5.0], [3.0], [5.0]]), epsilon=0.0)
        >>> kernel[:, 0].tolist()
        [-0.5, 0.5, -0.5, 0.5]

    Source: Brock, De, Smith 2021, "Characterizing signal propagation to close the performance gap in unnormalized
        ResNets", equation 5; Brock et al. 2021 (NFNet), equation 1.

    Differs from: the authors' code, which takes max(fan_in var, epsilon).
    """
    kernel = inexact(kernel, "kernel")
    frame = meet(layout, kernel.shape)
    fan_in = resolve_over(over, frame)[1].size * math.prod(frame.size(n) for n in frame.expand(averaged(layout, over)))
    features = kept(layout, over) if features is None else features
    factor = jnp.asarray(gain / max(fan_in, 1) ** 0.5, real_of(wide(kernel.dtype)))
    if scale is None:
        scale, features = factor, ()
    else:
        scale = jnp.asarray(scale)
        scale = scale.astype(np.promote_types(wide(scale.dtype), factor.dtype)) * factor
    return standardize(kernel, layout, over, scale=scale, features=features, epsilon=epsilon / max(fan_in, 1))[0]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["u", "sigma"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class SpectralState:
    """State of spectral norm: the singular vector found so far, along the outputs, and the singular value.

        u = W' v / |W' v|,   sigma = v' W u

    Example:
        >>> import jax, jaxnorm as jn
        >>> state = jn.spectral_state(jax.random.key(0), o=3)
        >>> state.axes, state.u.shape, float(state.sigma)
        (('o',), (3,), 1.0)
    """

    u: jax.Array
    sigma: jax.Array
    axes: tuple[str, ...]


@named
def spectral_state(key: jax.Array, axes: Names = "o", **sizes: int) -> SpectralState:
    """State of spectral norm before any step: a random direction.

        u ~ N(0, 1), to length 1;   sigma = 1

    Args:
        key: a key of `jax.random`.
        axes: the name of the output axis.
        **sizes: its size, as o=64.

    Returns:
        SpectralState, float32.

    Raises:
        LayoutError: when the sizes are not those of the axes.

    Example:
        >>> import jax, jaxnorm as jn
        >>> state = jn.spectral_state(jax.random.key(0), o=64)
        >>> float((state.u**2).sum().round(5))
        1.0

    Source: Miyato et al. 2018, "Spectral Normalization", algorithm 1.

    Differs from: Flax's and torch's, which keep it in a module.
    """
    names, shape = named_sizes(axes, sizes)
    u = jax.random.normal(key, shape, jnp.float32)
    return SpectralState(u / jnp.linalg.norm(u), jnp.ones((), jnp.float32), names)


@named
def spectral_norm(
    kernel: ArrayLike,
    state: SpectralState,
    layout: Names = "... o",
    over: Names = "...",
    *,
    num_steps: int = 1,
    epsilon: float = 1e-12,
) -> tuple[jax.Array, SpectralState]:
    """Spectral norm: a kernel by its largest singular value, which a power iteration follows from step to step.

        v = W u / |W u|,   u = W' v / |W' v|   (num_steps times),   sigma = v' W u,   kernel / sigma

    W is the kernel as a matrix, [over, outputs]. No gradient flows through u and v. In evaluation use the state as it
    is: `num_steps=0`.

    Args:
        kernel: array laid out as `layout`.
        state: SpectralState, from `spectral_state`.
        layout: a name for every dimension of the kernel.
        over: the axes that make the rows: all but the outputs.
        num_steps: of the power iteration; 0 divides by the sigma that u gives.
        epsilon: the least length that u and v are divided by.

    Returns:
        The kernel, of its shape and dtype, and the new SpectralState.

    Raises:
        LayoutError: when the layout, the shapes and the state do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm as jn
        >>> kernel = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> kernel, state = jn.spectral_norm(kernel, jn.spectral_state(jax.random.key(0), o=2), num_steps=20)
        >>> kernel[0].tolist(), round(float(state.sigma), 5)
        ([1.0, 0.0], 3.0)

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", algorithm 1.

    Differs from: flax.nnx.SpectralNorm, which overwrites the wrapped kernel, even in evaluation; flax.linen's and
        torch's give these numbers.
    """
    if not isinstance(state, SpectralState):
        raise ArgumentError(f"state must be SpectralState, got {type(state).__name__}: see spectral_state.")
    if not isinstance(num_steps, int) or num_steps < 0:
        raise ArgumentError(f"num_steps must be an integer, 0 or more, got {num_steps!r}.")
    kernel = inexact(kernel, "kernel")
    frame = meet(layout, kernel.shape)
    if resolve_over(over, frame)[1].names:
        raise AxisError(f"a power iteration crosses no mapped axis: gather the kernel first.\n{frame.given}")
    if isinstance(epsilon, bool) or not isinstance(epsilon, Real) or not float(epsilon) > 0:
        raise ArgumentError(f"epsilon is the least length, more than 0, got {epsilon!r}.")
    rows = [frame.names.index(name) for name in frame.expand(averaged(layout, over))]
    outputs = [i for i in range(len(frame.names)) if i not in rows]
    if tuple(frame.sizes[i] for i in outputs) != state.u.shape:
        raise LayoutError(
            f"the state is of outputs {state.u.shape}, over=\"{text_of(over)}\" leaves "
            f"{tuple(frame.sizes[i] for i in outputs)}.\n{frame.given}"
        )
    whole = replicated(kernel)  # a power iteration contracts all axes of it in turn
    matrix = kernel if whole is None else jax.reshard(kernel, whole)
    matrix = jnp.transpose(matrix.astype(wide(kernel.dtype)), rows + outputs).reshape(-1, state.u.size)
    u = state.u.reshape(-1).astype(matrix.dtype)
    fixed = jax.lax.stop_gradient(matrix)

    def unit(z: jax.Array) -> jax.Array:
        return z / jnp.maximum(jnp.linalg.norm(z), epsilon).astype(z.dtype)

    v = unit(fixed @ u)
    for _ in range(num_steps):
        v = unit(fixed @ u)
        found = unit(jnp.conj(fixed.T) @ v)
        u = jnp.where(jnp.linalg.norm(found) > 0, found, u)  # a kernel of zeros has no direction: the old one stays
    sigma = jnp.real((jnp.conj(v) @ matrix) @ u)
    one_over = 1 / jnp.where(sigma == 0, 1, sigma)
    kept_u = (u if jnp.iscomplexobj(state.u) or not jnp.iscomplexobj(u) else jnp.real(u)).astype(state.u.dtype)
    new = SpectralState(
        kept_u.reshape(state.u.shape), jax.lax.stop_gradient(sigma).astype(state.sigma.dtype), state.axes
    )
    return elementwise(affine, kernel, layout, ("scale", one_over, ()), ("bias", None, ())), new


def keys(path: tuple) -> tuple[str, ...]:
    """The keys down to a leaf, without the box around it: flax.linen's Partitioned, nnx's Variable."""
    path = path[:-1] if path and isinstance(path[-1], GetAttrKey) and path[-1].name == "value" else path
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


@named
def map_kernels(function: Callable[..., Any], params: Any, *states: Any, where: str | Callable = "kernel") -> Any:
    """A norm of weights over a tree of parameters: linen's, nnx's pure dicts, or bare dicts.

        params[path] = function(params[path])   where path is that of a kernel

    Args:
        function: of one kernel, as `weight_standardization`; of a kernel and its entry of each of `states`.
        params: a tree of arrays.
        *states: trees of the same structure along the kernels: scales, or states. What `function` returns then may be
            a tuple, which gives a tuple of trees.
        where: the last key of the leaves it is for, or a function of path (a tuple of keys) and leaf.

    Returns:
        The tree with these leaves replaced, all others as they are; or a tuple of trees (the others None in all but
        the first).

    Raises:
        ValueError: (ArgumentError) when no leaf is one.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> params = {"dense": {"kernel": jnp.array([[3.0], [5.0]]), "bias": jnp.array([7.0])}}
        >>> jn.map_kernels(lambda kernel: jn.weight_standardization(kernel, epsilon=0.0), params)["dense"]["kernel"]
        Array([[-1.],
               [ 1.]], dtype=float32)

    Source: Salimans and Kingma 2016; Qiao et al. 2019; Miyato et al. 2018.

    Differs from: optax's masked transformations, which act on updates and not on parameters.
    """

    def chosen(path: tuple, leaf: Any) -> bool:
        names = keys(path)
        return where(names, leaf) if callable(where) else names[-1:] == (where,)

    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    found = [chosen(path, leaf) for path, leaf in leaves]
    if not any(found):
        names = ", ".join("/".join(keys(path)) for path, _ in leaves[:5])
        raise ArgumentError(f"no leaf of params is where={where!r} asks: they are {names}, ...")
    rest = []
    for state in states:
        entries, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda z: isinstance(z, SpectralState))
        rest.append({keys(path): leaf for path, leaf in entries})
    for path, _ in (entry for entry, use in zip(leaves, found, strict=True) if use):
        if any(keys(path) not in state for state in rest):
            raise ArgumentError(f"a tree beside params has nothing for the kernel {'/'.join(keys(path))}.")
    results = [
        function(leaf, *(state[keys(path)] for state in rest)) if use else None
        for (path, leaf), use in zip(leaves, found, strict=True)
    ]
    done = next(r for r in results if r is not None)
    if not isinstance(done, tuple):
        return tree.unflatten([z if r is None else r for (_, z), r in zip(leaves, results, strict=True)])
    columns = [[None if r is None else r[i] for r in results] for i in range(len(done))]
    columns[0] = [z if r is None else r for (_, z), r in zip(leaves, columns[0], strict=True)]
    return tuple(tree.unflatten(column) for column in columns)


def lengths(kernel: ArrayLike, layout: Names = "... o", over: Names = "...") -> jax.Array:
    """The scale with which `weight_norm` is the identity."""
    return jnp.sqrt(moments(kernel, layout, over, center=False).m2)
