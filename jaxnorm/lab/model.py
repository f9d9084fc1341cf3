"""The net that `jaxnorm compare` trains: convolutions, each with a norm given by name and an activation."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnorm.lab import blocks

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
        picture = x
        for i in range(self.depth):
            stride = 2 if i % 2 == 0 and min(x.shape[1:3]) > 2 else 1
            convolution = nn.Conv(WIDTH, (3, 3), stride, use_bias=blocks.keeps_bias(self.norm), name=f"conv_{i}")
            block = blocks.Block(self.norm, train, self.local, f"norm_{i}")
            x = block(convolution, x, picture)
            self.sow("intermediates", f"pre_activation_{i}", x)
            x = ACTIVATIONS[self.activation](x)
        return nn.Dense(self.classes, name="logits")(jnp.reshape(x, (x.shape[0], -1)))
