"""The family of layer norm, as flax.linen modules: see jaxnorm.linen."""

import inspect
from collections.abc import Callable

import flax.linen as nn

from jaxnorm.family import layer
from jaxnorm.linen.host import Host
from jaxnorm.modules import naming
from jaxnorm.norms.layer import add_norm


class PartialRMSNorm(layer.PartialRMS, Host):
    """Partial RMS norm (pRMSNorm): the root mean square of the first few features for all of them.

        y = x / sqrt(mean(|x_i|^2, i < ceil(fraction c)) + epsilon) * (scale_offset + scale) + bias

    Variables: params/scale, and bias with `use_bias=True`.

    Args:
        fraction: of the features, more than 0 and up to 1, which is RMS norm.
        scale_offset: 1.0 for a scale that is stored less 1.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import PartialRMSNorm
        >>> x = jnp.array([[2.0, 4.0, 6.0, 8.0]])
        >>> norm = PartialRMSNorm(fraction=0.25, epsilon=0.0)
        >>> y, _ = norm.init_with_output(jax.random.key(0), x)
        >>> y.tolist()
        [[1.0, 2.0, 3.0, 4.0]]

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 4.1 (6.25 % by default).
    """


class ScaleNorm(layer.Scale, Host):
    """ScaleNorm: every vector to one length, which is learned.

        y = scale * x / sqrt(sum(|x|^2) + epsilon)

    Variables: params/scale, one number.

    Args:
        scale_init: None for the square root of the number of features.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import ScaleNorm
        >>> x = jnp.array([[3.0, 4.0, 0.0, 0.0]])
        >>> norm = ScaleNorm(epsilon=0.0)
        >>> y, _ = norm.init_with_output(jax.random.key(0), x)
        >>> (y * 5).tolist()
        [[6.0, 8.0, 0.0, 0.0]]

    Source: Nguyen and Salazar 2019, "Transformers without Tears", equation 4.
    """


class L2Norm(layer.L2, Host):
    """Unit (L2) norm: every vector to length 1, then scaled.

        y = x / sqrt(sum(|x|^2) + epsilon) * scale + bias

    Variables: params/scale, and bias with `use_bias=True`.

    Args:
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import L2Norm
        >>> x = jnp.array([[3.0, 4.0]])
        >>> norm = L2Norm()
        >>> y, _ = norm.init_with_output(jax.random.key(0), x)
        >>> print((5 * y).round())
        [[3. 4.]]

    Source: Ranjan, Castillo, Chellappa 2017, "L2-constrained Softmax Loss", equation 3.
    """


class QKNorm(layer.QK, Host):
    """QK norm: queries and keys normalized before their product, so that attention's logits stay in bounds.

        query / sqrt(mean(|query|^2) + epsilon) * query_scale,   key likewise, for every head

    Variables: params/{query_scale, key_scale}.

    Args:
        attention_fn: what attends. So the module is the attention_fn of Flax's MultiHeadDotProductAttention.
        center: subtract the mean first: layer norm, as in ViT-22B.
        use_scale, scale_init: of both scales.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from jaxnorm.linen import QKNorm
        >>> query, key = jnp.array([[1.0, 7.0]]), jnp.array([[3.0, 3.0]])
        >>> (query, key), _ = QKNorm(epsilon=0.0).init_with_output(jax.random.key(0), query, key)
        >>> (query * 5).tolist(), key.tolist()
        ([[1.0, 7.0]], [[1.0, 1.0]])

        >>> attention = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=QKNorm())
        >>> x = jax.random.normal(jax.random.key(1), (4, 5, 8))
        >>> y, variables = attention.init_with_output(jax.random.key(0), x, mask=nn.make_causal_mask(x[..., 0]))
        >>> y.shape, variables["params"]["attention_fn"]["key_scale"].shape
        ((4, 5, 8), (4,))

    Source: Henry et al. 2020, "Query-Key Normalization for Transformers" (which takes L2Norm); Dehghani et al. 2023,
        "Scaling Vision Transformers to 22 Billion Parameters", section 2.
    """

    attention_fn: Callable = nn.dot_product_attention

    @nn.compact
    def __call__(self, query, key, value=None, *args, **kwargs):
        """See jaxnorm.family.layer.QK."""
        # Flax names every option, of which a function of one's own may know few: Flax itself leaves the others out
        known = inspect.signature(self.attention_fn).parameters
        if not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in known.values()):
            kwargs = {name: option for name, option in kwargs.items() if name in known}
        return super().__call__(query, key, value, *args, **kwargs)

    # Flax passes those options that the signature names. Of (*args, **kwargs) it would drop the mask.
    __call__.__signature__ = inspect.Signature(
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *inspect.signature(nn.dot_product_attention).parameters.values(),
        ]
    )


class GatedRMSNorm(layer.GatedRMS, Host):
    """Gated RMS norm: RMS norm times the silu of a gate.

        y = x / sqrt(mean(|x|^2) + epsilon) * (scale_offset + scale) * silu(gate)

    Variables: params/scale, and bias with `use_bias=True`.

    Args:
        gate_first: gate, then normalize: rms_norm(x * silu(gate)), as Mamba2 does.
        scale_offset: 1.0 for a scale that is stored less 1.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import GatedRMSNorm
        >>> x, gate = jnp.array([[3.0, 3.0]]), jnp.array([[0.0, 50.0]])
        >>> norm = GatedRMSNorm(epsilon=0.0)
        >>> y, _ = norm.init_with_output(jax.random.key(0), x, gate)
        >>> y.tolist()
        [[0.0, 50.0]]

    Source: Dao and Gu 2024, "Transformers are SSMs" (Mamba-2), section 7.
    """


class AddNorm(nn.Module):
    """Residual add and norm in one call.

        total = x + residual,   y = norm(total)

    Variables: those of the norm.

    Args:
        norm: any norm of one array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import AddNorm, LayerNorm
        >>> x, residual = jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 2.0]])
        >>> (y, total), _ = AddNorm(LayerNorm(epsilon=0.0)).init_with_output(jax.random.key(0), x, residual)
        >>> y.tolist(), total.tolist()
        ([[-1.0, 1.0]], [[1.0, 3.0]])

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 5.4.
    """

    norm: nn.Module

    @nn.compact
    def __call__(self, x, residual, **options):
        """Add, then normalize.

        Args:
            x, residual: arrays of one shape.
            **options: what else the norm takes.

        Returns:
            y, and the total that the next residual adds to.
        """
        with naming(self, self.path):
            return add_norm(x, residual, self.norm, **options)


class PositionalNorm(layer.Positional, Host):
    """Positional norm (PONO): every place over its channels, with the statistics as an output.

        y = (x - mean) / sqrt(var + epsilon),   mean and var over c

    Variables: none.

    Args:
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import PositionalNorm
        >>> x = jnp.array([[[1.0, 3.0]]])
        >>> norm = PositionalNorm(epsilon=0.0)
        >>> (y, moments), _ = norm.init_with_output(jax.random.key(0), x)
        >>> y.tolist(), moments.mean.tolist(), moments.std.tolist()
        ([[[-1.0, 1.0]]], [[2.0]], [[1.0]])

    Source: Li et al. 2019, "Positional Normalization", equations 1 and 2.
    """
