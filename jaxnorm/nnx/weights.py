"""Norms of weights, as flax.nnx modules: see jaxnorm.nnx."""

from dataclasses import InitVar, dataclass, field

from flax import nnx

from jaxnorm.family import weights
from jaxnorm.nnx.host import Switch, Wrapper


@dataclass(eq=False, repr=False)
class WeightNorm(weights.Weight, Wrapper):
    """Weight norm: the length of each output's weights as a parameter of its own.

        kernel / sqrt(sum(|kernel|^2) + epsilon) * scale

    Variables: Param norm["kernel"]["scale"] for a layer with one kernel, and the layer's.

    Args:
        layer: any module. Its own parameters stay as they are, in training and in evaluation. A call runs a copy that
            shares its Variables: what it makes anew, by `sow` or as a plain attribute, is lost.
        where: which of them are normalized: their last key, or a function of path and leaf.
        layout, over: of a kernel; layout may be a function of path and leaf. Of an attention the kernels of query, key
            and value are "... heads d", that of `out` is "... o".
        use_scale, scale_init: of the lengths; None for the kernel's own, so that the layer starts as it is.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import WeightNorm
        >>> layer = WeightNorm(nnx.Linear(4, 1, kernel_init=nnx.initializers.constant(2.0), rngs=nnx.Rngs(0)))
        >>> layer(jnp.array([[3.0, 4.0, 0.0, 0.0]])).tolist(), layer.norm["kernel"]["scale"][...].tolist()
        ([[14.0]], [4.0])

    Source: Salimans and Kingma 2016, "Weight Normalization", equation 2.
    """


@dataclass(eq=False, repr=False)
class WeightStandardization(weights.Standardization, Wrapper):
    """Weight standardization: each output's weights to mean 0 and variance 1.

        (kernel - mean) / sqrt(var + epsilon) * scale

    Variables: those of the layer; Param norm["kernel"]["scale"] with `use_scale=True`.

    Args:
        layer: any module. Its own parameters stay as they are, in training and in evaluation. A call runs a copy that
            shares its Variables: what it makes anew, by `sow` or as a plain attribute, is lost.
        where: which of them are normalized: their last key, or a function of path and leaf.
        layout, over: of a kernel; layout may be a function of path and leaf. Of an attention the kernels of query, key
            and value are "... heads d", that of `out` is "... o".
        use_scale, scale_init: of a scale for every output, which starts at 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import WeightStandardization
        >>> linear = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> linear.kernel[...] = jnp.array([[3.0], [5.0]])
        >>> WeightStandardization(linear, epsilon=0.0)(jnp.array([[1.0, 10.0]])).tolist()
        [[9.0]]

    Source: Qiao et al. 2019, "Weight Standardization", equation 7.
    """


@dataclass(eq=False, repr=False)
class ScaledWeightStandardization(weights.ScaledStandardization, Wrapper):
    """Scaled weight standardization: of nets without norms, so that a layer keeps the variance of its input.

        (kernel - mean) / sqrt(fan_in var + epsilon) * gain * scale,   fan_in the weights of one output

    Variables: Param norm["kernel"]["scale"] for a layer with one kernel, and the layer's.

    Args:
        layer: any module. Its own parameters stay as they are, in training and in evaluation. A call runs a copy that
            shares its Variables: what it makes anew, by `sow` or as a plain attribute, is lost.
        where: which of them are normalized: their last key, or a function of path and leaf.
        layout, over: of a kernel; layout may be a function of path and leaf. Of an attention the kernels of query, key
            and value are "... heads d", that of `out` is "... o".
        gain: of the activation before: 1.7139 for relu.
        use_scale, scale_init: of a scale for every output, which starts at 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import ScaledWeightStandardization
        >>> linear = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
        >>> linear.kernel[...] = jnp.array([[3.0], [5.0], [3.0], [5.0]])
        >>> ScaledWeightStandardization(linear, epsilon=0.0)(jnp.array([[1.0, 10.0, 1.0, 10.0]])).tolist()
        [[9.0]]

    Source: Brock, De, Smith 2021, "Characterizing signal propagation to close the performance gap in unnormalized
        ResNets", equation 5; Brock et al. 2021 (NFNet), equation 3.
    """


@dataclass(eq=False, repr=False)
class SpectralNorm(weights.Spectral, Switch, Wrapper):
    """Spectral norm: a kernel by its largest singular value, which a power iteration follows from step to step.

        v = W u / |W u|,   u = W' v / |W' v|   (num_steps times),   sigma = v' W u,   kernel / sigma

    Variables: BatchStat norm["kernel"]["u"], norm["kernel"]["sigma"] for a layer with one kernel, and the layer's.

    Args:
        layer: any module. Its own parameters stay as they are, in training and in evaluation. A call runs a copy that
            shares its Variables: what it makes anew, by `sow` or as a plain attribute, is lost.
        where: which of them are normalized: their last key, or a function of path and leaf.
        layout, over: of a kernel; layout may be a function of path and leaf. Of an attention the kernels of query, key
            and value are "... heads d", that of `out` is "... o".
        num_steps: of the power iteration, in training.
        use_running_average: take the state as it is and change nothing. Here or in the call, which passes it
            on to a layer that asks for it.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import SpectralNorm
        >>> linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        >>> linear.kernel[...] = jnp.array([[3.0, 0.0], [0.0, 1.5]])
        >>> layer = SpectralNorm(linear, num_steps=20, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0, 1.0]])).round(3).tolist(), round(float(layer.norm["kernel"]["sigma"][...]), 3)
        ([[1.0, 0.5]], 3.0)

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", algorithm 1.
    """

    rngs: InitVar[nnx.Rngs] = field(kw_only=True)  # for the first u

    def __call__(self, *args, use_running_average: bool | None = None, **kwargs):
        """As Wrapper's, but for `use_running_average`, which says whether the state is followed or taken as it is."""
        train = self._trains(use_running_average)
        return self._call(args, {**weights.passed_on(self.layer, use_running_average), **kwargs}, train=train)
