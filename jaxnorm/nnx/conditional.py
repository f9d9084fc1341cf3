"""Norms with a condition, as flax.nnx modules: see jaxnorm.nnx."""

from dataclasses import dataclass, field

from jaxnorm.family import conditional
from jaxnorm.nnx.host import BareHost, Host, RunningHost


@dataclass(eq=False, repr=False)
class AdaptiveInstanceNorm(conditional.AdaptiveInstance, BareHost):
    """Adaptive instance norm (AdaIN): the statistics of one picture for those of another.

        y = (x - mean(x)) / sqrt(var(x) + epsilon) * sqrt(var(style) + epsilon) + mean(style),   for each n and c

    Variables: none.

    Args:
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import AdaptiveInstanceNorm
        >>> x, style = jnp.array([[[1.0], [3.0]]]), jnp.array([[[10.0], [30.0], [10.0], [30.0]]])
        >>> y = AdaptiveInstanceNorm(epsilon=0.0)(x, style)
        >>> y[0, :, 0].tolist()
        [10.0, 30.0]

    Source: Huang and Belongie 2017, "Arbitrary Style Transfer in Real-time", equation 8.
    """


@dataclass(eq=False, repr=False)
class AdaptiveLayerNorm(conditional.AdaptiveLayer, Host):
    """Adaptive layer norm (adaLN-Zero): scale, bias and a gate for every example, from a condition.

        scale, bias, gate = silu(condition) kernel + bias,   y = (x - mean) / sqrt(var + epsilon) * (1 + scale) + bias

    It starts with a kernel and a bias of 0, where y is layer norm and the gate is 0: with `x + jaxnorm.film(block(y),
    gate)` a block starts as the identity.

    Variables: Param kernel, bias.

    Args:
        condition_features: the number of entries of a condition.
        features: the axes of scale, bias and gate, and with any number of entries for the last one of the condition: "n
            c".
        scale_offset: the 1 of the formula.
        kernel_init, bias_init: zeros.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import AdaptiveLayerNorm
        >>> x, condition = jnp.array([[[1.0, 3.0]]]), jnp.ones((1, 3))
        >>> y, gate = AdaptiveLayerNorm(2, condition_features=3, epsilon=0.0, rngs=nnx.Rngs(0))(x, condition)
        >>> y.tolist(), gate.tolist()
        ([[[-1.0, 1.0]]], [[0.0, 0.0]])

    Source: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", section 3.2.
    """

    condition_features: int = field(kw_only=True)


@dataclass(eq=False, repr=False)
class FiLM(conditional.FeaturewiseLinear, Host):
    """Feature-wise linear modulation (FiLM): scale and bias for every example, from a condition, and no norm.

        scale, bias = condition kernel + bias,   y = x * (1 + scale) + bias

    It starts with a kernel and a bias of 0, where y is x.

    Variables: Param kernel, bias.

    Args:
        condition_features: the number of entries of a condition.
        features: the axes of scale and bias, and with any number of entries for the last one of the condition: "n c".
        scale_offset: the 1 of the formula.
        kernel_init, bias_init: zeros.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import FiLM
        >>> x, condition = jnp.array([[1.0, 3.0]]), jnp.ones((1, 3))
        >>> y = FiLM(2, condition_features=3, kernel_init=jax.nn.initializers.ones, rngs=nnx.Rngs(0))(x, condition)
        >>> y.tolist()
        [[7.0, 15.0]]

    Source: Perez et al. 2018, "FiLM: Visual Reasoning with a General Conditioning Layer", equation 2.
    """

    condition_features: int = field(kw_only=True)


@dataclass(eq=False, repr=False)
class ConditionalBatchNorm(conditional.ConditionalBatch, RunningHost):
    """Class-conditional batch norm: shared statistics, scale and bias of each example's class.

        y = (x - mean) / sqrt(var + epsilon) * scale[labels] + bias[labels]

    Variables: Param scale, bias; BatchStat mean, var, the first two along the classes first, and num_updates where
        `debias` or `momentum=None` asks for it.

    Args:
        num_classes: how many there are: labels are 0 to num_classes - 1.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import ConditionalBatchNorm
        >>> x, labels = jnp.array([[1.0], [3.0]]), jnp.array([0, 2])
        >>> norm = ConditionalBatchNorm(1, num_classes=3, momentum=0.0, epsilon=0.0, rngs=nnx.Rngs(0))
        >>> y = norm(x, labels)
        >>> y[:, 0].tolist(), norm.mean[...].tolist()
        ([-1.0, 1.0], [2.0])

    Source: Dumoulin, Shlens, Kudlur 2017, "A Learned Representation for Artistic Style", equation 5; de Vries et al.
        2017.
    """


@dataclass(eq=False, repr=False)
class SPADE(conditional.SpatiallyAdaptive, RunningHost):
    """Spatially adaptive batch norm (SPADE): scale and bias for every place, from a map of labels, say.

        y = (x - mean) / sqrt(var + epsilon) * (1 + scale) + bias

    Variables: BatchStat mean, var, and num_updates where `debias` or `momentum=None` asks for it.

    Args:
        scale_offset: the 1 of the formula.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import SPADE
        >>> x, scale = jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [4.0]])
        >>> norm = SPADE(1, momentum=0.0, epsilon=0.0, rngs=nnx.Rngs(0))
        >>> y = norm(x, scale, None)
        >>> y[:, 0].tolist(), norm.mean[...].tolist()
        ([-1.0, 5.0], [2.0])

    Source: Park et al. 2019, "Semantic Image Synthesis with Spatially-Adaptive Normalization", equation 1.
    """
