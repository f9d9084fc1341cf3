"""Layers and nets with batch norms for the tests of `jaxnorm.tools.fold`, and what a folded one must be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import linen as jn_linen
from jaxnorm.tools.fold import fold

RNG = np.random.default_rng(0)
NORMS = {"flax": nn.BatchNorm, "jaxnorm": jn_linen.BatchNorm}


def filled(tree):
    """The tree with statistics and parameters that show whatever is wrong: none is 0 or 1."""

    def fill(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        words = jax.tree_util.keystr(path)
        value = RNG.normal(size=leaf.shape)
        if "var" in words or "scale" in words:
            value = RNG.uniform(0.3, 2.0, leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def close(a, b, tol=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= tol * np.abs(b).max()


class Pair(nn.Module):
    """[layer, norm, relu] or [relu, norm, layer]; `norm` None is the model once folded."""

    layer: nn.Module
    norm: nn.Module | None
    norm_first: bool = False

    @nn.compact
    def __call__(self, x):
        norm = self.norm or (lambda x: x)
        return self.layer(norm(nn.relu(x))) if self.norm_first else nn.relu(norm(self.layer(x)))


def layer(kind, use_bias, **more):
    kinds = {
        "dense": lambda: nn.Dense(6, use_bias=use_bias, **more),
        "dense over two": lambda: nn.DenseGeneral((2, 3), use_bias=use_bias, **more),
        "conv 1d": lambda: nn.Conv(6, (3,), padding="VALID", use_bias=use_bias, **more),
        "conv": lambda: nn.Conv(6, (3, 2), strides=(2, 1), padding="VALID", use_bias=use_bias, **more),
        "grouped": lambda: nn.Conv(6, (3, 3), padding="VALID", feature_group_count=2, use_bias=use_bias, **more),
        "depthwise": lambda: nn.Conv(8, (3, 3), padding="VALID", feature_group_count=4, use_bias=use_bias, **more),
        "padded": lambda: nn.Conv(6, (3, 3), use_bias=use_bias, **more),
        "transposed": lambda: nn.ConvTranspose(6, (3, 3), strides=(2, 2), use_bias=use_bias, **more),
        "transposed kernel": lambda: nn.ConvTranspose(
            6, (3, 2), strides=(2, 2), transpose_kernel=True, use_bias=use_bias, **more
        ),
    }
    return kinds[kind]()


def inputs_for(kind):
    return normal(2, 7, 4) if kind in ("dense", "conv 1d", "dense over two") else normal(2, 7, 6, 4)


BEFORE = ["dense", "conv 1d", "conv", "grouped", "depthwise", "padded", "transposed", "transposed kernel"]


def check(model, without, x, into, stands):
    """Fold the one norm of `model`: `without` it gives the same, from a tree that is like its own."""
    variables = filled(model.init(jax.random.key(0), x))
    folded, report = fold(model.apply, variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert report.to_dict() == {"norm": ["norm"], "into": [into], "the layer stands": [stands], "why not": [None]}
    assert jax.tree.structure(folded) == jax.tree.structure(without.init(jax.random.key(0), x))
    close(without.apply(folded, x), model.apply(variables, x))
    return variables, folded


def bn(p, x):
    shape = (1,) * (x.ndim - 1) + (-1,)
    mean, var, scale, bias = (p[name].reshape(shape) for name in ("mean", "var", "scale", "bias"))
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


def conv(kernel, x, padding: str | list[tuple[int, int]] = "VALID", **more):
    return jax.lax.conv_general_dilated(x, kernel, (1,), padding, dimension_numbers=("NWC", "WIO", "NWC"), **more)


def cast(z, dtype):
    return z.astype(dtype).astype(jnp.float32)


class Residual(nn.Module):
    """Expand, depthwise, project, add: the block of MobileNetV2, with wrappers, scopes and every norm foldable."""

    norm: type | None

    @nn.compact
    def __call__(self, x):
        def conv(x, features, kernel, name, groups=1, act=True):
            use_bias = self.norm is None
            x = nn.Conv(features, kernel, feature_group_count=groups, use_bias=use_bias, name=f"{name}_conv")(x)
            if self.norm is not None:
                x = self.norm(use_running_average=True, name=f"{name}_bn")(x)
            return nn.relu6(x) if act else x

        y = conv(x, 8, (1, 1), "expand")
        y = conv(y, 8, (3, 3), "depthwise", groups=8)
        return x + conv(y, 4, (1, 1), "project", act=False)


class Net(nn.Module):
    norm: type | None

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.remat(Residual)(self.norm)(x)
        return nn.Dense(3)(x.mean((1, 2)))
