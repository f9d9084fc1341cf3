"""Every norm of `jaxnorm.norms()` where `jaxnorm compare` puts one: between a convolution and its activation.

Those that need more than an array get it from the net itself: a condition from the mean of the picture's rows, a class
from its brightness, a style from the next picture, a gate from a dense layer, a reference from the batch. Norms of
weights wrap the convolution; QK norm is in an attention between all places.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxnorm as jn
from jaxnorm import linen

GROUPS = 4
MOMENTUM = 0.9  # at the default 0.99 the running statistics would lag by half of a short run
WEIGHTS: dict[str, Callable[..., Any]] = {
    "weight": linen.WeightNorm,
    "weight-standardization": linen.WeightStandardization,
    "scaled-weight-standardization": linen.ScaledWeightStandardization,
}
STATEFUL_WEIGHTS: dict[str, Callable[..., Any]] = {
    "spectral": linen.SpectralNorm,
    "cross-iteration-batch": lambda layer, **kw: linen.CrossIterationBatchNorm(layer, over="... devices?", **kw),
}
BATCH: dict[str, Callable[..., Any]] = {
    "batch": linen.BatchNorm,
    "ghost-batch": lambda **kw: linen.GhostBatchNorm(num_ghosts=2, **kw),
    "batch-renorm": lambda **kw: linen.BatchRenorm(r_max=3.0, d_max=5.0, **kw),
    "streaming": linen.StreamingNorm,
    "evonorm-b0": linen.EvoNormB0,
    "switchable": linen.SwitchableNorm,
    "batch-channel": lambda **kw: linen.BatchChannelNorm(num_groups=GROUPS, **kw),
    "decorrelated-batch": lambda **kw: linen.DecorrelatedBatchNorm(group_size=GROUPS, **{"epsilon": 1e-3, **kw}),
    "iterative": lambda **kw: linen.IterativeNorm(group_size=GROUPS, **{"epsilon": 1e-3, **kw}),
}
PLAIN: dict[str, Callable[..., Any]] = {
    "layer": linen.LayerNorm,
    "rms": linen.RMSNorm,
    "instance": linen.InstanceNorm,
    "group": lambda **kw: linen.GroupNorm(num_groups=GROUPS, **kw),
    "partial-rms": lambda **kw: linen.PartialRMSNorm(fraction=0.5, **kw),  # of 16 channels
    "scale": linen.ScaleNorm,
    "l2": linen.L2Norm,
    "dynamic-tanh": linen.DynamicTanh,
    "dynamic-erf": linen.DynamicErf,
    "global-response": linen.GlobalResponseNorm,
    "filter-response": linen.FilterResponseNorm,
    "local-response": linen.LocalResponseNorm,
    "evonorm-s0": lambda **kw: linen.EvoNormS0(num_groups=GROUPS, **kw),
}


def keeps_bias(norm: str) -> bool:
    """All convolutions keep their bias but one: cross-iteration batch norm takes the layer apart by its kernel."""
    return norm != "cross-iteration-batch"


@dataclasses.dataclass(frozen=True)
class Block:
    """A convolution and the norm behind it, or around it. Called in a compact method: what it makes is the net's."""

    norm: str
    train: bool
    local: bool
    name: str

    def __call__(self, convolution: nn.Module, x: jax.Array, picture: jax.Array) -> jax.Array:
        if self.norm in WEIGHTS:
            z = WEIGHTS[self.norm](convolution, name=self.name)(x)
            return linen.GroupNorm(num_groups=GROUPS)(z) if self.norm == "weight-standardization" else z  # as its paper
        if self.norm in STATEFUL_WEIGHTS:
            return STATEFUL_WEIGHTS[self.norm](convolution, use_running_average=not self.train, name=self.name)(x)
        z = convolution(x)
        if self.norm == "none":
            return z
        if self.norm in PLAIN:
            return PLAIN[self.norm](name=self.name)(z)
        if self.norm in BATCH:
            return BATCH[self.norm](**self.running)(z)
        return self.conditional(z, x, picture)

    @property
    def over(self) -> str:
        """The question mark: there are devices in training only, not at initialisation or in a notebook."""
        return "n h w" if self.local else "n h w devices?"

    @property
    def running(self) -> dict[str, Any]:
        settings = {"layout": "n h w c", "over": self.over, "momentum": MOMENTUM}
        return {"use_running_average": not self.train, "name": self.name, **settings}

    def conditional(self, z: jax.Array, before: jax.Array, picture: jax.Array) -> jax.Array:
        """Those that need more than z: `before` is what the convolution was given, `picture` what the net was."""
        name, c = self.name, z.shape[-1]
        condition = jnp.reshape(picture.mean(1), (len(picture), -1))
        match self.norm:
            case "split-batch":
                return linen.SplitBatchNorm(**self.running)(z, "clean")
            case "frozen-batch":
                return linen.FrozenBatchNorm(name=name)(z)
            case "virtual-batch":
                reference = jax.tree.map(jax.lax.stop_gradient, jn.moments(z, "n h w c", self.over))
                return linen.VirtualBatchNorm(name=name)(z, reference)
            case "adaptive-instance":
                return linen.AdaptiveInstanceNorm(name=name)(z, jnp.roll(z, 1, 0))
            case "adaptive-layer":
                y, gate = linen.AdaptiveLayerNorm(name=name)(z, condition)
                return y + jn.film(y, gate)
            case "film":
                return linen.FiLM(name=name)(z, condition)
            case "conditional-batch":
                labels = jnp.digitize(picture.mean((1, 2, 3)), jnp.linspace(0, 1, 5)[1:-1]).astype(jnp.int32)
                return linen.ConditionalBatchNorm(num_classes=4, **self.running)(z, labels)
            case "spade":
                small = jax.image.resize(picture, (*z.shape[:3], picture.shape[-1]), "linear")
                scale, bias = jnp.split(nn.Dense(2 * c, name=f"{name}_map")(small), 2, -1)
                return linen.SPADE(**self.running)(z, scale, bias)
            case "qk":
                attend = nn.MultiHeadDotProductAttention(2, attention_fn=linen.QKNorm(), name=name)
                return z + jnp.reshape(attend(jnp.reshape(z, (len(z), -1, c))), z.shape)
            case "gated-rms":
                return linen.GatedRMSNorm(name=name)(z, nn.Dense(c, name=f"{name}_gate")(z))
            case "add-and-norm":
                shortcut = before if before.shape == z.shape else jnp.zeros_like(z)
                return linen.AddNorm(linen.LayerNorm(), name=name)(z, shortcut)[0]
            case "positional":
                return linen.PositionalNorm(name=name)(z)[0]
        raise ValueError(f"unknown norm {self.norm!r}")
