"""The net that `jaxnorm compare` trains: convolutions, each with a norm given by name and an activation."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnorm.linen import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"sigmoid": nn.sigmoid, "relu": nn.relu}
WIDTH = 16


class Classifier(nn.Module):
    """[conv 3x3 -> norm -> activation] x depth -> dense.

    Every second convolution halves the picture until it is two pixels wide. The convolutions keep their bias whatever
    the norm, and their weights depend on the seed alone, so that nets differ in nothing but the norm.
    """

    norm: str
    depth: int
    activation: str
    classes: int
    local_stats: bool = False

    @property
    def local(self) -> bool:
        """Whether the devices' running statistics differ."""
        return self.local_stats and self.norm == "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits (n, classes) of pictures (n, h, w, c). The activations' inputs are sown into `intermediates`."""
        for i in range(self.depth):
            stride = 2 if i % 2 == 0 and min(x.shape[1:3]) > 2 else 1
            x = nn.Conv(WIDTH, (3, 3), stride, name=f"conv_{i}")(x)
            x = self.normalized(x, train, f"norm_{i}")
            self.sow("intermediates", f"pre_activation_{i}", x)
            x = ACTIVATIONS[self.activation](x)
        return nn.Dense(self.classes, name="logits")(jnp.reshape(x, (x.shape[0], -1)))

    def normalized(self, x: jax.Array, train: bool, name: str) -> jax.Array:
        match self.norm:
            case "batch":
                # The question mark: there are devices in training only, not at initialisation or in a notebook.
                over = "..." if self.local_stats else "... devices?"
                # Momentum 0.9: at the default 0.99 the running statistics would lag by half of a short run.
                norm = BatchNorm(not train, over=over, momentum=0.9, name=name)
            case "layer":
                norm = LayerNorm(name=name)
            case "instance":
                norm = InstanceNorm(name=name)
            case "group":
                norm = GroupNorm(num_groups=4, name=name)
            case "rms":
                norm = RMSNorm(name=name)
            case "none":
                return x
            case unknown:
                raise ValueError(f"unknown norm {unknown!r}")
        return norm(x)
