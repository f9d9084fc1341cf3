"""Models with norms to freeze, for test_freeze.py and test_stored.py."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(1.0, 2.0, (8, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def as_users_run():
    """optax's schedules and flax's Dense promote."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Block(nn.Module):
    norm: type = jaxnorm.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        return self.norm(name="bn", momentum=0.5)(nn.Dense(4, name="dense")(x), use_running_average=not train)


class Net(nn.Module):
    norm: type = jaxnorm.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        x = Block(self.norm, name="a")(x, train)
        return nn.LayerNorm(name="ln")(Block(self.norm, name="b")(nn.relu(x), train))


class Model(nnx.Module):
    def __init__(self, norm=jaxnorm.nnx.BatchNorm, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.bns = nnx.List([norm(4, rngs=rngs, momentum=0.5) for norm in (norm, norm)])

    def __call__(self, x, train=True):
        for bn in self.bns:
            x = bn(self.dense(x), use_running_average=not train)
        return x


def bits(tree):
    return [(np.asarray(z).dtype, np.asarray(z).tobytes()) for z in jax.tree.leaves(tree)]


@functools.cache
def variables(norm=jaxnorm.linen.BatchNorm):
    """With scales and biases that are no round numbers, and a zero with a sign."""
    v = Net(norm).init(KEY, X)
    noise = np.random.default_rng(1).normal(size=4).astype(np.float32)
    noise[0] = -0.0
    return jax.tree.map(lambda z: z + jnp.asarray(noise) * 0.1 if z.shape == (4,) else z, v) | {
        "params": jax.tree.map(lambda z: jnp.asarray(noise) if z.shape == (4,) else z, v["params"])
    }
