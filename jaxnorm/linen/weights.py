"""Norms of weights, as flax.linen modules: see jaxnorm.linen."""

from dataclasses import field

import flax.linen as nn

from jaxnorm.family import weights
from jaxnorm.linen.host import Wrapper


class WeightNorm(weights.Weight, Wrapper):
    """Weight norm: the length of each output's weights as a parameter of its own.

        kernel / sqrt(sum(|kernel|^2) + epsilon) * scale

    Variables: params/norm, {"kernel": {"scale": ...}} for a layer with one kernel; params/layer is as it is without.

    Args:
        layer: any module. Its own parameters stay as they are, in training and in evaluation.
        where: which of them are normalized: their last key, or a function of path and leaf.
        layout, over: of a kernel; layout may be a function of path and leaf. Of an attention the kernels of query, key
            and value are "... heads d", that of `out` is "... o".
        use_scale, scale_init: of the lengths; None for the kernel's own, so that the layer starts as it is.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from jaxnorm.linen import WeightNorm
        >>> layer = WeightNorm(nn.Dense(1, kernel_init=nn.initializers.constant(2.0)))
        >>> x = jnp.array([[3.0, 4.0, 0.0, 0.0]])
        >>> y, variables = layer.init_with_output(jax.random.key(0), x)
        >>> y.tolist(), variables["params"]["norm"]["kernel"]["scale"].tolist()
        ([[14.0]], [4.0])

    Source: Salimans and Kingma 2016, "Weight Normalization", equation 2.
    """


class WeightStandardization(weights.Standardization, Wrapper):
    """Weight standardization: each output's weights to mean 0 and variance 1.

        (kernel - mean) / sqrt(var + epsilon) * scale

    Variables: params/layer, as it is without; params/norm, {"kernel": {"scale": ...}}, with `use_scale=True`.

    Args:
        layer: any module. Its own parameters stay as they are, in training and in evaluation.
        where: which of them are normalized: their last key, or a function of path and leaf.
        layout, over: of a kernel; layout may be a function of path and leaf. Of an attention the kernels of query, key
            and value are "... heads d", that of `out` is "... o".
        use_scale, scale_init: of a scale for every output, which starts at 1.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from jaxnorm.linen import WeightStandardization
        >>> layer = WeightStandardization(nn.Dense(1), epsilon=0.0)
        >>> params = {"layer": {"kernel": jnp.array([[3.0], [5.0]]), "bias": jnp.zeros(1)}}
        >>> layer.apply({"params": params}, jnp.array([[1.0, 10.0]])).tolist()
        [[9.0]]

    Source: Qiao et al. 2019, "Weight Standardization", equation 7.
    """


class ScaledWeightStandardization(weights.ScaledStandardization, Wrapper):
    """Scaled weight standardization: of nets without norms, so that a layer keeps the variance of its input.

        (kernel - mean) / sqrt(fan_in var + epsilon) * gain * scale,   fan_in the weights of one output

    Variables: params/layer, as it is without; params/norm, {"kernel": {"scale": ...}} for a layer with one kernel.

    Args:
        layer: any module. Its own parameters stay as they are, in training and in evaluation.
        where: which of them are normalized: their last key, or a function of path and leaf.
        layout, over: of a kernel; layout may be a function of path and leaf. Of an attention the kernels of query, key
            and value are "... heads d", that of `out` is "... o".
        gain: of the activation before: 1.7139 for relu.
        use_scale, scale_init: of a scale for every output, which starts at 1.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from jaxnorm.linen import ScaledWeightStandardization
        >>> layer = ScaledWeightStandardization(nn.Dense(1), use_scale=False, epsilon=0.0)
        >>> params = {"layer": {"kernel": jnp.array([[3.0], [5.0], [3.0], [5.0]]), "bias": jnp.zeros(1)}}
        >>> layer.apply({"params": params}, jnp.array([[1.0, 10.0, 1.0, 10.0]])).tolist()
        [[9.0]]

    Source: Brock, De, Smith 2021, "Characterizing signal propagation to close the performance gap in unnormalized
        ResNets", equation 5; Brock et al. 2021 (NFNet), equation 3.
    """


class SpectralNorm(weights.Spectral, Wrapper):
    """Spectral norm: a kernel by its largest singular value, which a power iteration follows from step to step.

        v = W u / |W u|,   u = W' v / |W' v|   (num_steps times),   sigma = v' W u,   kernel / sigma

    Variables: batch_stats/norm, {"kernel": {"u": ..., "sigma": ...}} for a layer with one kernel; params/layer is as it
        is without.

    Args:
        layer: any module. Its own parameters stay as they are, in training and in evaluation.
        where: which of them are normalized: their last key, or a function of path and leaf.
        layout, over: of a kernel; layout may be a function of path and leaf. Of an attention the kernels of query, key
            and value are "... heads d", that of `out` is "... o".
        num_steps: of the power iteration, in training.
        use_running_average: take the state as it is and change nothing. Here or in the call, which passes it
            on to a layer that asks for it.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from jaxnorm.linen import SpectralNorm
        >>> layer = SpectralNorm(nn.Dense(2), num_steps=20, use_running_average=False)
        >>> x = jnp.array([[1.0, 1.0]])
        >>> params = {"layer": {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.5]]), "bias": jnp.zeros(2)}}
        >>> stats = layer.init(jax.random.key(0), x)["batch_stats"]
        >>> y, state = layer.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")
        >>> y.round(3).tolist(), round(float(state["batch_stats"]["norm"]["kernel"]["sigma"]), 3)
        ([[1.0, 0.5]], 3.0)

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", algorithm 1.
    """

    use_running_average: bool | None = field(default=None, kw_only=True)

    @nn.compact
    def __call__(self, *args, use_running_average: bool | None = None, **kwargs):
        """As Wrapper's, but for `use_running_average`, which says whether the state is followed or taken as it is."""
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        return self._call(args, {**weights.passed_on(self.layer, evaluate), **kwargs}, train=not evaluate)
