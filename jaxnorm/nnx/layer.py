"""The family of layer norm, as flax.nnx modules: see jaxnorm.nnx."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from jaxnorm.family import layer
from jaxnorm.modules import naming
from jaxnorm.nnx.host import BareHost, Host
from jaxnorm.norms.layer import add_norm


@dataclass(eq=False, repr=False)
class PartialRMSNorm(layer.PartialRMS, Host):
    """Partial RMS norm (pRMSNorm): the root mean square of the first few features for all of them.

        y = x / sqrt(mean(|x_i|^2, i < ceil(fraction c)) + epsilon) * (scale_offset + scale) + bias

    Variables: Param scale, and bias with `use_bias=True`.

    Args:
        fraction: of the features, more than 0 and up to 1, which is RMS norm.
        scale_offset: 1.0 for a scale that is stored less 1.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import PartialRMSNorm
        >>> x = jnp.array([[2.0, 4.0, 6.0, 8.0]])
        >>> y = PartialRMSNorm(4, fraction=0.25, epsilon=0.0, rngs=nnx.Rngs(0))(x)
        >>> y.tolist()
        [[1.0, 2.0, 3.0, 4.0]]

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 4.1 (6.25 % by default).
    """


@dataclass(eq=False, repr=False)
class ScaleNorm(layer.Scale, Host):
    """ScaleNorm: every vector to one length, which is learned.

        y = scale * x / sqrt(sum(|x|^2) + epsilon)

    Variables: Param scale, one number.

    Args:
        scale_init: None for the square root of the number of features.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import ScaleNorm
        >>> x = jnp.array([[3.0, 4.0, 0.0, 0.0]])
        >>> y = ScaleNorm(4, epsilon=0.0, rngs=nnx.Rngs(0))(x)
        >>> (y * 5).tolist()
        [[6.0, 8.0, 0.0, 0.0]]

    Source: Nguyen and Salazar 2019, "Transformers without Tears", equation 4.
    """


@dataclass(eq=False, repr=False)
class L2Norm(layer.L2, Host):
    """Unit (L2) norm: every vector to length 1, then scaled.

        y = x / sqrt(sum(|x|^2) + epsilon) * scale + bias

    Variables: Param scale, and bias with `use_bias=True`.

    Args:
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import L2Norm
        >>> x = jnp.array([[3.0, 4.0]])
        >>> y = L2Norm(2, rngs=nnx.Rngs(0))(x)
        >>> print((5 * y).round())
        [[3. 4.]]

    Source: Ranjan, Castillo, Chellappa 2017, "L2-constrained Softmax Loss", equation 3.
    """


@dataclass(eq=False, repr=False)
class QKNorm(layer.QK, Host):
    """QK norm: queries and keys normalized before their product, so that attention's logits stay in bounds.

        query / sqrt(mean(|query|^2) + epsilon) * query_scale,   key likewise, for every head

    Variables: Param query_scale, key_scale.

    Args:
        num_features: the length of a head.
        attention_fn: what attends. So the module is the attention_fn of Flax's MultiHeadAttention.
        center: subtract the mean first: layer norm, as in ViT-22B.
        use_scale, scale_init: of both scales.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import QKNorm
        >>> rngs = nnx.Rngs(0)
        >>> query, key = QKNorm(2, epsilon=0.0, rngs=rngs)(jnp.array([[1.0, 7.0]]), jnp.array([[3.0, 3.0]]))
        >>> (query * 5).tolist(), key.tolist()
        ([[1.0, 7.0]], [[1.0, 1.0]])

        >>> norm = QKNorm(4, rngs=rngs)
        >>> attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, attention_fn=norm, decode=False, rngs=rngs)
        >>> x = jax.random.normal(jax.random.key(1), (4, 5, 8))
        >>> attention(x, mask=nnx.make_causal_mask(x[..., 0])).shape, attention.attention_fn.key_scale.shape
        ((4, 5, 8), (4,))

    Source: Henry et al. 2020, "Query-Key Normalization for Transformers" (which takes L2Norm); Dehghani et al. 2023,
        "Scaling Vision Transformers to 22 Billion Parameters", section 2.
    """

    attention_fn: Callable = field(default=nnx.dot_product_attention, kw_only=True)


@dataclass(eq=False, repr=False)
class GatedRMSNorm(layer.GatedRMS, Host):
    """Gated RMS norm: RMS norm times the silu of a gate.

        y = x / sqrt(mean(|x|^2) + epsilon) * (scale_offset + scale) * silu(gate)

    Variables: Param scale, and bias with `use_bias=True`.

    Args:
        gate_first: gate, then normalize: rms_norm(x * silu(gate)), as Mamba2 does.
        scale_offset: 1.0 for a scale that is stored less 1.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import GatedRMSNorm
        >>> x, gate = jnp.array([[3.0, 3.0]]), jnp.array([[0.0, 50.0]])
        >>> y = GatedRMSNorm(2, epsilon=0.0, rngs=nnx.Rngs(0))(x, gate)
        >>> y.tolist()
        [[0.0, 50.0]]

    Source: Dao and Gu 2024, "Transformers are SSMs" (Mamba-2), section 7.
    """


@dataclass(eq=False, repr=False)
class AddNorm(nnx.Module):
    """Residual add and norm in one call.

        total = x + residual,   y = norm(total)

    Variables: those of the norm.

    Args:
        norm: any norm of one array.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import AddNorm, LayerNorm
        >>> norm = AddNorm(LayerNorm(2, epsilon=0.0, rngs=nnx.Rngs(0)))
        >>> y, total = norm(jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 2.0]]))
        >>> y.tolist(), total.tolist()
        ([[-1.0, 1.0]], [[1.0, 3.0]])

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 5.4.
    """

    norm: nnx.Module

    def __call__(self: Any, x, residual, **options):
        """Add, then normalize.

        Args:
            x, residual: arrays of one shape.
            **options: what else the norm takes.

        Returns:
            y, and the total that the next residual adds to.
        """
        with naming(self):
            return add_norm(x, residual, self.norm, **options)


@dataclass(eq=False, repr=False)
class PositionalNorm(layer.Positional, BareHost):
    """Positional norm (PONO): every place over its channels, with the statistics as an output.

        y = (x - mean) / sqrt(var + epsilon),   mean and var over c

    Variables: none.

    Args:
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import PositionalNorm
        >>> x = jnp.array([[[1.0, 3.0]]])
        >>> y, moments = PositionalNorm(epsilon=0.0)(x)
        >>> y.tolist(), moments.mean.tolist(), moments.std.tolist()
        ([[[-1.0, 1.0]]], [[2.0]], [[1.0]])

    Source: Li et al. 2019, "Positional Normalization", equations 1 and 2.
    """
