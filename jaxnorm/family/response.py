"""Response norms, EvoNorms and norms without statistics as modules: see `jaxnorm.norms.response`, `evo`, `dynamic`."""

import dataclasses

import jax.numpy as jnp
from jax.nn.initializers import Initializer, ones, zeros

from jaxnorm.family.base import Affine, Family, Featured, RunningGain, RunningMoments
from jaxnorm.layout import Names
from jaxnorm.norms.dynamic import dynamic_erf, dynamic_tanh
from jaxnorm.norms.evo import evo_norm_b0, evo_norm_s0
from jaxnorm.norms.response import filter_response_norm, global_response_norm, local_response_norm


def half(key, shape, dtype=jnp.float32, out_sharding=None):
    return jnp.full(shape, 0.5, dtype)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Tanh(Affine):
    alpha_init: Initializer = half

    def _parameters(self, lengths, *inputs):
        return {"alpha": self._parameter(self.alpha_init, ()), **super()._parameters(lengths)}

    def _compute(self, own, x, *, over, **call):
        return dynamic_tanh(x, own["alpha"], self.layout, sizes=self._sizes, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Erf(Tanh):
    shift_init: Initializer = zeros

    def _parameters(self, lengths, *inputs):
        return {"shift": self._parameter(self.shift_init, ()), **super()._parameters(lengths)}

    def _compute(self, own, x, *, over, **call):
        return dynamic_erf(x, own["alpha"], own["shift"], self.layout, sizes=self._sizes, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class GlobalResponse(Featured):
    layout: Names = "n ... c"
    over: Names = "..."
    epsilon: float = 1e-6
    scale_init: Initializer = zeros

    def _compute(self, own, x, **call):
        return global_response_norm(x, self.layout, epsilon=self.epsilon, sizes=self._sizes, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FilterResponse(Featured):
    layout: Names = "n ... c"
    over: Names = "..."
    epsilon: float = 1e-6
    use_threshold: bool = True
    threshold_init: Initializer = zeros

    def _parameters(self, lengths, *inputs):
        threshold = self._parameter(self.threshold_init, lengths(self._along()), self.use_threshold)
        return {**super()._parameters(lengths), "threshold": threshold}

    def _compute(self, own, x, **call):
        options = {"layout": self.layout, "epsilon": self.epsilon, "sizes": self._sizes}
        return filter_response_norm(x, own["threshold"], **options, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class LocalResponse(Family):
    over: Names = "c"
    size: int = 5
    alpha: float = 1e-4
    power: float = 0.75
    offset: float = 1.0

    def _compute(self, own, x, **call):
        options = {name: getattr(self, name) for name in ("size", "layout", "alpha", "power", "offset")}
        return local_response_norm(x, sizes=self._sizes, **options, **call)

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
class EvoB0(RunningMoments, RunningGain, Featured):
    layout: Names = "n ... c"
    over: Names = "n ..."
    v_init: Initializer = ones

    def _default_features(self):
        return self._axes()

    def _parameters(self, lengths, *inputs):
        return {**super()._parameters(lengths), "v": self._parameter(self.v_init, lengths(self._along()))}

    def _compute(self, own, running, x, **call):
        return evo_norm_b0(x, running, v=own["v"], **self._options, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class EvoS0(Featured):
    layout: Names = "n ... c"
    num_groups: int
    epsilon: float = 1e-5
    v_init: Initializer = ones

    def _parameters(self, lengths, *inputs):
        return {**super()._parameters(lengths), "v": self._parameter(self.v_init, lengths(self._along()))}

    def _compute(self, own, x, *, over, **call):
        options = {"epsilon": self.epsilon, "sizes": self._sizes}
        return evo_norm_s0(x, self.num_groups, self.layout, v=own["v"], **options, **call)
