"""The family of layer norm as modules: see `jaxnorm.norms.layer`."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax.nn.initializers import Initializer, constant, ones

from jaxnorm.errors import LayoutError
from jaxnorm.family.base import Affine, Family
from jaxnorm.layout import Names, averaged
from jaxnorm.norms.layer import gated_rms_norm, l2_norm, partial_rms_norm, positional_norm, qk_norm, scale_norm


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class _Layer(Affine):
    """Over the features, without bias as RMS norm is."""

    over: Names = "c"
    epsilon: float = 1e-6
    use_bias: bool = False

    def _default_features(self):
        return averaged(self.layout, self.over)

    @property
    def _options(self):
        return {"layout": self.layout, "epsilon": self.epsilon, "sizes": self._sizes}


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class PartialRMS(_Layer):
    fraction: float = 0.0625
    scale_offset: float = 0.0

    def _compute(self, own, x, **call):
        return partial_rms_norm(x, self.fraction, scale_offset=self.scale_offset, **self._options, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class L2(_Layer):
    epsilon: float = 1e-12

    def _compute(self, own, x, **call):
        return l2_norm(x, **self._options, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class GatedRMS(_Layer):
    gate_first: bool = False
    scale_offset: float = 0.0

    def _compute(self, own, x, gate, **call):
        options = {"gate_first": self.gate_first, "scale_offset": self.scale_offset, **self._options}
        return gated_rms_norm(x, gate, **options, **call)

    def __call__(self, x, gate, *, mask=None, scale=None, bias=None, features=None):
        """Normalize x and multiply it with silu(gate).

        Args:
            x, gate: arrays laid out as `layout`, of one shape.
            mask: True where an element counts; broadcasts to x as in NumPy.
            scale, bias: in the place of parameters, which the module must not have.
            features: the axes of this scale and bias; those of the module by default.

        Returns:
            y, of the shape of x.
        """
        return self._run(x, gate, mask=mask, scale=scale, bias=bias, features=features)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Scale(Family):
    over: Names = "c"
    epsilon: float = 1e-5
    scale_init: Initializer | None = None

    def _parameters(self, lengths, *inputs):
        features = math.prod(lengths(averaged(self.layout, self.over)))
        return {"scale": self._parameter(self.scale_init or constant(features**0.5), ())}

    def _compute(self, own, x, **call):
        features = math.prod(self._lengths(x.shape)(averaged(self.layout, self.over)))
        built_for = getattr(self, "num_features", features)  # nnx: or scale would start as that of another length
        if built_for != features:
            raise LayoutError(f"num_features is {built_for}, and x has {features} of them.")
        return scale_norm(x, own["scale"], self.layout, epsilon=self.epsilon, sizes=self._sizes, **call)

    def __call__(self, x, *, mask=None):
        """Normalize x.

        Args:
            x: array laid out as `layout`.
            mask: True where an element counts; broadcasts to x as in NumPy.

        Returns:
            y, of the shape of x.
        """
        return self._run(x, mask=mask)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Positional(Family):
    layout: Names = "n ... c"
    over: Names = "c"
    epsilon: float = 1e-5

    def _compute(self, own, x, **call):
        return positional_norm(x, self.layout, epsilon=self.epsilon, sizes=self._sizes, **call)

    def __call__(self, x, *, mask=None):
        """Normalize x, and give away what it was normalized with.

        Args:
            x: array laid out as `layout`.
            mask: True where an element counts; broadcasts to x as in NumPy.

        Returns:
            y, of the shape of x, and the Moments: `jaxnorm.film(z, moments.std, moments.mean, features=moments.axes)`
            gives them to the z of a decoder.
        """
        return self._run(x, mask=mask)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class QK(Family):
    layout: Names = "... d"
    over: Names = "d"
    epsilon: float = 1e-6
    center: bool = False
    use_scale: bool = True
    scale_init: Initializer = ones
    attention_fn: Callable

    def _parameters(self, lengths, *inputs):
        shape = lengths(averaged(self.layout, self.over))
        return {
            name: self._parameter(self.scale_init, shape, self.use_scale) for name in ("query_scale", "key_scale")
        }

    def _compute(self, own, query, key, **call):
        options = {"epsilon": self.epsilon, "center": self.center, "sizes": self._sizes}
        return qk_norm(query, self._wide(key), self.layout, **own, **options, **call)

    def __call__(self, query, key, value=None, *args, **kwargs):
        """Normalize query and key, and attend with them.

        Args:
            query, key: arrays laid out as `layout`, the length of a head last.
            value: what `attention_fn` takes for it.
            *args, **kwargs: what else it takes: mask, dropout_rng, ...

        Returns:
            attention_fn(query, key, value, ...); without a value the query and the key.
        """
        query, key = self._run(jnp.asarray(query), jnp.asarray(key))
        if value is None:
            return query, key
        return self.attention_fn(query, key, value, *args, **kwargs)
