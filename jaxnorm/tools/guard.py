"""What only values tell: statistics that were never updated or are none, counts of one; and incomplete checkpoints.

The checks of values raise at once outside of jit. Inside they are `checkify.check`s, which `checkify.checkify` makes an
error to throw: `error, out = jax.jit(checkify.checkify(step))(...)`, `error.throw()`. A program without them is as it
was.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from jaxnorm.errors import ArgumentError, named
from jaxnorm.moments import Moments
from jaxnorm.tools.find import KeyPath, NormLayer, Where, get, is_variable, place, word
from jaxnorm.tools.freeze import running_norms


@named
def check_stats(variables: Any, where: Where = None) -> None:
    """Running statistics can be evaluated with: they were updated, are finite, and no variance is negative.

        not (mean = 0 and var = 1 and num_updates = 0),   mean and var finite,   var >= 0

    Without `num_updates` a mean of exactly 0 and a variance of exactly 1, all of them, is taken for the start.

    Args:
        variables: any tree that `find_norms` reads, with statistics in it: linen variables, nnx.State, RunningStats.
        where: which norms, as in `find_norms`.

    Returns:
        None. Inside of jit the checks are for `checkify`.

    Raises:
        ValueError: (ArgumentError) naming the layers, outside of jit; as `find_norms`; when there are no statistics.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> running = jn.running_stats(c=1)
        >>> try:
        ...     jn.tools.check_stats({"block": {"bn": running}})
        ... except ValueError as error:
        ...     print(error)
        jaxnorm.tools.check_stats: the running statistics of 'block/bn' were never updated: train, load or measure them
        (recalibrate).
        >>> _, running = jn.batch_norm(jnp.array([[1.0], [3.0]]), running, momentum=0.5)
        >>> jn.tools.check_stats(running)
        >>> running.mean.tolist()
        [1.0]

        In a program:

        >>> import jax
        >>> from jax.experimental import checkify
        >>> def evaluate(running, x):
        ...     jn.tools.check_stats(running)
        ...     return jn.normalize(x, running)
        >>> error, y = jax.jit(checkify.checkify(evaluate))(jn.running_stats(c=1), jnp.ones((2, 1)))
        >>> error.get()
        "the running statistics of '' were never updated: train, load or measure them (recalibrate). (`check` failed)"

    Source: JAX's documentation of checkify.

    Differs from: Flax and torch, which evaluate with mean 0 and var 1 and say nothing.
    """
    _check([fault for norm in running_norms(variables, where) for fault in _faults_of_stats(variables, norm)])


@named
def check_moments(tree: Any) -> None:
    """Statistics are of more than one element: what a mask leaves, which shapes do not tell.

        count > 1

    A batch norm of one element gives bias and pulls its running variance to 0; one of no element keeps its statistics
    and normalizes with mean 0 and var 0.

    Args:
        tree: Moments, or any tree of them, as the collection "moments" of `apply(..., mutable=["moments"])`.

    Returns:
        None. Inside of jit the checks are for `checkify`.

    Raises:
        ValueError: (ArgumentError) naming the layers, outside of jit; when there are no Moments in the tree.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> x = jnp.array([[1.0], [3.0]])
        >>> jn.tools.check_moments(jn.moments(x))
        >>> try:
        ...     jn.tools.check_moments({"bn": jn.moments(x, mask=jnp.array([[True], [False]]))})
        ... except ValueError as error:
        ...     print(error)
        jaxnorm.tools.check_moments: the least count of 'bn' is 1: statistics need more elements.

    Source: JAX's documentation of checkify.

    Differs from: torch, which raises where the shape tells, as our norms do, and has no masks.
    """
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Moments))[0]
    stats = [(path, m) for path, m in found if isinstance(m, Moments)]
    if not stats:
        raise ArgumentError("there are no Moments in the tree.")
    faults = []
    for path, m in stats:
        least = jnp.min(jnp.asarray(m.count), initial=jnp.inf)
        text = f"the least count of {_layer(path)!r} is {{}}: statistics need more elements."
        faults.append((least <= 1, text, least))
    _check(faults)


@named
def check_complete(checkpoint: Any, like: Any) -> None:
    """A checkpoint holds what a model needs, and nothing else: every missing, unknown and misshapen variable by name.

        names and shapes of checkpoint = names and shapes of like

    Args:
        checkpoint: what was restored: nested dicts, linen variables, nnx.State.
        like: the variables of the model, or their shapes, as `jax.eval_shape(model.init, key, x)` gives. Of another
            container type if need be: variables are matched by name.

    Returns:
        None.

    Raises:
        ValueError: (ArgumentError) with the names.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> variables = {"params": {"bn": {"scale": jnp.ones(4)}}, "batch_stats": {"bn": jn.running_stats(c=4)}}
        >>> jn.tools.check_complete(variables, variables)
        >>> try:
        ...     jn.tools.check_complete({"params": {"bn": {"scale": jnp.ones(3)}}}, variables)
        ... except ValueError as error:
        ...     print(error)
        jaxnorm.tools.check_complete: the checkpoint does not fit the model.
          missing: batch_stats/bn/mean (4,), batch_stats/bn/var (4,), batch_stats/bn/num_updates ()
          of another shape: params/bn/scale (3,), the model's is (4,)
          Statistics alone can be measured anew: jaxnorm.tools.recalibrate.

    Source: what torch's `load_state_dict(strict=True)` says.

    Differs from: `nnx.update` and linen's `apply(..., mutable=["batch_stats"])`, which go on with mean 0 and var 1
        where statistics are missing.
    """
    have, need = _by_name(checkpoint), _by_name(like)
    missing = [name for name in need if name not in have]
    lines = {
        "missing": [f"{name} {need[name]}" for name in missing],
        "not the model's": [f"{name} {have[name]}" for name in have if name not in need],
        "of another shape": [
            f"{name} {have[name]}, the model's is {need[name]}"
            for name in need if name in have and have[name] != need[name]
        ],
    }  # fmt: skip
    if not any(lines.values()):
        return
    text = [f"  {what}: {', '.join(names)}" for what, names in lines.items() if names]
    if any(name.endswith(("/mean", "/var")) for name in missing):
        text.append("  Statistics alone can be measured anew: jaxnorm.tools.recalibrate.")
    raise ArgumentError("\n".join(["the checkpoint does not fit the model.", *text]))


def _by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)[0]
    return {"/".join(map(word, path)): tuple(np.shape(leaf)) for path, leaf in leaves}


def _layer(path: KeyPath) -> str:
    """Where Moments lie; a collection of them names every one "moments"."""
    layer, name = place(path) if path else ((), "moments")
    return "/".join(layer if name == "moments" else (*layer, name))


Fault = tuple[jax.Array, str, jax.Array | None]  # whether it is there, what it is, and the number in the braces


def _check(faults: list[Fault]) -> None:
    """Raise what is wrong, all in one message, or leave it to checkify where nothing is known yet."""
    wrong = []
    for there, text, number in faults:
        if isinstance(there, Tracer):  # outside of checkify JAX says, when it lowers this, that it must be inside
            checkify.check(~there, text, *(() if number is None else (number,)))
        elif there:
            wrong.append(text if number is None else text.format(f"{float(number):g}"))
    if wrong:
        raise ArgumentError("\n  ".join(wrong))


def _faults_of_stats(variables: Any, norm: NormLayer) -> list[Fault]:
    found = dict(zip(norm.leaves, get(variables, *norm.leaves.values()), strict=True))
    stats = {name: jnp.asarray(found[name]) for name in ("mean", "var", "cov") if name in found}
    start = jnp.all(stats["mean"] == 0)
    if "num_updates" in found:
        start &= jnp.all(jnp.asarray(found["num_updates"]) == 0)
    elif "var" in stats:
        start &= jnp.all(stats["var"] == 1)
    never = f"the running statistics of {norm.path!r} were never updated: train, load or measure them (recalibrate)."
    faults: list[Fault] = [(start, never, None)]
    for name, z in stats.items():
        faults.append((~jnp.isfinite(z).all(), f"{name} of {norm.path!r} is not finite.", None))
    if "var" in stats:
        least = jnp.min(stats["var"], initial=jnp.inf)
        faults.append((least < 0, f"a var of {norm.path!r} is {{}}, and no variance is negative.", least))
    return faults
