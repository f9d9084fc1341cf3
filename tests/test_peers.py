"""Where other libraries are wrong: for each defect the right number from us, and that installed Flax still differs.

The numbers in the names are those of the list of defects in DESIGN's PEERS.md that concern the functions. The day a
Flax assertion fails, Flax has been mended: take the row out of the README's table.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxnorm as jn

RNG = np.random.default_rng(11)


def flax_batch_norm(x, mask=None, axis_name=None):
    """(y, batch_stats) of a training step of flax.linen.BatchNorm whose running statistics become the batch's."""
    features = x.shape[-1]
    variables = {
        "params": {"scale": jnp.ones(features), "bias": jnp.zeros(features)},
        "batch_stats": {"mean": jnp.zeros(features), "var": jnp.ones(features)},
    }
    module = nn.BatchNorm(use_running_average=False, momentum=0.0, axis_name=axis_name)
    y, new = module.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, new["batch_stats"]


def batch_norm(x, mask=None, over="n", **kw):
    return jn.batch_norm(x, jn.running_stats(c=x.shape[-1]), "n c", over, mask=mask, momentum=0.0, **kw)


def on_devices(function, *args):
    return jax.vmap(function, axis_name="devices")(*args)


# Two devices with four slots each. They hold 0 1 2 3 and 4: mean 10 / 5 = 2, var (4 + 1 + 0 + 1 + 4) / 5 = 2.
SHARDS = np.array([[0, 1, 2, 3], [4, 9, 9, 9]], np.float32)[..., None]
UNEVEN = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)[..., None]


def test_1_uneven_masks_across_devices():
    y, running = on_devices(lambda x, mask: batch_norm(x, mask, "n devices"), SHARDS, UNEVEN)
    np.testing.assert_allclose(running.mean, [[2.0], [2.0]], rtol=1e-7)
    np.testing.assert_allclose(running.var, [[2.0], [2.0]], rtol=1e-7)
    np.testing.assert_allclose(y, (SHARDS - 2) / np.sqrt(2 + 1e-5), rtol=1e-6)
    _, theirs = on_devices(lambda x, mask: flax_batch_norm(x, mask, "devices"), SHARDS, UNEVEN)
    assert theirs["mean"].tolist() == [[2.75], [2.75]]  # (1.5 + 4) / 2, the mean of the devices' means


def test_2_a_device_without_elements():
    mask = UNEVEN & (np.arange(2) == 0)[:, None, None]
    y, running = on_devices(lambda x, mask: batch_norm(x, mask, "n devices"), SHARDS, mask)
    np.testing.assert_allclose(running.mean, [[1.5], [1.5]], rtol=1e-7)
    np.testing.assert_allclose(running.var, [[1.25], [1.25]], rtol=1e-7)
    np.testing.assert_allclose(y, (SHARDS - 1.5) / np.sqrt(1.25 + 1e-5), rtol=1e-6)
    y, theirs = on_devices(lambda x, mask: flax_batch_norm(x, mask, "devices"), SHARDS, mask)
    assert np.isnan(y).all()
    assert np.isnan(theirs["mean"]).all()
    assert np.isnan(theirs["var"]).all()


def test_3_variance_at_a_large_mean():
    x = RNG.normal(1e4, 1.0, (256, 4)).astype(np.float32)
    wide = x.astype(float)
    y, running = batch_norm(x)
    np.testing.assert_allclose(running.var, wide.var(0), rtol=1e-6)
    np.testing.assert_allclose(y, (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5), rtol=2e-6, atol=2e-6)
    y, theirs = flax_batch_norm(x)
    assert (abs(theirs["var"] / wide.var(0) - 1) > 0.9).any()
    assert np.abs(y).max() > 100

    x = RNG.normal(1e3, 1.0, (32, 64)).astype(np.float32)
    wide = x.astype(float)
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(jn.layer_norm(x), expected, rtol=2e-6, atol=2e-6)
    for theirs in nn.LayerNorm().init_with_output(jax.random.key(0), x)[0], jax.nn.standardize(x, epsilon=1e-6):
        assert np.abs(theirs - expected).max() > 0.1


def test_4_variance_below_the_rounding_of_its_mean():
    # std 1e-3 at mean 100: E[x^2] - E[x]^2 has no digit left and is negative as often as not
    x = RNG.normal(100.0, 1e-3, (64, 32)).astype(np.float32)
    wide = x.astype(float)
    y, running = batch_norm(x, epsilon=1e-10)
    np.testing.assert_allclose(running.var, wide.var(0), rtol=1e-6)
    np.testing.assert_allclose(y, (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-10), rtol=2e-6, atol=2e-6)
    raw = np.mean(x * x, 0, dtype=np.float32) - np.mean(x, 0, dtype=np.float32) ** 2
    assert (raw < 0).any()  # what an unclipped square root turns into NaN
    _, theirs = flax_batch_norm(x)
    assert (abs(theirs["var"] / wide.var(0) - 1) > 0.9).any()  # Flax clips it to 0 instead
    # the statistics of float16 do not overflow, the running ones do not round to bfloat16
    large = jnp.full((4, 1), 60000.0, jnp.float16)
    assert jn.moments(large, "n c", "n").mean == 60000.0
    assert batch_norm(large)[0].tolist() == [[0.0]] * 4
    assert batch_norm(x.astype(jnp.bfloat16))[1].mean.dtype == jnp.float32


def test_6_replicated_statistics_are_the_same_everywhere():
    x = np.arange(8.0, dtype=np.float32)[:, None]
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))

    def everywhere(function, check):
        specs = {"in_specs": PartitionSpec("devices"), "out_specs": PartitionSpec(), "check_vma": check}
        result = jax.jit(jax.shard_map(function, mesh=mesh, **specs))(x)
        return [np.asarray(shard.data).tolist() for shard in result.addressable_shards]

    for check in True, False:
        assert everywhere(lambda x: batch_norm(x, over="n devices")[1].mean, check) == [[3.5]] * 4
    with pytest.raises(ValueError, match="out_specs"):  # not synced and said to be replicated: JAX can tell
        everywhere(lambda x: batch_norm(x)[1].mean, check=True)
    assert everywhere(lambda x: flax_batch_norm(x)[1]["mean"], check=False) == [[0.5], [2.5], [4.5], [6.5]]


def test_8_nan_in_masked_rows():
    x, mask = np.array([[1, 2], [3, 5], [np.nan, np.nan]], np.float32), np.array([[True], [True], [False]])
    cotangent = np.arange(6, dtype=np.float32).reshape(3, 2)

    def loss(norm):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.where(mask, norm(x, mask)[0] * cotangent, 0)))

    value, gradient = loss(batch_norm)(x)
    # Two rows: xhat = +-h / sqrt(h^2 + eps) with h = 1 and 1.5, so the loss is 2 xhat per channel and
    # d xhat / dh = eps / (h^2 + eps)^1.5; each row moves h by a half.
    h = np.array([1.0, 1.5])
    np.testing.assert_allclose(value, np.sum(2 * h / np.sqrt(h**2 + 1e-5)), rtol=1e-6)
    slope = 1e-5 / (h**2 + 1e-5) ** 1.5
    np.testing.assert_allclose(gradient, [-slope, slope, [0, 0]], rtol=0, atol=1e-6)
    value, gradient = loss(flax_batch_norm)(x)
    assert np.isfinite(value)
    assert np.isnan(gradient).all()


def test_9_everything_masked():
    x, nothing = np.ones((3, 1), np.float32), np.zeros((3, 1), bool)
    y, running = batch_norm(x, nothing)
    assert np.isfinite(y).all()
    jax.tree.map(np.testing.assert_array_equal, running, jn.running_stats(c=1))
    _, theirs = flax_batch_norm(x, nothing)
    assert np.isnan(theirs["mean"]).all()
    assert np.isnan(theirs["var"]).all()


def test_14_a_float_mask():
    x, weights = np.array([[0], [1], [2]], np.float32), np.array([[0.5], [0.25], [0.25]], np.float32)
    _, running = batch_norm(x, weights=weights)
    # mean 0.25 + 0.5, var 0.5 * 0.75^2 + 0.25 * 0.25^2 + 0.25 * 1.25^2
    assert running.mean.tolist() == [0.75]
    assert running.var.tolist() == [0.6875]
    with pytest.raises(jn.LayoutError, match="weights="):
        batch_norm(x, mask=weights)
    assert flax_batch_norm(x, weights)[1]["mean"].tolist() == [1.0]  # every weight became True


def test_18_a_training_batch_of_one():
    x = np.array([[0], [1], [2]], np.float32)
    # The variance of one element is 0: y would be the bias, whatever x is, and the running variance pulled towards 0.
    with pytest.raises(ValueError, match="every statistic would be of one element, y bias and the running variance 0"):
        jn.batch_norm(x[:1] + 7, jn.running_stats(c=1), "n c", "n")
    # Under vmap every call has one element. Naming the mapped axis makes it a batch again: mean 1, var 2 / 3.
    y, running = on_devices(lambda x: batch_norm(x[None], over="n devices"), x)
    np.testing.assert_allclose(y[:, 0], (x - 1) / np.sqrt(2 / 3 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(running.var, [[2 / 3]] * 3, rtol=1e-6)
    y, theirs = on_devices(lambda x: flax_batch_norm(x[None]), x)
    assert not y.any()
    assert not theirs["var"].any()


def test_19_frames_of_a_video():
    x = RNG.normal(size=(2, 5, 3, 3, 4)).astype(np.float32)
    x += 10 * np.arange(5, dtype=np.float32)[:, None, None, None]
    groups = x.astype(float).reshape(2, 5, 9, 2, 2)
    mean, var = groups.mean((2, 4), keepdims=True), groups.var((2, 4), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    y, _ = jn.standardize(x, "n t h w (g k)", "h w k", features="(g k)", epsilon=1e-6, sizes={"g": 2})
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)
    theirs = nn.GroupNorm(num_groups=2).init_with_output(jax.random.key(0), x)[0]
    assert np.abs(theirs - expected).max() > 1


def bytes_kept(norm, x, steps=3):
    """Bytes for each element of x that a step of a scan keeps for the backward pass, in arrays of the size of x."""
    scan = lambda x: jax.lax.scan(lambda carry, _: (norm(carry), None), x, None, length=steps)[0]  # noqa: E731
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(scan, x)[1], x))
    return sum(a.size * a.dtype.itemsize for a in kept if a.size >= steps * x.size) / (steps * x.size)


def test_20_bytes_kept_for_the_backward_pass():
    x, ones = jnp.ones((8, 6, 16), jnp.bfloat16), jnp.ones(16)
    running = jn.running_stats(c=16)
    ours = {
        "batch": lambda x: jn.batch_norm(x, running, scale=ones, bias=ones)[0],
        "layer": lambda x: jn.layer_norm(x, scale=ones, bias=ones),
        "rms": lambda x: jn.rms_norm(x, scale=ones, bias=ones),
        "instance": lambda x: jn.instance_norm(x, scale=ones, bias=ones),
        "group": lambda x: jn.group_norm(x, 4, scale=ones, bias=ones),
    }
    assert {name: bytes_kept(norm, x) for name, norm in ours.items()} == dict.fromkeys(ours, 2.0)  # x, and nothing else
    params = {"params": {"scale": ones, "bias": ones}, "batch_stats": {"mean": ones, "var": ones}}
    theirs = {
        "batch": lambda x: nn.BatchNorm(False, dtype=x.dtype).apply(params, x, mutable=["batch_stats"])[0],
        "layer": lambda x: nn.LayerNorm(dtype=x.dtype).apply(params, x),
        "group": lambda x: nn.GroupNorm(4, dtype=x.dtype).apply(params, x),
    }
    with jax.numpy_dtype_promotion("standard"):  # Flax mixes bfloat16 and float32
        kept = {name: bytes_kept(norm, x) for name, norm in theirs.items()}
    assert kept["batch"] >= 8
    assert kept["layer"] >= 12
    assert kept["group"] >= 8


def test_21_a_name_without_a_map():
    x = np.ones((3, 1), np.float32)
    with pytest.raises(jn.AxisError, match="devices") as error:
        batch_norm(x, over="n devices")
    for part in "batch_norm", '"n c"', "(3, 1)", "devices?":  # the call, the layout, the shape, what to do
        assert part in str(error.value)
    np.testing.assert_array_equal(batch_norm(x, over="n devices?")[0], batch_norm(x)[0])
    with pytest.raises(NameError, match="unbound axis name") as error:
        flax_batch_norm(x, axis_name="devices")
    assert "BatchNorm" not in str(error.value)
