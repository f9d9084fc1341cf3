"""Norms with a condition, as flax.linen modules: see jaxnorm.linen."""


from jaxnorm.family import conditional
from jaxnorm.linen.host import Host, RunningHost


class AdaptiveInstanceNorm(conditional.AdaptiveInstance, Host):
    """Adaptive instance norm (AdaIN): the statistics of one picture for those of another.

        y = (x - mean(x)) / sqrt(var(x) + epsilon) * sqrt(var(style) + epsilon) + mean(style),   for each n and c

    Variables: none.

    Args:
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import AdaptiveInstanceNorm
        >>> x, style = jnp.array([[[1.0], [3.0]]]), jnp.array([[[10.0], [30.0], [10.0], [30.0]]])
        >>> norm = AdaptiveInstanceNorm(epsilon=0.0)
        >>> y, _ = norm.init_with_output(jax.random.key(0), x, style)
        >>> y[0, :, 0].tolist()
        [10.0, 30.0]

    Source: Huang and Belongie 2017, "Arbitrary Style Transfer in Real-time", equation 8.
    """


class AdaptiveLayerNorm(conditional.AdaptiveLayer, Host):
    """Adaptive layer norm (adaLN-Zero): scale, bias and a gate for every example, from a condition.

        scale, bias, gate = silu(condition) kernel + bias,   y = (x - mean) / sqrt(var + epsilon) * (1 + scale) + bias

    It starts with a kernel and a bias of 0, where y is layer norm and the gate is 0: with `x + jaxnorm.film(block(y),
    gate)` a block starts as the identity.

    Variables: params/{kernel, bias}.

    Args:
        features: the axes of scale, bias and gate, and with any number of entries for the last one of the condition: "n
            c".
        scale_offset: the 1 of the formula.
        kernel_init, bias_init: zeros.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import AdaptiveLayerNorm
        >>> x, condition = jnp.array([[[1.0, 3.0]]]), jnp.ones((1, 3))
        >>> norm = AdaptiveLayerNorm(epsilon=0.0)
        >>> (y, gate), _ = norm.init_with_output(jax.random.key(0), x, condition)
        >>> y.tolist(), gate.tolist()
        ([[[-1.0, 1.0]]], [[0.0, 0.0]])

    Source: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", section 3.2.
    """


class FiLM(conditional.FeaturewiseLinear, Host):
    """Feature-wise linear modulation (FiLM): scale and bias for every example, from a condition, and no norm.

        scale, bias = condition kernel + bias,   y = x * (1 + scale) + bias

    It starts with a kernel and a bias of 0, where y is x.

    Variables: params/{kernel, bias}.

    Args:
        features: the axes of scale and bias, and with any number of entries for the last one of the condition: "n c".
        scale_offset: the 1 of the formula.
        kernel_init, bias_init: zeros.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import FiLM
        >>> x, condition = jnp.array([[1.0, 3.0]]), jnp.ones((1, 3))
        >>> norm = FiLM(kernel_init=jax.nn.initializers.ones)
        >>> y, _ = norm.init_with_output(jax.random.key(0), x, condition)
        >>> y.tolist()
        [[7.0, 15.0]]

    Source: Perez et al. 2018, "FiLM: Visual Reasoning with a General Conditioning Layer", equation 2.
    """


class ConditionalBatchNorm(conditional.ConditionalBatch, RunningHost):
    """Class-conditional batch norm: shared statistics, scale and bias of each example's class.

        y = (x - mean) / sqrt(var + epsilon) * scale[labels] + bias[labels]

    Variables: params/{scale, bias}, batch_stats/{mean, var}, the first two along the classes first, and num_updates
        where `debias` or `momentum=None` asks for it.

    Args:
        num_classes: how many there are: labels are 0 to num_classes - 1.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import ConditionalBatchNorm
        >>> x, labels = jnp.array([[1.0], [3.0]]), jnp.array([0, 2])
        >>> norm = ConditionalBatchNorm(num_classes=3, momentum=0.0, epsilon=0.0, use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), x, labels)
        >>> y, state = norm.apply(variables, x, labels, mutable="batch_stats")
        >>> y[:, 0].tolist(), state["batch_stats"]["mean"].tolist()
        ([-1.0, 1.0], [2.0])

    Source: Dumoulin, Shlens, Kudlur 2017, "A Learned Representation for Artistic Style", equation 5; de Vries et al.
        2017.
    """


class SPADE(conditional.SpatiallyAdaptive, RunningHost):
    """Spatially adaptive batch norm (SPADE): scale and bias for every place, from a map of labels, say.

        y = (x - mean) / sqrt(var + epsilon) * (1 + scale) + bias

    Variables: batch_stats/{mean, var}, and num_updates where `debias` or `momentum=None` asks for it.

    Args:
        scale_offset: the 1 of the formula.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import SPADE
        >>> x, scale = jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [4.0]])
        >>> norm = SPADE(momentum=0.0, epsilon=0.0, use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), x, scale, None)
        >>> y, state = norm.apply(variables, x, scale, None, mutable="batch_stats")
        >>> y[:, 0].tolist(), state["batch_stats"]["mean"].tolist()
        ([-1.0, 5.0], [2.0])

    Source: Park et al. 2019, "Semantic Image Synthesis with Spatially-Adaptive Normalization", equation 1.
    """
