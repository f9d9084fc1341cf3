"""MobileNetV2 as a Flax module, with names that one line maps on those of torch's published weights."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Of torch's state_dict: {} stands for the number of a block. The first block has no expansion.
NAMES = {
    "stem/conv": "features.0.0", "stem/norm": "features.0.1",
    "block_{}/expand/conv": "features.{}.conv.0.0", "block_{}/expand/norm": "features.{}.conv.0.1",
    "block_{}/depthwise/conv": "features.{}.conv.1.0", "block_{}/depthwise/norm": "features.{}.conv.1.1",
    "block_{}/project/conv": "features.{}.conv.2", "block_{}/project/norm": "features.{}.conv.3",
    "block_1/depthwise/conv": "features.1.conv.0.0", "block_1/depthwise/norm": "features.1.conv.0.1",
    "block_1/project/conv": "features.1.conv.1", "block_1/project/norm": "features.1.conv.2",
    "head/conv": "features.18.0", "head/norm": "features.18.1", "classifier": "classifier.1",
}  # fmt: skip
# channels, repeats, stride of the first, expansion: Sandler et al. 2018, table 2.
BLOCKS = [(16, 1, 1, 1), (24, 2, 2, 6), (32, 3, 2, 6), (64, 4, 2, 6), (96, 3, 1, 6), (160, 3, 2, 6), (320, 1, 1, 6)]
STEPS = [(c, stride if i == 0 else 1, t) for c, n, stride, t in BLOCKS for i in range(n)]
Norm = Callable[..., Any] | None


class ConvNorm(nn.Module):
    """Convolution, norm, and ReLU6 unless it is linear. Without a norm the convolution has a bias."""

    channels: int
    kernel: int
    norm: Norm
    stride: int = 1
    groups: int = 1
    linear: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = (self.kernel - 1) // 2
        x = nn.Conv(
            self.channels, (self.kernel, self.kernel), self.stride, pad, feature_group_count=self.groups,
            use_bias=self.norm is None, name="conv",
        )(x)  # fmt: skip
        x = x if self.norm is None else self.norm(name="norm")(x)
        return x if self.linear else nn.relu6(x)


class Block(nn.Module):
    """Inverted residual: widen, filter each channel, narrow."""

    channels: int
    stride: int
    expansion: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide, y = x.shape[-1] * self.expansion, x
        if self.expansion > 1:
            y = ConvNorm(wide, 1, self.norm, name="expand")(y)
        y = ConvNorm(wide, 3, self.norm, self.stride, groups=wide, name="depthwise")(y)
        y = ConvNorm(self.channels, 1, self.norm, linear=True, name="project")(y)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """Logits of ImageNet's 1,000 classes, or others, from pictures (n, h, w, 3), trained on 224 x 224.

    norm: called with a name, as `functools.partial(BatchNorm, use_running_average=True, epsilon=1e-5)`; None leaves
        the norms out and gives the convolutions a bias, which is what folding leaves.
    """

    norm: Norm
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ConvNorm(32, 3, self.norm, 2, name="stem")(x)
        for i, (channels, stride, expansion) in enumerate(STEPS, 1):
            x = Block(channels, stride, expansion, self.norm, name=f"block_{i}")(x)
        x = ConvNorm(1280, 1, self.norm, name="head")(x)
        return nn.Dense(self.classes, name="classifier")(jnp.mean(x, (1, 2)))


def picture(x: Any) -> np.ndarray:
    """Of ImageNet's form: the shorter side to 256, the middle 224 x 224, mean 0 and std 1 over ImageNet; (h, w, c)."""
    from skimage.transform import resize

    x = np.stack([x] * 3, -1) if x.ndim == 2 else x
    scale = 256 / min(x.shape[:2])
    x = resize(x, (round(x.shape[0] * scale), round(x.shape[1] * scale)), anti_aliasing=True)
    top, left = ((size - 224) // 2 for size in x.shape[:2])
    x = x[top : top + 224, left : left + 224]
    return ((x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype(np.float32)
