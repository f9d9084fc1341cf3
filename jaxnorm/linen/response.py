"""Response norms, EvoNorms and norms without statistics, as flax.linen modules: see jaxnorm.linen."""


from jaxnorm.family import response
from jaxnorm.linen.host import Host, RunningHost


class DynamicTanh(response.Tanh, Host):
    """Dynamic tanh (DyT): what layer norm does to large values, without statistics.

        y = tanh(alpha x) * scale + bias

    Variables: params/{alpha, scale, bias}.

    Args:
        alpha_init: 0.5, one number.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import DynamicTanh
        >>> x = jnp.array([[0.0, 100.0]])
        >>> norm = DynamicTanh()
        >>> y, _ = norm.init_with_output(jax.random.key(0), x)
        >>> y.tolist()
        [[0.0, 1.0]]

    Source: Zhu et al. 2025, "Transformers without Normalization", equation 1.
    """


class DynamicErf(response.Erf, Host):
    """Dynamic erf (Derf): dynamic tanh with the error function and a shift.

        y = erf(alpha x + shift) * scale + bias

    Variables: params/{alpha, shift, scale, bias}.

    Args:
        alpha_init, shift_init: 0.5 and 0, one number each.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import DynamicErf
        >>> x = jnp.array([[0.0, 100.0]])
        >>> norm = DynamicErf()
        >>> y, _ = norm.init_with_output(jax.random.key(0), x)
        >>> y.tolist()
        [[0.0, 1.0]]

    Source: Chen et al. 2025, "Stronger Normalization-Free Transformers", equation 3.
    """


class GlobalResponseNorm(response.GlobalResponse, Host):
    """Global response norm (GRN): channels compete by their length over space.

        y = x + x * N * scale + bias,   N = G / (mean(G over c) + epsilon),   G = sqrt(sum(|x|^2 over space))

    It starts with a scale and a bias of 0, where y is x.

    Variables: params/{scale, bias}.

    Args:
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import GlobalResponseNorm
        >>> x = jnp.array([[[3.0, 1.0]]])
        >>> norm = GlobalResponseNorm(scale_init=jax.nn.initializers.ones, epsilon=0.0)
        >>> y, _ = norm.init_with_output(jax.random.key(0), x)
        >>> y.tolist()
        [[[7.5, 1.5]]]

    Source: Woo et al. 2023, "ConvNeXt V2", equations 1 to 3.
    """


class FilterResponseNorm(response.FilterResponse, Host):
    """Filter response norm (FRN), with its activation, the thresholded linear unit (TLU).

        y = max(x / sqrt(mean(|x|^2 over space) + epsilon) * scale + bias, threshold)

    Variables: params/{scale, bias, threshold}.

    Args:
        use_threshold: False leaves the activation out.
        threshold_init: zeros.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import FilterResponseNorm
        >>> x = jnp.array([[[1.0], [-7.0]]])
        >>> norm = FilterResponseNorm(epsilon=0.0)
        >>> y, _ = norm.init_with_output(jax.random.key(0), x)
        >>> (y * 5)[0, :, 0].tolist()
        [1.0, 0.0]

    Source: Singh and Krishnan 2020, "Filter Response Normalization Layer", equations 1 to 3.
    """


class LocalResponseNorm(response.LocalResponse, Host):
    """Local response norm (AlexNet): a channel by the strength of its neighbours.

        y = x / (offset + alpha / size * sum(|x|^2 over the window))^power

    Variables: none.

    Args:
        size: of the window along `over`: size // 2 channels before, (size - 1) // 2 behind.
        alpha, power, offset: as in the formula.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import LocalResponseNorm
        >>> x = jnp.array([[1.0, 2.0, 3.0]])
        >>> norm = LocalResponseNorm(size=3, alpha=3.0, power=1.0, offset=0.0)
        >>> y, _ = norm.init_with_output(jax.random.key(0), x)
        >>> print((x / y).round(4))
        [[ 5. 14. 13.]]

    Source: Krizhevsky, Sutskever, Hinton 2012, "ImageNet Classification with Deep CNNs", section 3.3.
    """


class EvoNormB0(response.EvoB0, RunningHost):
    """EvoNorm B0: batch and instance statistics, whichever is larger, and no activation behind.

        y = x / max(sqrt(var_batch + epsilon), v x + sqrt(var_instance + epsilon)) * scale + bias

    Variables: params/{scale, bias, v}, batch_stats/{mean, var}, and num_updates where `debias` or `momentum=None` asks
        for it.

    Args:
        v_init: ones.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import EvoNormB0
        >>> x = jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]])
        >>> norm = EvoNormB0(momentum=0.0, epsilon=0.0, use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), x)
        >>> y, state = norm.apply(variables, x, mutable="batch_stats")
        >>> print((4 * y[:, :, 0]).round(), state["batch_stats"]["var"])
        [[2. 3.]
         [2. 3.]] [3.5]

    Source: Liu et al. 2020, "Evolving Normalization-Activation Layers", table 2.
    """


class EvoNormS0(response.EvoS0, Host):
    """EvoNorm S0: swish over the deviation of a group. Of one example alone, and no activation behind.

        y = x sigmoid(v x) / sqrt(var_group + epsilon) * scale + bias

    Variables: params/{scale, bias, v}.

    Args:
        num_groups: into how many groups the channels are split; it must divide them.
        v_init: ones.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import EvoNormS0
        >>> x = jnp.array([[[0.0], [40.0]]])
        >>> norm = EvoNormS0(num_groups=1, epsilon=0.0)
        >>> y, _ = norm.init_with_output(jax.random.key(0), x)
        >>> y[0, :, 0].tolist()
        [0.0, 2.0]

    Source: Liu et al. 2020, "Evolving Normalization-Activation Layers", table 2.
    """
