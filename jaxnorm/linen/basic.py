"""flax.linen's five norms, drop-in: see jaxnorm.linen."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxnorm import dropin
from jaxnorm.dropin import Given
from jaxnorm.layout import Names
from jaxnorm.linen.host import hand_out, need_stats
from jaxnorm.modules import naming, result_dtype
from jaxnorm.moments import along
from jaxnorm.running import RunningStats

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]


class _Module(nn.Module, kw_only=True):
    """What jaxnorm adds, keyword-only so that Flax's arguments keep their places. Mixed with a class of `dropin`."""

    layout: Names | None = None
    over: Names | None = None
    features: Names | None = None
    sizes: Mapping[str, int] | None = None

    def __post_init__(self):
        self._settle()  # type: ignore[attr-defined]
        super().__post_init__()


def _parameters(module: Any, row: dropin.Row, x: jax.Array, given: Given) -> tuple[dropin.Row, Any, Any, Any]:
    """The row, scale, bias and the dtype of y. Made in Flax's order, so that a seed gives the same ones."""
    shape = row.lengths(row.features, x.shape)
    scale = module.param("scale", module.scale_init, shape, module.param_dtype) if module.use_scale else None
    bias = module.param("bias", module.bias_init, shape, module.param_dtype) if module.use_bias else None
    row, scale, bias = module._affine(row, (scale, bias), given)
    return row, scale, bias, result_dtype(module.dtype, x, scale, bias)


class _Stateless(_Module):
    @nn.compact
    def __call__(self: Any, x, *, mask=None, weights=None, scale=None, bias=None, features=None):
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
        with naming(self, self.path):
            x = jnp.asarray(x)
            row = self._row(x.shape, sync=not self.is_initializing())
            arrays = _parameters(self, row, x, Given(scale, bias, features))
            return self._standardize(x, *arrays, mask=mask, weights=weights)[0]


class BatchNorm(dropin.Batch, _Module):
    """Batch norm as a drop-in for flax.linen.BatchNorm.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var over all axes but the features

    Variables: params/{scale, bias}, batch_stats/{mean, var}, and batch_stats/num_updates only where `debias` or
    `momentum=None` asks for it.

    A statistic of one element would make y bias and pull the running variance to 0: in training that is an error. Under
    vmap an example is such a batch: name the mapped axis in `over` or `axis_name`.

    Args:
        momentum: the part of the old running value that is kept; None for the cumulative average.
        debias: warm the momentum up, so that the initial 0 and 1 carry no weight.
        unbiased: keep the running variance with Bessel's correction, as torch does.
        layout, over, features, sizes: see jaxnorm.linen. All others are flax.linen.BatchNorm's.

    Raises:
        LayoutError: when names and Flax's numbers are both given, or the layout and x do not fit.
        AxisError: in training, when a mapped axis is not bound. The message names the layer.
        ValueError: (ArgumentError) in training, when every statistic is of one element, which shapes tell; in
            evaluation, when there are no batch_stats.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import BatchNorm
        >>> norm = BatchNorm(momentum=0.5, use_running_average=False, epsilon=0.0)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, state = norm.apply(norm.init(jax.random.key(0), x), x, mutable="batch_stats")
        >>> y.tolist(), state["batch_stats"]["mean"].tolist()
        ([[-1.0], [1.0]], [1.0])

        Synchronized over the devices of a mapped axis, by name:

        >>> norm = norm.clone(layout="n c", over="n devices")
        >>> train = lambda x: norm.apply(norm.init(jax.random.key(0), x), x, mutable="batch_stats")[0]
        >>> jax.vmap(train, axis_name="devices")(x.reshape(2, 1, 1)).ravel().tolist()
        [-1.0, 1.0]

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithms 1 and 2.

    Differs from: Flax under a mask and `axis_name`, where it averages the devices' means whatever their counts; under
        NaN in masked slots (its gradients) and where all is masked (its state), NaN; at large means.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: initializers.Initializer = initializers.zeros
    scale_init: initializers.Initializer = initializers.ones
    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    debias: bool = dataclasses.field(default=False, kw_only=True)
    unbiased: bool = dataclasses.field(default=False, kw_only=True)

    @nn.compact
    def __call__(
        self, x, use_running_average: bool | None = None, *, mask=None, weights=None, scale=None, bias=None,
        features=None,
    ):  # fmt: skip
        """Normalize x: with its own statistics, updating batch_stats, or with batch_stats.

        Args:
            x: array, real, complex or integer.
            use_running_average: normalize with batch_stats and change nothing. Here or in the constructor.
            mask: True where an element counts; broadcasts to x as in NumPy. Ignored in evaluation, as in Flax.
            weights: how much an element counts.
            scale, bias: in the place of parameters, which the module must not have.
            features: the axes of this scale and bias, of a layout given by name; those of the module by default.

        Returns:
            y, of the shape of x.
        """
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        with naming(self, self.path):
            x = jnp.asarray(x)
            row = self._row(x.shape, sync=not self.is_initializing())
            need_stats(self, evaluate)
            shape = row.lengths(row.running, x.shape)
            dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
            mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
            var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)
            counter = self.variable("batch_stats", "num_updates", jnp.zeros, (), jnp.int32) if self._counts() else None
            num_updates = jnp.zeros((), jnp.int32) if counter is None else counter.value
            running = RunningStats(mean.value, var.value, num_updates, row.running)
            row, *arrays = _parameters(self, row, x, Given(scale, bias, features))
            if evaluate:
                hand_out(self, lambda: along(self._moments(x, row, mask=mask, weights=weights), running.axes))
                return self._evaluate(x, row, running, *arrays)
            y, running, stats = self._train(x, row, running, *arrays, mask=mask, weights=weights)
            hand_out(self, lambda: along(stats, running.axes))
            if not self.is_initializing():
                self._check(x, row, stats)
                mean.value, var.value = running.mean, running.var
                if counter is not None:
                    counter.value = running.num_updates
            return y


class LayerNorm(dropin.Layer, _Stateless):
    """Layer norm as a drop-in for flax.linen.LayerNorm.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var over the last axis

    Variables: params/{scale, bias}.

    Args:
        layout, over, features, sizes: see jaxnorm.linen; over is by default the last dimension, features what is
            averaged. All others are flax.linen.LayerNorm's.

    Raises:
        LayoutError, AxisError: as BatchNorm.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import LayerNorm
        >>> LayerNorm(epsilon=0.0).init_with_output(jax.random.key(0), jnp.array([[1.0, 3.0]]))[0].tolist()
        [[-1.0, 1.0]]

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4.

    Differs from: Flax at large means: its error is 0.3 at mean 1e3 and std 1.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: initializers.Initializer = initializers.zeros
    scale_init: initializers.Initializer = initializers.ones
    reduction_axes: int | Sequence[int] = -1
    feature_axes: int | Sequence[int] = -1
    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True


class RMSNorm(dropin.RMS, _Stateless):
    """RMS norm as a drop-in for flax.linen.RMSNorm.

        y = x / sqrt(mean(|x|^2) + epsilon) * (scale_offset + scale),   mean over the last axis

    Variables: params/scale.

    Args:
        scale_offset: 1.0 for models that store scale - 1, as Gemma does; scale_init is then zeros.
        layout, over, features, sizes: see jaxnorm.linen; over is by default the last dimension, features what is
            averaged. All others are flax.linen.RMSNorm's.

    Raises:
        LayoutError, AxisError: as BatchNorm.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import RMSNorm
        >>> norm = RMSNorm(epsilon=0.0, scale_init=jax.nn.initializers.constant(5.0))
        >>> norm.init_with_output(jax.random.key(0), jnp.array([[1.0, 7.0]]))[0].tolist()
        [[1.0, 7.0]]

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.

    Differs from: Flax under a mask with a mapped axis, where it averages the devices' means whatever their counts.
    """

    use_bias = False

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: initializers.Initializer = initializers.ones
    reduction_axes: int | Sequence[int] = -1
    feature_axes: int | Sequence[int] = -1
    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    scale_offset: float = dataclasses.field(default=0.0, kw_only=True)


class GroupNorm(dropin.Group, _Stateless):
    """Group norm as a drop-in for flax.linen.GroupNorm.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var over all axes but the first, and a group

    Averages over every dimension but the first, the frames of a video included: with names, `layout="n t h w c",
    over="h w c"` leaves them apart.

    Variables: params/{scale, bias}.

    Args:
        num_groups, group_size: one of them, and None for the other.
        layout, over, features, sizes: see jaxnorm.linen; features is the one axis that is split, by default the last,
            and stands in over. `layout="n c ...", features="c"` is channels first. All others are
            flax.linen.GroupNorm's.

    Raises:
        LayoutError, AxisError: as BatchNorm; LayoutError when the channels cannot be split into these groups.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import GroupNorm
        >>> norm = GroupNorm(num_groups=2, epsilon=0.0)
        >>> norm.init_with_output(jax.random.key(0), jnp.array([[1.0, 3.0, 10.0, 30.0]]))[0].tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Source: Wu and He 2018, "Group Normalization", equation 7.

    Differs from: Flax, which takes no mask of shape (..., 1); at large means.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: initializers.Initializer = initializers.zeros
    scale_init: initializers.Initializer = initializers.ones
    reduction_axes: int | Sequence[int] | None = None
    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True


class InstanceNorm(dropin.Instance, _Stateless):
    """Instance norm as a drop-in for flax.linen.InstanceNorm.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var over all axes but the first and the features

    Variables: params/{scale, bias}. Without spatial axes every element is its own mean, and y is bias, as in Flax.

    Args:
        layout, over, features, sizes: see jaxnorm.linen; over is by default all but the first dimension and the
            features, which are the last dimension. All others are flax.linen.InstanceNorm's.

    Raises:
        LayoutError, AxisError: as BatchNorm.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import InstanceNorm
        >>> x = jnp.array([[[1.0], [3.0]], [[0.0], [8.0]]])
        >>> InstanceNorm(epsilon=0.0).init_with_output(jax.random.key(0), x)[0][:, :, 0].tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    Source: Ulyanov, Vedaldi, Lempitsky 2016, "Instance Normalization", equation 2.

    Differs from: Flax at large means.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: initializers.Initializer = initializers.zeros
    scale_init: initializers.Initializer = initializers.ones
    feature_axes: int | Sequence[int] = -1
    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
