"""Freezing norms: their scale and bias, or their statistics. The third way, to normalize with stored statistics while
the rest trains, is `use_stored_stats` of jaxnorm.linen and jaxnorm.nnx."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnorm.errors import ArgumentError, named
from jaxnorm.tools.find import STATE, NormTable, Where, apart, choose, find_norms, fit, get, put
from jaxnorm.tools.optimizer import norm_mask


def frozen() -> optax.GradientTransformation:
    """Updates that move nothing, not even a sign: an optimizer for what is frozen.

        update = -0.0,   p + -0.0 = p for every p, -0.0 among them

    Args:
        None.

    Returns:
        optax.GradientTransformation, without state.

    Raises:
        Nothing.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn, optax
        >>> tx, params = jn.tools.frozen(), jnp.array([-0.0, 2.0])
        >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
        >>> print(optax.apply_updates(params, updates))
        [-0.  2.]

    Source: IEEE 754, section 6.3: of two zeros the sum is -0.0 only if both are.

    Differs from: `optax.set_to_zero`, which turns -0.0 into 0.0. Subnormal numbers become 0 with both where XLA's
        addition itself takes them for 0, as on a CPU.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u: -jnp.zeros_like(u), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@named
def freeze_affine(params: Any, where: Where = None) -> Any:
    """Labels by which optax leaves the scale and bias of norms as they are, and trains the rest.

        "frozen" at what a chosen norm trains, "trained" elsewhere

    To go on training them, train with other labels: parameters are as they were, to the bit. Whatever writes updates,
    weight decay above all, belongs inside "trained": what is chained after it reaches frozen layers. A norm of all
    gradients that clips from outside counts theirs too.

    Args:
        params: any tree that `find_norms` reads; with the statistics in it see `norm_mask`.
        where: which norms, as in `find_norms`.

    Returns:
        A tree of strings, as `norm_mask`'s of bools.

    Raises:
        ValueError: (ArgumentError) as `find_norms`, and when there is no norm.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn, optax
        >>> params = {"dense": {"kernel": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}}
        >>> labels = jn.tools.freeze_affine(params)
        >>> labels
        {'dense': {'kernel': 'trained'}, 'norm': {'scale': 'frozen'}}
        >>> tx = optax.multi_transform({"trained": optax.lion(0.1), "frozen": jn.tools.frozen()}, labels)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["norm"]["scale"].tolist()
        [1.0, 1.0]

    Source: He et al. 2017, "Mask R-CNN", whose detectors freeze the backbone's.

    Differs from: a stopped gradient, which weight decay and momentum do not feel.
    """
    mask = norm_mask(params, where)
    if not any(jax.tree.leaves(mask)):
        raise ArgumentError("there is no norm to freeze: see find_norms.")
    return jax.tree.map(lambda norm: "frozen" if norm else "trained", mask)


@named
def freeze_stats(old: Any, new: Any, where: Where = None) -> Any:
    """The new variables, with the running statistics that chosen norms had before: they stay while others move.

        statistics of chosen norms from old, all else from new

    Their layers still normalize with the batch. That they do not is `use_stored_stats`, of jaxnorm.linen and
    jaxnorm.nnx.

    Args:
        old: variables before the step, or their statistics.
        new: variables after it, or their statistics, as linen's `mutable=["batch_stats"]` gives.
        where: which norms, as in `find_norms`.

    Returns:
        A tree of the type of `new`. To go on with the statistics, leave out the call.

    Raises:
        ValueError: (ArgumentError) as `find_norms`; when there are no statistics; when `old` has not the same ones.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> old = {"a": {"bn": jn.running_stats(c=1)}, "b": {"bn": jn.running_stats(c=1)}}
        >>> step = lambda r: jn.batch_norm(jnp.array([[1.0], [3.0]]), r, momentum=0.5)[1]
        >>> new = {name: {"bn": step(layer["bn"])} for name, layer in old.items()}
        >>> new = jn.tools.freeze_stats(old, new, "a/*")
        >>> new["a"]["bn"].mean.tolist(), new["b"]["bn"].mean.tolist()
        ([0.0], [1.0])

    Source: Ioffe and Szegedy 2015, section 3.1, whose fixed statistics these are.

    Differs from: torch's `eval()` of a layer, which also normalizes with them.
    """
    apart({"old": old, "new": new})
    chosen = running_norms(new, where)
    had = {norm.path: norm for norm in find_norms(old)}
    values = {}
    for norm in chosen:
        names = [name for name in norm.leaves if name in STATE]
        before = had[norm.path].leaves if norm.path in had else {}
        missing = [name for name in names if name not in before]
        if missing:
            raise ArgumentError(f"old has no {missing[0]} of {norm.path!r}.")
        pairs = zip(get(old, *(before[name] for name in names)), get(new, *norm.state), strict=True)
        for name, (was, now) in zip(names, pairs, strict=True):
            fit(f"{name} of {norm.path!r}", {"old": was, "new": now})
            values[norm.leaves[name]] = was
    return put(new, values)


def running_norms(tree: Any, where: Where) -> NormTable:
    """Those that have running statistics."""
    norms = NormTable(norm for norm in find_norms(tree) if norm.state)
    if not norms:
        raise ArgumentError("there are no running statistics: see find_norms.")
    return choose(norms, where)
