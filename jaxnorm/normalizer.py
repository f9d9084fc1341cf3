"""A running normalizer of observations, rewards or targets: what code for reinforcement learning writes by hand."""

import dataclasses
import functools
from numbers import Real

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.elementwise import deviation
from jaxnorm.errors import ArgumentError, named
from jaxnorm.layout import Names
from jaxnorm.moments import Moments, empty_moments, merge, moments
from jaxnorm.normalize import normalize
from jaxnorm.norms.conditional import film


@functools.partial(jax.tree_util.register_dataclass, data_fields=["moments"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Normalizer:
    """The Moments of all that was observed, to normalize with and to go back.

        y = clip((x - mean) / sqrt(var + epsilon)),   x = y * sqrt(var + epsilon) + mean

    A frozen pytree. Observations merge over steps, environments (`over="n"`), devices (`over="n devices"`) and hosts;
    two normalizers merge with `jn.merge(a.moments, b.moments)`. Before the first observation x stays as it is. The
    statistics are constants to the gradient. The count is a float32: exact to 2^24 observations, after which one more
    weighs a rounding less than it should.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> observed = jn.normalizer(c=1).observe(jnp.array([[1.0], [3.0]])).observe(jnp.array([[5.0]]))
        >>> observed.moments.mean.tolist(), observed.normalize(jnp.array([[3.0], [9.0]]), clip=2.0).tolist()
        ([3.0], [[0.0], [2.0]])
        >>> observed.denormalize(jnp.array([[0.0]])).tolist()
        [[3.0]]
    """

    moments: Moments

    def observe(
        self, x: ArrayLike, layout: Names = "... c", over: Names = "...", *, mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> "Normalizer":  # fmt: skip
        """The normalizer after `x` too. Arguments as in `moments`; what is left must be its axes."""
        new = jax.tree.map(jax.lax.stop_gradient, moments(x, layout, over, mask=mask, weights=weights))
        merged = merge(self.moments, new)
        return Normalizer(jax.tree.map(lambda z, old: z.astype(old.dtype), merged, self.moments))

    def normalize(
        self, x: ArrayLike, layout: Names = "... c", *, clip: float | None = None, epsilon: ArrayLike = 1e-8
    ) -> jax.Array:
        """(x - mean) / sqrt(var + epsilon), clipped to [-clip, clip]."""
        if isinstance(clip, Real) and not float(clip) > 0:
            raise ArgumentError(f"clip must be positive, got {clip!r}.")
        y = normalize(x, self._known(epsilon), layout, epsilon=epsilon)
        return y if clip is None else jnp.clip(y, -clip, clip)

    def denormalize(self, y: ArrayLike, layout: Names = "... c", *, epsilon: ArrayLike = 1e-8) -> jax.Array:
        """y * sqrt(var + epsilon) + mean."""
        known = self._known(epsilon)
        return film(y, deviation(known.var, epsilon), known.mean, layout, features=known.axes)

    def _known(self, epsilon: ArrayLike) -> Moments:
        """The moments; those of N(0, 1) where nothing was observed."""
        m = jax.tree.map(jax.lax.stop_gradient, self.moments)
        none = m.count <= 0
        count = jnp.where(none, 1, m.count)
        return Moments(count, m.mean, jnp.where(none, 1 - jnp.asarray(epsilon, m.m2.dtype), m.m2), m.axes)


@named
def normalizer(axes: Names = "c", **sizes: int) -> Normalizer:
    """A running normalizer that has observed nothing.

        moments = empty_moments(axes, **sizes)

    Args:
        axes: names of the axes that have statistics of their own.
        **sizes: the size of each of them, as c=17.

    Returns:
        Normalizer.

    Raises:
        LayoutError: when the sizes are not those of the axes.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.normalizer(c=2).normalize(jnp.array([[1.0, 2.0]])).tolist()
        [[1.0, 2.0]]

    Source: Chan, Golub, LeVeque 1983 (merging); Henderson et al. 2018, "Deep Reinforcement Learning that Matters"
        (normalized observations).

    Differs from: gymnasium's NormalizeObservation and brax' running_statistics, which start from a made-up first count
        or clip the deviation. Flax and torch have none.
    """
    return Normalizer(empty_moments(axes, **sizes))
