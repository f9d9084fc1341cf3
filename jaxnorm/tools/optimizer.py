"""Around an optimizer: which parameters are norms', steps that are rejected, averages of the weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxnorm.errors import ArgumentError, named
from jaxnorm.tools.find import Where, find_norms, is_variable, paired


@named
def norm_mask(params: Any, where: Where = None) -> Any:
    """Which parameters are a norm's: a tree of bools, for weight decay and whatever else optax masks.

        True at scale, bias and what else a norm trains, False at all others and at statistics

    Args:
        params: linen, nnx, Haiku, torch-style or any tree that `find_norms` reads. With the statistics in the tree
            the bias of a batch norm without scale is found as well: `norm_mask(variables)["params"]`.
        where: which norms, as in `find_norms`.

    Returns:
        A tree of the type of `params`. In one of nnx a bool stands in the place of a Variable, so that it fits the
        State that `nnx.Optimizer` starts with and the plain one it updates with.

    Raises:
        ValueError: (ArgumentError) as `find_norms`.

    Example:
        >>> import operator
        >>> import jax, jax.numpy as jnp, jaxnorm as jn, optax
        >>> one = jnp.ones(2)
        >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": one}, "norm": {"scale": one, "bias": one}}
        >>> jn.tools.norm_mask(params)
        {'dense': {'bias': False, 'kernel': False}, 'norm': {'bias': True, 'scale': True}}

        optax decays where its mask is True:

        >>> decayed = lambda params: jax.tree.map(operator.not_, jn.tools.norm_mask(params))
        >>> tx = optax.chain(optax.add_decayed_weights(0.1, mask=decayed), optax.sgd(1.0))
        >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        >>> print(updates["norm"]["scale"], updates["dense"]["bias"])
        [-0. -0.] [-0.1 -0.1]

    Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.3, whose norms are not decayed.

    Differs from: masks by rank or by the name "bias", which take the biases of other layers and leave a torch
        LayerNorm of several dimensions. A vector `weight` or a `gamma` alone may be the slopes of torch's PReLU or a
        LayerScale, which nothing tells from RMS norm's scale: it is taken for a norm's, and `where` says otherwise.
    """
    chosen = {path for norm in find_norms(params, where) for path in norm.parameters}

    def whether(path: Any, leaf: Any) -> bool:
        return (*path, jax.tree_util.GetAttrKey("value")) in chosen if is_variable(leaf) else path in chosen

    return jax.tree_util.tree_map_with_path(whether, params, is_leaf=is_variable)


@named
def commit_if_finite(old: Any, new: Any, ok: ArrayLike | None = None) -> Any:
    """The new state of a step that is accepted, the old one of a step that is not: parameters, statistics and all.

        new if ok else old,   ok = every number of new is finite

    A step that loss scaling rejects has put infinities into the running statistics too. With `ok`, what the loss
    scaling says, none of them is kept, and no bit of the old state changes.

    Args:
        old, new: the state before and after the step, one tree with the same types: variables, optimizer state, both.
        ok: one bool, whether the step counts. On several devices it must be the same on all, or they part:
            `jax.lax.pmin(ok.astype(jnp.int32), "devices") > 0`. None asks whether all floats in `new` are finite.

    Returns:
        A tree of the types of `old`, a legal scan carry. No value of a rejected `new` is in it, and the cotangent that
        goes back to it is 0; where the step itself divides by zero, its derivative makes NaN of that 0.

    Raises:
        ValueError: (ArgumentError) when the trees, shapes or dtypes differ, or `ok` is not one bool.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> running = jn.running_stats(c=1)
        >>> x = jnp.array([[1.0], [jnp.inf]])
        >>> _, new = jn.batch_norm(x, running)
        >>> new = jn.tools.commit_if_finite(running, new)
        >>> new.mean.tolist(), new.var.tolist(), int(new.num_updates)
        ([0.0], [1.0], 0)

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2 (skipping updates).

    Differs from: `optax.apply_if_finite`, which judges the updates and knows no statistics. `nnx.state(model)` holds
        the model's own Variables, which the step changes: keep `nnx.as_pure(nnx.state(model))` before and after it.
    """
    pairs, treedef = paired({"old": old, "new": new})
    if ok is None:
        floats = [jnp.asarray(z) for _, _, z in pairs if jnp.issubdtype(jax.typeof(z).dtype, jnp.inexact)]
        ok = functools.reduce(jnp.logical_and, (jnp.isfinite(z).all() for z in floats), jnp.array(True))
    array = isinstance(ok, jax.Array | np.ndarray | np.generic | bool | int | float)
    kind = jax.typeof(ok) if array else None
    if kind is None or kind.shape or kind.dtype != bool:
        got = f"{kind.dtype}{list(kind.shape)}" if kind else type(ok).__name__
        raise ArgumentError(f"ok is one bool, whether the step counts, got {got}.")
    return jax.tree.unflatten(treedef, [jnp.where(ok, z, leaf) for _, leaf, z in pairs])


@named
def ema(averaged: Any, variables: Any, momentum: ArrayLike = 0.999, *, stats: str = "average") -> Any:
    """An exponential moving average of the weights, with or without the running statistics of their norms.

        averaged = momentum * averaged + (1 - momentum) * variables

    Statistics of the trained weights, or averaged ones, are not those of the averaged weights: `recalibrate` measures
    these. Until then "average" is what comes closest.

    Args:
        averaged: the average so far, float32 or wider whatever the variables are; start with these.
        variables: of this step, the same tree: parameters, statistics.
        momentum: the part of the old value that is kept, 0 to 1, a number or traced. t / (t + 1) after t values gives
            their plain average (SWA); min(0.999, (t + 1) / (t + 10)) warms up.
        stats: what becomes of running statistics: "average"; "newest", those of `variables`; "keep", those of
            `averaged`, to recalibrate later.

    Returns:
        A tree of the types of `averaged`. Integers and keys are the newest.

    Raises:
        ValueError: (ArgumentError) when trees or shapes differ, momentum is out of its range, or the average is
            narrower than float32.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> averaged = {"params": {"bn": {"scale": jnp.array([1.0])}}, "batch_stats": {"bn": jn.running_stats(c=1)}}
        >>> new = {"params": {"bn": {"scale": jnp.array([3.0])}}, "batch_stats": {"bn": jn.running_stats(c=1)}}
        >>> jn.tools.ema(averaged, new, momentum=0.75)["params"]["bn"]["scale"].tolist()
        [1.5]

    Source: Polyak and Juditsky 1992; Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima".

    Differs from: `optax.incremental_update`, which takes one minus momentum, computes in the dtype of the variables and
        averages integers; torch's AveragedModel, which by default keeps the buffers of its start ("keep").
    """
    if stats not in ("average", "newest", "keep"):
        raise ArgumentError(f'stats must be "average", "newest" or "keep", got {stats!r}.')
    part = None if isinstance(momentum, Tracer) else np.asarray(momentum)
    number = part is None or (part.dtype.kind in "fiu" and part.ndim == 0 and 0 <= part <= 1)
    if not number or (part is None and jax.typeof(momentum).shape):
        raise ArgumentError(f"momentum is the part of the old value that is kept, 0 to 1, got {momentum!r}.")
    pairs, treedef = paired({"averaged": averaged, "variables": variables}, dtypes=False)
    state = set() if stats == "average" else {path for norm in find_norms(averaged) for path in norm.state}

    def step(path: Any, old: Any, new: Any) -> Any:
        dtype = jax.typeof(old).dtype
        if path in state and stats == "keep":
            return old
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return new
        new = jnp.asarray(new)
        if path in state or not jnp.issubdtype(dtype, jnp.inexact):
            return new.astype(dtype)
        if jnp.finfo(dtype).bits < 32:
            raise ArgumentError(
                f"averaged{jax.tree_util.keystr(path)} is {dtype}, which loses what a step adds. Keep the average in "
                "float32, whatever the variables are."
            )
        wide = np.promote_types(dtype, np.float32)
        kept = jnp.asarray(momentum, jnp.finfo(wide).dtype).astype(wide)
        return (kept * jnp.asarray(old, wide) + (1 - kept) * new.astype(wide)).astype(dtype)

    return jax.tree.unflatten(treedef, [step(*pair) for pair in pairs])
