"""Norms with a condition as modules: see `jaxnorm.norms.conditional`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, ones, zeros

from jaxnorm.errors import LayoutError
from jaxnorm.family.base import Family, RunningMoments
from jaxnorm.layout import Names, channels, last
from jaxnorm.modules import result_dtype
from jaxnorm.normalize import normalize
from jaxnorm.norms.conditional import (
    adaptive_instance_norm,
    adaptive_layer_norm,
    by_label,
    conditional_batch_norm,
    film,
    spade,
)
from jaxnorm.operands import offset_scale


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class AdaptiveInstance(Family):
    layout: Names = "n ... c"
    over: Names = "..."
    epsilon: float = 1e-5

    def _compute(self, own, x, style, **call):
        return adaptive_instance_norm(
            x, self._wide(style), self.layout, epsilon=self.epsilon, sizes=self._sizes, **call
        )

    def __call__(self, x, style, *, mask=None, style_mask=None):
        """Normalize x, and give it the statistics of `style`.

        Args:
            x: the content, laid out as `layout`.
            style: laid out likewise; it may have other sizes along `over`.
            mask, style_mask: True where an element of x, of style counts.

        Returns:
            y, of the shape of x.
        """
        return self._run(x, style, mask=mask, style_mask=style_mask)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class _Conditioned(Family):
    """Arrays along the channels, linear in a condition. They start at 0 with the kernel and bias of this layer."""

    layout: Names = "n ... c"
    features: Names = "n c"
    scale_offset: float = 1.0
    kernel_init: Initializer = zeros
    bias_init: Initializer = zeros

    def _linear(self: Any, count: int, lengths: Any, *inputs: Any) -> dict[str, Any]:
        channels = math.prod(lengths(last(self.features)))
        size = inputs[0].shape[-1] if inputs else self.condition_features
        return {
            "kernel": self._parameter(self.kernel_init, (size, count * channels)),
            "bias": self._parameter(self.bias_init, (count * channels,)),
        }

    def _split(self, own: Any, condition: jax.Array, count: int) -> list[jax.Array]:
        """`count` arrays, each laid out as the condition with the channels in place of its last axis."""
        arrays = condition, own["kernel"], own["bias"]
        if condition.shape[-1] != len(own["kernel"]):
            raise LayoutError(
                f"the condition of shape {condition.shape} has {condition.shape[-1]} entries, and the module was built "
                f"for {len(own['kernel'])}."
            )
        dtype = result_dtype(self.dtype, *arrays)
        condition, kernel, bias = (z.astype(dtype) for z in arrays)
        made = condition @ kernel
        return jnp.split(made + jnp.broadcast_to(bias, made.shape), count, axis=-1)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class AdaptiveLayer(_Conditioned):
    over: Names = "c"
    epsilon: float = 1e-6

    def _parameters(self, lengths, *inputs):
        return self._linear(3, lengths, *inputs)

    def _compute(self, own, x, condition, **call):
        scale, bias, gate = self._split(own, jax.nn.silu(condition), 3)
        options = {"features": self.features, "scale_offset": self.scale_offset, "sizes": self._sizes}
        y = adaptive_layer_norm(x, scale, bias, self.layout, epsilon=self.epsilon, **options, **call)
        return y, gate.astype(y.dtype)

    def __call__(self, x, condition, *, mask=None):
        """Normalize x, with scale and bias from a condition.

        Args:
            x: array laid out as `layout`.
            condition: array laid out as `features`, with any number of entries in place of the channels.
            mask: True where an element counts; broadcasts to x as in NumPy.

        Returns:
            y, of the shape of x, and the gate along `features`: `x + jaxnorm.film(block(y), gate)`.
        """
        return self._run(x, jnp.asarray(condition), mask=mask)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FeaturewiseLinear(_Conditioned):
    def _parameters(self, lengths, *inputs):
        return self._linear(2, lengths, *inputs)

    def _compute(self, own, x, condition, *, over, **call):
        scale, bias = self._split(own, condition, 2)
        options = {"features": self.features, "scale_offset": self.scale_offset, "sizes": self._sizes}
        return film(x, scale, bias, self.layout, **options, **call)

    def __call__(self, x, condition, *, mask=None):
        """Scale and shift x by a condition.

        Args:
            x: array laid out as `layout`.
            condition: array laid out as `features`, with any number of entries in place of the channels.
            mask: True where an element counts: elsewhere a value that is not finite is read as 0.

        Returns:
            y, of the shape of x.
        """
        return self._run(x, jnp.asarray(condition), mask=mask)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class ConditionalBatch(RunningMoments):
    layout: Names = "n ... c"
    over: Names = "n ..."
    num_classes: int
    use_scale: bool = True
    use_bias: bool = True
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    def _parameters(self, lengths, *inputs):
        shape = (self.num_classes, *lengths(channels(self.layout, self.over)))
        return {
            "scale": self._parameter(self.scale_init, shape, self.use_scale),
            "bias": self._parameter(self.bias_init, shape, self.use_bias),
        }

    def _compute(self, own, running, x, labels, *, train, over, **call):
        if train:
            return conditional_batch_norm(x, running, labels, over=over, **own, **self._options, **call)
        features, chosen = by_label(x, labels, dict(own), self.layout, self.over, self._sizes)
        options = {"features": features, "epsilon": self.epsilon, "sizes": self._sizes}
        return normalize(x, running, self.layout, **chosen, **options, **call), running

    def __call__(self, x, labels, use_running_average: bool | None = None, *, mask=None, weights=None):
        """Normalize x, with scale and bias of the class of each example.

        Args:
            x: array laid out as `layout`, the examples first.
            labels: integers, one for each example.
            use_running_average: normalize with the running statistics and change nothing. Here or in the constructor.
            mask: True where an element counts; broadcasts to x as in NumPy.
            weights: how much an element counts, not negative.

        Returns:
            y, of the shape of x.
        """
        labels = jnp.asarray(labels)
        return self._run(x, labels, use_running_average=use_running_average, mask=mask, weights=weights)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SpatiallyAdaptive(RunningMoments):
    layout: Names = "n ... c"
    over: Names = "n ..."
    scale_offset: float = 1.0

    def _compute(self, own, running, x, scale, bias, *, train, over, features, **call):
        features = self.layout if features is None else features
        if train:
            return spade(
                x, running, scale, bias, over=over, features=features, scale_offset=self.scale_offset,
                **self._options, **call,
            )  # fmt: skip
        options = {"features": features, "epsilon": self.epsilon, "sizes": self._sizes}
        scale = offset_scale(scale, self.scale_offset)
        return normalize(x, running, self.layout, scale=scale, bias=bias, **options, **call), running

    def __call__(
        self, x, scale, bias, use_running_average: bool | None = None, *, mask=None, weights=None, features=None
    ):  # fmt: skip
        """Normalize x, with a scale and a bias for every place.

        Args:
            x: array laid out as `layout`.
            scale, bias: arrays along `features`, from a convolution of the label map, say; None for none.
            use_running_average: normalize with the running statistics and change nothing. Here or in the constructor.
            mask: True where an element counts; broadcasts to x as in NumPy.
            weights: how much an element counts, not negative.
            features: the axes of scale and bias; by default all of the layout.

        Returns:
            y, of the shape of x.
        """
        options = {"use_running_average": use_running_average, "mask": mask, "weights": weights}
        return self._run(x, scale, bias, features=features, **options)
