"""The norms that a peer has too: the same numbers where it is right, and where its defects lie (PEERS.md)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen

RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, (4, 6, 5, 8)).astype(np.float32)  # n h w c
KERNEL = RNG.normal(size=(3, 3, 4, 8)).astype(np.float32)  # h w i o
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), **(tolerance or CLOSE))


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    return pytest.importorskip("keras", reason="keras is not installed")


@pytest.fixture
def haiku():
    return pytest.importorskip("haiku", reason="dm-haiku is not installed")


@pytest.fixture
def relaxed():
    """Peers promote dtypes and ranks without a word."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# --- torch


def test_torch_local_response_norm(torch):
    peer = torch.nn.LocalResponseNorm(5, alpha=0.3, beta=0.7, k=1.5)
    expected = peer(torch.tensor(X.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    close(jn.local_response_norm(X, 5, "n h w c", alpha=0.3, power=0.7, offset=1.5), expected)
    first = jn.local_response_norm(X.transpose(0, 3, 1, 2), 5, "n c h w", alpha=0.3, power=0.7, offset=1.5)
    close(np.asarray(first).transpose(0, 2, 3, 1), expected)


def test_torch_normalize(torch):
    close(jn.l2_norm(X, "n h w c"), torch.nn.functional.normalize(torch.tensor(X), dim=-1).numpy())


def test_torch_rms_norm(torch):
    peer = torch.nn.RMSNorm(8, eps=1e-6)
    close(jn.rms_norm(X, "n h w c"), peer(torch.tensor(X)).detach().numpy())


def test_torch_weight_norm_and_its_gradients(torch):
    """Outputs first there: the layout says so."""
    v = torch.tensor(KERNEL.transpose(3, 2, 0, 1), requires_grad=True)
    g = torch.tensor(RNG.uniform(0.5, 1.5, (8, 1, 1, 1)).astype(np.float32), requires_grad=True)
    w = torch._weight_norm(v, g, 0)
    cotangent = RNG.normal(size=w.shape).astype(np.float32)
    w.backward(torch.tensor(cotangent))
    norm = functools.partial(jn.weight_norm, layout="o i h w", over="i h w")
    ours, back = jax.vjp(lambda v, g: norm(v, scale=g), v.detach().numpy(), g.detach().numpy().reshape(-1))
    close(ours, w.detach().numpy())
    for found, wanted in zip(back(cotangent), (v.grad, g.grad.reshape(-1)), strict=True):
        close(found, wanted.numpy())


def test_torch_spectral_norm(torch):
    """The singular value after many steps: torch makes u of v before it makes v of u, so the first ones differ."""
    layer = torch.nn.Linear(6, 8, bias=False)
    weight = layer.weight.detach().numpy().copy()
    torch.nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=100)
    expected = layer.weight.detach().numpy()
    ours, state = jn.spectral_norm(weight, jn.spectral_state(jax.random.key(0), o=8), "o i", "i", num_steps=100)
    close(ours, expected, rtol=1e-4, atol=1e-5)
    close(state.sigma, np.linalg.svd(weight)[1][0], rtol=1e-4)


def test_torch_batch_norm_frozen(torch):
    peer = torch.nn.BatchNorm2d(8).eval()
    peer.running_mean.copy_(torch.tensor(RNG.normal(size=8)))
    peer.running_var.copy_(torch.tensor(RNG.uniform(0.5, 2.0, 8)))
    stats = [jnp.asarray(z.numpy()) for z in (peer.running_mean, peer.running_var)]
    running = jn.RunningStats(*stats, jnp.zeros((), jnp.int32), ("c",))
    expected = peer(torch.tensor(X.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    close(jn.frozen_batch_norm(X, running, "n h w c"), expected)


# --- Keras


def test_keras_unit_and_rms(keras, relaxed):
    close(jn.l2_norm(X, "n h w c"), keras.layers.UnitNormalization()(X))
    close(jn.rms_norm(X, "n h w c"), keras.layers.RMSNormalization(epsilon=1e-6)(X))


def test_keras_spectral_normalization(keras, relaxed):
    """The singular value after many steps: its first differ, because it starts from another vector."""
    layer = keras.layers.SpectralNormalization(keras.layers.Dense(8, use_bias=False), power_iterations=60)
    x = X[:, 0, 0]
    layer.build(x.shape)
    kernel = np.asarray(layer.layer.kernel)
    expected = np.asarray(layer(x, training=True))
    ours, _ = jn.spectral_norm(kernel, jn.spectral_state(jax.random.key(0), o=8), num_steps=200)
    close(x @ np.asarray(ours), expected, rtol=1e-3, atol=1e-3)


# --- Haiku


def test_haiku_spectral_norm(haiku, relaxed):
    kernel = KERNEL.reshape(-1, 8)

    def f(w):
        return haiku.SpectralNorm(n_steps=1)(w)

    transformed = haiku.without_apply_rng(haiku.transform_with_state(f))
    params, state = transformed.init(jax.random.key(0), kernel)
    u0 = next(iter(state.values()))["u0"]
    expected, new = transformed.apply(params, state, kernel)
    ours, after = jn.spectral_norm(kernel, jn.SpectralState(u0.reshape(-1), jnp.ones(()), ("o",)))
    close(ours, expected, rtol=1e-4, atol=1e-5)
    close(after.sigma, next(iter(new.values()))["sigma"].reshape(()), rtol=1e-4)


# --- Flax


def test_flax_spectral_norm(relaxed):
    layer = nn.SpectralNorm(nn.Dense(8, use_bias=False), error_on_non_matrix=False)
    x = X[:, 0, 0]
    variables = layer.init(jax.random.key(0), x, update_stats=False)
    kernel = np.asarray(next(iter(jax.tree.leaves(variables["params"]))))
    u = np.asarray(next(z for z in jax.tree.leaves(variables["batch_stats"]) if np.size(z) == 8))
    expected, _ = layer.apply(variables, x, update_stats=True, mutable=["batch_stats"])
    ours, _ = jn.spectral_norm(kernel, jn.SpectralState(jnp.asarray(u.reshape(-1)), jnp.ones(()), ("o",)))
    close(x @ np.asarray(ours), expected, rtol=1e-4, atol=1e-5)


def test_flax_weight_norm(relaxed):
    layer = nn.WeightNorm(nn.Dense(8, use_bias=False), use_scale=False)
    x = X[:, 0, 0]
    variables = layer.init(jax.random.key(0), x)
    kernel = np.asarray(next(z for z in jax.tree.leaves(variables["params"]) if z.ndim == 2))
    close(x @ np.asarray(jn.weight_norm(kernel)), layer.apply(variables, x), rtol=1e-4, atol=1e-5)


def test_peers_12_nnx_weight_norm_overwrites_the_kernel(relaxed):
    """nnx.WeightNorm changes the wrapped kernel, in evaluation too; a function of the kernel cannot."""
    dense = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    before = np.asarray(dense.kernel[...]).copy()
    jn.weight_norm(dense.kernel[...], scale=jnp.full(8, 3.0))
    np.testing.assert_array_equal(dense.kernel[...], before)
    wrapped = nnx.WeightNorm(dense, rngs=nnx.Rngs(0))
    wrapped(jnp.asarray(X[:, 0, 0]))
    assert not np.array_equal(dense.kernel[...], before), "fixed in this Flax: say so in PEERS.md"


def test_peers_13_group_norm_with_a_mask_of_one_channel():
    """Flax's docstring says broadcastable, and (..., 1) raises; ours broadcasts."""
    mask = RNG.random((4, 6, 5, 1)) < 0.7
    variables = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    y = linen.GroupNorm(num_groups=2).apply(variables, X, mask=mask)
    expected, _ = reference.standardize(X, "n h w (g k)", "h w k", sizes={"g": 2}, epsilon=1e-6, mask=mask)
    close(y, expected)
    with pytest.raises((TypeError, ValueError)), jax.numpy_rank_promotion("allow"):
        nn.GroupNorm(num_groups=2).apply(variables, X, mask=jnp.asarray(mask))


def test_peers_13_group_norm_of_a_sharded_channel():
    """Under Explicit axis types Flax's reshape raises where the channels are cut; by whole groups ours splits them."""
    mesh = jax.make_mesh((2,), ("c",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    expected, _ = reference.standardize(X, "n h w (g k)", "h w k", sizes={"g": 2}, epsilon=1e-6)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.NamedSharding(mesh, P(None, None, None, "c")))
        close(jax.jit(lambda x: jn.group_norm(x, 2, "n h w c"))(x), expected)
