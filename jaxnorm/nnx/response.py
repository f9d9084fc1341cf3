"""Response norms, EvoNorms and norms without statistics, as flax.nnx modules: see jaxnorm.nnx."""

from dataclasses import dataclass

from jaxnorm.family import response
from jaxnorm.nnx.host import BareHost, Host, RunningHost


@dataclass(eq=False, repr=False)
class DynamicTanh(response.Tanh, Host):
    """Dynamic tanh (DyT): what layer norm does to large values, without statistics.

        y = tanh(alpha x) * scale + bias

    Variables: Param alpha, scale, bias.

    Args:
        alpha_init: 0.5, one number.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import DynamicTanh
        >>> x = jnp.array([[0.0, 100.0]])
        >>> y = DynamicTanh(2, rngs=nnx.Rngs(0))(x)
        >>> y.tolist()
        [[0.0, 1.0]]

    Source: Zhu et al. 2025, "Transformers without Normalization", equation 1.
    """


@dataclass(eq=False, repr=False)
class DynamicErf(response.Erf, Host):
    """Dynamic erf (Derf): dynamic tanh with the error function and a shift.

        y = erf(alpha x + shift) * scale + bias

    Variables: Param alpha, shift, scale, bias.

    Args:
        alpha_init, shift_init: 0.5 and 0, one number each.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import DynamicErf
        >>> x = jnp.array([[0.0, 100.0]])
        >>> y = DynamicErf(2, rngs=nnx.Rngs(0))(x)
        >>> y.tolist()
        [[0.0, 1.0]]

    Source: Chen et al. 2025, "Stronger Normalization-Free Transformers", equation 3.
    """


@dataclass(eq=False, repr=False)
class GlobalResponseNorm(response.GlobalResponse, Host):
    """Global response norm (GRN): channels compete by their length over space.

        y = x + x * N * scale + bias,   N = G / (mean(G over c) + epsilon),   G = sqrt(sum(|x|^2 over space))

    It starts with a scale and a bias of 0, where y is x.

    Variables: Param scale, bias.

    Args:
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import GlobalResponseNorm
        >>> x = jnp.array([[[3.0, 1.0]]])
        >>> y = GlobalResponseNorm(2, scale_init=jax.nn.initializers.ones, epsilon=0.0, rngs=nnx.Rngs(0))(x)
        >>> y.tolist()
        [[[7.5, 1.5]]]

    Source: Woo et al. 2023, "ConvNeXt V2", equations 1 to 3.
    """


@dataclass(eq=False, repr=False)
class FilterResponseNorm(response.FilterResponse, Host):
    """Filter response norm (FRN), with its activation, the thresholded linear unit (TLU).

        y = max(x / sqrt(mean(|x|^2 over space) + epsilon) * scale + bias, threshold)

    Variables: Param scale, bias, threshold.

    Args:
        use_threshold: False leaves the activation out.
        threshold_init: zeros.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import FilterResponseNorm
        >>> x = jnp.array([[[1.0], [-7.0]]])
        >>> y = FilterResponseNorm(1, epsilon=0.0, rngs=nnx.Rngs(0))(x)
        >>> (y * 5)[0, :, 0].tolist()
        [1.0, 0.0]

    Source: Singh and Krishnan 2020, "Filter Response Normalization Layer", equations 1 to 3.
    """


@dataclass(eq=False, repr=False)
class LocalResponseNorm(response.LocalResponse, BareHost):
    """Local response norm (AlexNet): a channel by the strength of its neighbours.

        y = x / (offset + alpha / size * sum(|x|^2 over the window))^power

    Variables: none.

    Args:
        size: of the window along `over`: size // 2 channels before, (size - 1) // 2 behind.
        alpha, power, offset: as in the formula.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import LocalResponseNorm
        >>> x = jnp.array([[1.0, 2.0, 3.0]])
        >>> y = LocalResponseNorm(size=3, alpha=3.0, power=1.0, offset=0.0)(x)
        >>> print((x / y).round(4))
        [[ 5. 14. 13.]]

    Source: Krizhevsky, Sutskever, Hinton 2012, "ImageNet Classification with Deep CNNs", section 3.3.
    """


@dataclass(eq=False, repr=False)
class EvoNormB0(response.EvoB0, RunningHost):
    """EvoNorm B0: batch and instance statistics, whichever is larger, and no activation behind.

        y = x / max(sqrt(var_batch + epsilon), v x + sqrt(var_instance + epsilon)) * scale + bias

    Variables: Param scale, bias, v; BatchStat mean, var, and num_updates where `debias` or `momentum=None` asks for it.

    Args:
        v_init: ones.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import EvoNormB0
        >>> x = jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]])
        >>> norm = EvoNormB0(1, momentum=0.0, epsilon=0.0, rngs=nnx.Rngs(0))
        >>> y = norm(x)
        >>> print((4 * y[:, :, 0]).round(), norm.var[...])
        [[2. 3.]
         [2. 3.]] [3.5]

    Source: Liu et al. 2020, "Evolving Normalization-Activation Layers", table 2.
    """


@dataclass(eq=False, repr=False)
class EvoNormS0(response.EvoS0, Host):
    """EvoNorm S0: swish over the deviation of a group. Of one example alone, and no activation behind.

        y = x sigmoid(v x) / sqrt(var_group + epsilon) * scale + bias

    Variables: Param scale, bias, v.

    Args:
        num_groups: into how many groups the channels are split; it must divide them.
        v_init: ones.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import EvoNormS0
        >>> x = jnp.array([[[0.0], [40.0]]])
        >>> y = EvoNormS0(1, num_groups=1, epsilon=0.0, rngs=nnx.Rngs(0))(x)
        >>> y[0, :, 0].tolist()
        [0.0, 2.0]

    Source: Liu et al. 2020, "Evolving Normalization-Activation Layers", table 2.
    """
