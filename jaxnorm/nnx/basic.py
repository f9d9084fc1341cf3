"""flax.nnx's five norms, drop-in: see jaxnorm.nnx."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jax.nn.initializers import Initializer, ones, zeros

from jaxnorm import dropin
from jaxnorm.dropin import Given
from jaxnorm.layout import Names
from jaxnorm.modules import naming, result_dtype
from jaxnorm.moments import along
from jaxnorm.nnx.host import fitted, hand_out
from jaxnorm.running import RunningStats

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]

NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class _Module(nnx.Module):
    """Parameters and settings of every norm here. Mixed with a class of `dropin`."""

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None

    def _build(
        self: Any, *, num_features, param_dtype, rngs, scale_init, scale_metadata, bias_init=None,
        bias_metadata=NO_METADATA, **settings,
    ) -> None:  # fmt: skip
        """Parameters in Flax's order, so that a seed gives the same ones; every other argument as an attribute."""
        for name, value in {"num_features": num_features, "param_dtype": param_dtype, **settings}.items():
            setattr(self, name, value)
        self._settle()

        def parameter(use: bool, init: Initializer, metadata: Mapping[str, Any]):
            return nnx.Param(init(rngs.params(), (num_features,), param_dtype), **metadata) if use else nnx.data(None)

        self.scale = parameter(self.use_scale, scale_init, scale_metadata)
        if bias_init is not None:
            self.bias = parameter(self.use_bias, bias_init, bias_metadata)

    def _arrays(self: Any, x, row: dropin.Row, given: Given, *stats) -> tuple[Any, dropin.Row, Any, Any, Any]:
        """x, the row, scale, bias and the dtype of y, after `promote_dtype`."""
        shape = row.lengths(row.features, x.shape)
        own = [None if v is None else fitted(v[...], shape) for v in (self.scale, getattr(self, "bias", None))]
        row, *parameters = self._affine(row, own, given)
        if parameters[1] is None and not hasattr(self, "bias"):
            parameters = parameters[:1]
        values = (x, *stats, *parameters)
        if self.promote_dtype is not flax_promote_dtype:
            x, *values = self.promote_dtype(values, dtype=self.dtype)
            parameters = values[len(stats) :]
            values = (x, *parameters)
        dtype = result_dtype(self.dtype, *values)
        scale, bias = (*parameters, None)[:2]
        return x, row, scale, bias, dtype


class _Stateless(_Module):
    def __call__(
        self: Any, x, *, mask=None, weights=None, scale=None, bias=None, features=None
    ) -> jax.Array:  # fmt: skip
        """Normalize x.

        Args:
            x: array, real, complex or integer.
            mask: True where an element counts; broadcasts to x as in NumPy.
            weights: how much an element counts.
            scale, bias: in the place of parameters, which the module must not have.
            features: the axes of this scale and bias, of a layout given by name; those of the module by default.

        Returns:
            y, of the shape of x.
        """
        with naming(self):
            x = jnp.asarray(x)
            row = self._row(x.shape)
            x, *arrays = self._arrays(x, row, Given(scale, bias, features))
            return self._standardize(x, *arrays, mask=mask, weights=weights)[0]


class BatchNorm(dropin.Batch, _Module):
    """Batch norm as a drop-in for flax.nnx.BatchNorm.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var over all axes but the features

    Variables: Param scale, bias; BatchStat mean, var, and num_updates only where `debias` or `momentum=None` asks for
    it.

    A statistic of one element would make y bias and pull the running variance to 0: in training that is an error. Under
    vmap an example is such a batch: name the mapped axis in `over` or `axis_name`.

    Args:
        momentum: the part of the old running value that is kept; None for the cumulative average.
        debias: warm the momentum up, so that the initial 0 and 1 carry no weight.
        unbiased: keep the running variance with Bessel's correction, as torch does.
        layout, over, features, sizes: see jaxnorm.nnx. All others are flax.nnx.BatchNorm's.

    Raises:
        LayoutError: when names and Flax's numbers are both given, or the layout and x do not fit.
        AxisError: in training, when a mapped axis is not bound.
        ValueError: (ArgumentError) in training, when every statistic is of one element, which shapes tell.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import BatchNorm
        >>> norm = BatchNorm(1, momentum=0.5, epsilon=0.0, rngs=nnx.Rngs(0))
        >>> norm(jnp.array([[1.0], [3.0]])).tolist(), norm.mean[...].tolist()
        ([[-1.0], [1.0]], [1.0])

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithms 1 and 2.

    Differs from: Flax as jaxnorm.linen.BatchNorm does, and where dtype is a half precision: there Flax rounds the
        running statistics before it uses them, and a variance of 1e5 is infinite in float16.
    """

    def __init__(
        self, num_features: int, *, use_running_average: bool | None = False, axis: Any = -1,
        momentum: float | None = 0.99, epsilon: float = 1e-5, dtype: Any = None, param_dtype: Any = jnp.float32,
        use_bias: bool = True, use_scale: bool = True, bias_init: Initializer = zeros, scale_init: Initializer = ones,
        axis_name: Any = None, axis_index_groups: Any = None, use_fast_variance: bool = True,
        promote_dtype: Any = flax_promote_dtype, rngs: nnx.Rngs, bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA, layout: Names | None = None, over: Names | None = None,
        features: Names | None = None, sizes: Mapping[str, int] | None = None, debias: bool = False,
        unbiased: bool = False,
    ):  # fmt: skip
        _Module._build(**locals())
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((num_features,), jnp.float32))
        if self._counts():
            self.num_updates = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(
        self, x, use_running_average: bool | None = None, *, mask=None, weights=None, scale=None, bias=None,
        features=None,
    ) -> jax.Array:  # fmt: skip
        """Normalize x: with its own statistics, updating the running ones, or with these.

        Args:
            x: array, real, complex or integer.
            use_running_average: normalize with the running statistics and change nothing. Here or in the constructor.
            mask: True where an element counts; broadcasts to x as in NumPy. Ignored in evaluation, as in Flax.
            weights: how much an element counts.
            scale, bias: in the place of parameters, which the module must not have.
            features: the axes of this scale and bias, of a layout given by name; those of the module by default.

        Returns:
            y, of the shape of x.
        """
        evaluate = first_from(
            use_running_average,
            self.use_running_average,
            error_msg="BatchNorm needs use_running_average: in the constructor, in the call, or through nnx.view.",
        )
        with naming(self):
            x = jnp.asarray(x)
            row = self._row(x.shape)
            shape = row.lengths(row.running, x.shape)
            mean, var = self.mean[...], self.var[...]
            num_updates = self.num_updates[...] if self._counts() else jnp.zeros((), jnp.int32)
            running = RunningStats(fitted(mean, shape), fitted(var, shape), num_updates, row.running)
            x, row, *arrays = self._arrays(x, row, Given(scale, bias, features), mean, var)
            if evaluate:
                hand_out(self, lambda: along(self._moments(x, row, mask=mask, weights=weights), running.axes))
                return self._evaluate(x, row, running, *arrays)
            y, running, stats = self._train(x, row, running, *arrays, mask=mask, weights=weights)
            hand_out(self, lambda: along(stats, running.axes))
            self._check(x, row, stats)
            # set_value and not [...]: the mean of complex x is complex, and casting it down would lose half of it
            self.mean.set_value(running.mean.reshape(mean.shape))
            self.var.set_value(running.var.reshape(var.shape))
            if self._counts():
                self.num_updates.set_value(running.num_updates)
            return y

    def set_view(self, use_running_average: bool | None = None):
        """Called by `nnx.view`.

        Args:
          use_running_average: normalize with the running statistics instead of those of x.
        """  # nnx.view_info reads this, and its arguments stand two spaces in
        if use_running_average is not None:
            self.use_running_average = use_running_average


class LayerNorm(dropin.Layer, _Stateless):
    """Layer norm as a drop-in for flax.nnx.LayerNorm.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var over the last axis

    Variables: Param scale, bias.

    Args:
        layout, over, features, sizes: see jaxnorm.nnx; over is by default the last dimension, features what is
            averaged. All others are flax.nnx.LayerNorm's.

    Raises:
        LayoutError, AxisError: as BatchNorm.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import LayerNorm
        >>> LayerNorm(2, epsilon=0.0, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0]])).tolist()
        [[-1.0, 1.0]]

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4.

    Differs from: Flax at large means: its error is 0.3 at mean 1e3 and std 1.
    """

    def __init__(
        self, num_features: int, *, epsilon: float = 1e-6, dtype: Any = None, param_dtype: Any = jnp.float32,
        use_bias: bool = True, use_scale: bool = True, bias_init: Initializer = zeros, scale_init: Initializer = ones,
        reduction_axes: Any = -1, feature_axes: Any = -1, axis_name: Any = None, axis_index_groups: Any = None,
        use_fast_variance: bool = True, promote_dtype: Any = flax_promote_dtype, rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NO_METADATA, scale_metadata: Mapping[str, Any] = NO_METADATA,
        layout: Names | None = None, over: Names | None = None, features: Names | None = None,
        sizes: Mapping[str, int] | None = None,
    ):  # fmt: skip
        _Module._build(**locals())


class RMSNorm(dropin.RMS, _Stateless):
    """RMS norm as a drop-in for flax.nnx.RMSNorm.

        y = x / sqrt(mean(|x|^2) + epsilon) * (scale_offset + scale),   mean over the last axis

    Variables: Param scale.

    Args:
        scale_offset: 1.0 for models that store scale - 1, as Gemma does; scale_init is then zeros.
        layout, over, features, sizes: see jaxnorm.nnx; over is by default the last dimension, features what is
            averaged. All others are flax.nnx.RMSNorm's.

    Raises:
        LayoutError, AxisError: as BatchNorm.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import RMSNorm
        >>> norm = RMSNorm(2, epsilon=0.0, scale_init=jax.nn.initializers.constant(5.0), rngs=nnx.Rngs(0))
        >>> norm(jnp.array([[1.0, 7.0]])).tolist()
        [[1.0, 7.0]]

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.

    Differs from: Flax under a mask with a mapped axis, where it averages the devices' means whatever their counts.
    """

    def __init__(
        self, num_features: int, *, epsilon: float = 1e-6, dtype: Any = None, param_dtype: Any = jnp.float32,
        use_scale: bool = True, scale_init: Initializer = ones, reduction_axes: Any = -1, feature_axes: Any = -1,
        axis_name: Any = None, axis_index_groups: Any = None, use_fast_variance: bool = True,
        promote_dtype: Any = flax_promote_dtype, rngs: nnx.Rngs, scale_metadata: Mapping[str, Any] = NO_METADATA,
        layout: Names | None = None, over: Names | None = None, features: Names | None = None,
        sizes: Mapping[str, int] | None = None, scale_offset: float = 0.0,
    ):  # fmt: skip
        _Module._build(**locals())

    def __call__(self, x, mask=None, *, weights=None, scale=None, bias=None, features=None) -> jax.Array:
        """As the others', but for `mask`, which Flax lets stand second here."""
        return super().__call__(x, mask=mask, weights=weights, scale=scale, bias=bias, features=features)


class GroupNorm(dropin.Group, _Stateless):
    """Group norm as a drop-in for flax.nnx.GroupNorm.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var over all axes but the first, and a group

    Averages over every dimension but the first, the frames of a video included: with names, `layout="n t h w c",
    over="h w c"` leaves them apart.

    Variables: Param scale, bias.

    Args:
        num_groups, group_size: one of them, and None for the other.
        layout, over, features, sizes: see jaxnorm.nnx; features is the one axis that is split, by default the last, and
            stands in over. `layout="n c ...", features="c"` is channels first. All others are flax.nnx.GroupNorm's.

    Raises:
        LayoutError, AxisError: as BatchNorm; LayoutError when the channels cannot be split into these groups.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import GroupNorm
        >>> GroupNorm(4, num_groups=2, epsilon=0.0, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0, 10.0, 30.0]])).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Source: Wu and He 2018, "Group Normalization", equation 7.

    Differs from: Flax, which is wrong by as much as y itself where `reduction_axes` leaves axis 1, and takes no mask of
        shape (..., 1); at large means.
    """

    def __init__(
        self, num_features: int, num_groups: int | None = 32, group_size: int | None = None, *, epsilon: float = 1e-6,
        dtype: Any = None, param_dtype: Any = jnp.float32, use_bias: bool = True, use_scale: bool = True,
        bias_init: Initializer = zeros, scale_init: Initializer = ones, reduction_axes: Any = None,
        axis_name: Any = None, axis_index_groups: Any = None, use_fast_variance: bool = True,
        promote_dtype: Any = flax_promote_dtype, rngs: nnx.Rngs, bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA, layout: Names | None = None, over: Names | None = None,
        features: Names | None = None, sizes: Mapping[str, int] | None = None,
    ):  # fmt: skip
        with naming(self):
            num_groups = dropin.groups_of(num_features, num_groups, group_size)
        group_size = num_features // num_groups  # both are attributes, as in Flax
        _Module._build(**locals())

    def _groups(self: Any, channels: int) -> int:
        return self.num_groups


class InstanceNorm(dropin.Instance, _Stateless):
    """Instance norm as a drop-in for flax.nnx.InstanceNorm.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var over all axes but the first and the features

    Variables: Param scale, bias. Without spatial axes every element is its own mean, and y is bias, as in Flax.

    Args:
        layout, over, features, sizes: see jaxnorm.nnx; over is by default all but the first dimension and the features,
            which are the last dimension. All others are flax.nnx.InstanceNorm's.

    Raises:
        LayoutError, AxisError: as BatchNorm.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import InstanceNorm
        >>> x = jnp.array([[[1.0], [3.0]], [[0.0], [8.0]]])
        >>> InstanceNorm(1, epsilon=0.0, rngs=nnx.Rngs(0))(x)[:, :, 0].tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    Source: Ulyanov, Vedaldi, Lempitsky 2016, "Instance Normalization", equation 2.

    Differs from: Flax at large means.
    """

    def __init__(
        self, num_features: int, *, epsilon: float = 1e-6, dtype: Any = None, param_dtype: Any = jnp.float32,
        use_bias: bool = True, use_scale: bool = True, bias_init: Initializer = zeros, scale_init: Initializer = ones,
        feature_axes: Any = -1, axis_name: Any = None, axis_index_groups: Any = None, use_fast_variance: bool = True,
        promote_dtype: Any = flax_promote_dtype, rngs: nnx.Rngs, bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA, layout: Names | None = None, over: Names | None = None,
        features: Names | None = None, sizes: Mapping[str, int] | None = None,
    ):  # fmt: skip
        _Module._build(**locals())
