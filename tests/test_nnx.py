"""What only flax.nnx has: promote_dtype, modes and views, rng streams, metadata, array references, flat parameters."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from modules import CLOSE, HOSTS, KINDS, build, run, shapes

import jaxnorm as jn
import jaxnorm.nnx as jx

kinds = pytest.mark.parametrize("kind", KINDS)
X = np.random.default_rng(0).normal(1.0, 2.0, (3, 2, 4)).astype(np.float32)
OURS, THEIRS = HOSTS["nnx"]


# --- where Flax is wrong (PEERS.md)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_10_stored_statistics_keep_their_precision(dtype):
    """300 / sqrt(1e5) is 0.9487. Flax casts the variance to float16 first, where 1e5 is infinite."""
    stats = {"mean": np.zeros(1, np.float32), "var": np.full(1, 1e5, np.float32)}
    x = np.full((2, 1), 300.0, np.float32)
    y, after = run(build(OURS, "BatchNorm", 1, dtype=dtype), x, stats=stats, train=False)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, jnp.full((2, 1), 300 / math.sqrt(1e5 + 1e-5), dtype))
    jax.tree.map(np.testing.assert_array_equal, after, stats)
    linen, _ = run(build(HOSTS["linen"][0], "BatchNorm", dtype=dtype), x, stats=stats, train=False)
    np.testing.assert_array_equal(y, linen)
    theirs, _ = run(build(THEIRS, "BatchNorm", 1, dtype=dtype), x, stats=stats, train=False)
    assert theirs[0, 0] == 0 if dtype == jnp.float16 else theirs[0, 0] == y[0, 0]


@pytest.mark.parametrize("axes", [(2, 3), (-1,)])
def test_11_group_norm_that_leaves_axis_1(axes):
    """Flax repeats the statistics of the groups along axis 1, whatever that is."""
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 4)).astype(np.float32)
    over = "w k" if 2 in axes else "k"
    expected, _ = reference.standardize(x, "n h w (g k)", over, sizes={"g": 2}, epsilon=1e-6)
    y, theirs = (run(build(library, "GroupNorm", reduction_axes=axes), x)[0] for library in (OURS, THEIRS))
    np.testing.assert_allclose(y, expected, **CLOSE)
    assert abs(theirs - expected).max() > 0.5


def test_complex_state():
    """The mean of complex x is complex, as in linen. Flax's nnx keeps its real part, with a warning."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(6, 2)) + 1j * rng.normal(3.0, 2.0, (6, 2))).astype(np.complex64)
    y, stats = run(build(OURS, "BatchNorm", 2, momentum=0.0), x)
    expected, moments = reference.standardize(x, "n c", "n")
    np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_allclose(stats["mean"], moments.mean, **CLOSE)
    np.testing.assert_allclose(stats["var"], moments.var, **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, theirs = run(build(THEIRS, "BatchNorm", 2, momentum=0.0), x)
    np.testing.assert_allclose(theirs["mean"], moments.mean.real, **CLOSE)


# --- promote_dtype


@kinds
def test_promote_dtype_of_the_user(kind):
    """It is called once, with the tuple and the dtype that Flax passes, and what it returns is used."""
    calls = []

    def promote(values, dtype):
        calls.append([(None if v is None else (v.shape, v.dtype), dtype) for v in values])
        return tuple(None if v is None else v.astype(jnp.float32) * (1 if i else 2) for i, v in enumerate(values))

    settings = {"promote_dtype": promote, "dtype": jnp.float32, "epsilon": 0.1, "use_scale": False}
    x = jnp.asarray(X, jnp.bfloat16)
    (y, stats), (their_y, their_stats) = (run(build(library, kind, **settings), x) for library in (OURS, THEIRS))
    assert len(calls) == 2
    assert calls[0] == calls[1]
    assert len(calls[0]) == {"BatchNorm": 5, "RMSNorm": 2}.get(kind, 3)
    np.testing.assert_allclose(y, their_y, **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), stats, their_stats)
    doubled, _ = run(build(OURS, kind, dtype=jnp.float32, epsilon=0.1, use_scale=False), 2 * x)
    np.testing.assert_array_equal(y, doubled)


def test_promote_dtype_of_the_user_leaves_the_state_alone():
    def halve(values, dtype):
        return tuple(None if v is None else v.astype(jnp.float16) for v in values)

    stats = {"mean": np.zeros(1, np.float32), "var": np.full(1, 1e5, np.float32)}
    x = np.full((2, 1), 300.0, np.float32)
    norm = build(OURS, "BatchNorm", 1, promote_dtype=halve)
    y, _ = run(norm, x, stats=stats, train=False)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, 300 / math.sqrt(1e5), rtol=1e-3)
    _, after = run(norm, x, stats=stats)
    assert shapes(after) == shapes(stats)


# --- modes and views


def test_modes_and_views():
    norm = jx.BatchNorm(4, rngs=nnx.Rngs(0))
    assert norm.use_running_average is False  # Flax's default here, unlike linen's
    norm.eval()
    np.testing.assert_allclose(norm(X), X / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert not norm.mean[...].any()
    viewed = nnx.view(norm, use_running_average=False)
    assert (viewed.use_running_average, norm.use_running_average) == (False, True)
    viewed(X)
    assert norm.mean[...].any()  # a view shares the state
    kept = norm.mean[...]
    norm.train()
    norm(X, True)  # the call decides
    np.testing.assert_array_equal(norm.mean[...], kept)
    norm(X)
    assert abs(norm.mean[...] - kept).max() > 0
    assert "use_running_average: bool | None = None" in nnx.view_info(norm)
    with pytest.raises(ValueError, match="use_running_average"):
        jx.BatchNorm(4, use_running_average=None, rngs=nnx.Rngs(0))(X)


def test_rms_norm_takes_its_mask_second():
    norm, mask = build(OURS, "RMSNorm"), X > 0
    np.testing.assert_array_equal(norm(X, mask), norm(X, mask=mask))
    np.testing.assert_allclose(norm(X, mask), build(THEIRS, "RMSNorm")(X, mask), **CLOSE)


# --- parameters and state


@kinds
def test_a_seed_gives_the_same_parameters(kind):
    """And leaves the streams of random numbers where Flax leaves them."""
    normal = nnx.initializers.normal()
    for use_scale in (True, False):
        settings = {"scale_init": normal, "use_scale": use_scale} | ({} if kind == "RMSNorm" else {"bias_init": normal})
        settings |= {"num_groups": 2} if kind == "GroupNorm" else {}
        rngs = [nnx.Rngs(7), nnx.Rngs(7)]
        ours, theirs = (
            nnx.to_pure_dict(nnx.state(getattr(library, kind)(4, rngs=stream, **settings), nnx.Param))
            for library, stream in zip((OURS, THEIRS), rngs, strict=True)
        )
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert set(ours) == ({"scale"} if use_scale else set()) | (set() if kind == "RMSNorm" else {"bias"})
        assert jax.random.key_data(rngs[0].params()).tolist() == jax.random.key_data(rngs[1].params()).tolist()


@kinds
def test_metadata(kind):
    metadata = {"scale_metadata": {"decay": False}} | ({} if kind == "RMSNorm" else {"bias_metadata": {"decay": True}})
    ours, theirs = (build(library, kind, **metadata) for library in (OURS, THEIRS))
    assert ours.scale.decay is theirs.scale.decay is False
    assert kind == "RMSNorm" or ours.bias.decay is True
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))


@kinds
def test_absent_parameters(kind):
    norm = build(OURS, kind, use_scale=False, **({} if kind == "RMSNorm" else {"use_bias": False}))
    assert norm.scale is None
    assert getattr(norm, "bias", None) is None
    assert not nnx.to_pure_dict(nnx.state(norm, nnx.Param))


def test_training_under_nnx_transforms():
    """Two steps through nnx.jit and nnx.grad: gradients and state as with Flax's own module."""
    found = []
    for library in (OURS, THEIRS):
        norm = build(library, "BatchNorm", momentum=0.5)

        @nnx.jit
        def step(norm, x):
            return nnx.grad(lambda norm, x: (norm(x) ** 3).sum())(norm, x)

        with jax.numpy_rank_promotion("allow"):
            gradient = [nnx.to_pure_dict(step(norm, X)) for _ in range(2)][-1]
        found.append((gradient, norm.mean[...], norm.var[...]))
    assert set(found[0][0]) == {"scale", "bias"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *found)
    moments = reference.moments(X, "n h c", "n h")
    np.testing.assert_allclose(found[0][1], 0.75 * moments.mean, **CLOSE)
    np.testing.assert_allclose(found[0][2], 0.25 + 0.75 * moments.var, **CLOSE)


def test_array_references():
    """State in jax references is updated in place, under jit and grad too: no gradient flows into it."""
    with nnx.var_defaults(ref=True):
        norm = jx.BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0))
    gradient = jax.jit(lambda norm, x: jax.grad(lambda z: (norm(z) ** 3).sum())(x))(norm, X)
    moments = reference.moments(X, "n h c", "n h")
    np.testing.assert_allclose(norm.mean[...], 0.5 * moments.mean, **CLOSE)
    np.testing.assert_allclose(norm.var[...], 0.5 + 0.5 * moments.var, **CLOSE)
    function = jax.grad(lambda z: (jn.standardize(z)[0] ** 3).sum())
    np.testing.assert_allclose(gradient, function(X), rtol=1e-4, atol=1e-4)


def test_flat_parameters_of_several_features():
    """num_features counts all of them. Flax's nnx cannot train such a BatchNorm; its LayerNorm can."""
    x = np.random.default_rng(0).normal(1.0, 2.0, (5, 2, 3)).astype(np.float32)
    scale = np.arange(1.0, 7).astype(np.float32)
    norm = build(OURS, "BatchNorm", 6, axis=(1, 2), momentum=0.0)
    y, stats = run(norm, x, {"scale": scale})
    expected, moments = reference.standardize(x, "n h c", "n", features="h c", scale=scale.reshape(2, 3))
    np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_allclose(stats["mean"], moments.mean.reshape(-1), **CLOSE)
    y, _ = run(norm, x, {"scale": scale}, stats, train=False)
    np.testing.assert_allclose(y, expected, **CLOSE)
    with pytest.raises((TypeError, ValueError)):
        run(build(THEIRS, "BatchNorm", 6, axis=(1, 2)), x)


def test_group_norm_holds_both_counts():
    for settings in ({"num_groups": 2}, {"num_groups": None, "group_size": 3}):
        ours, theirs = (build(library, "GroupNorm", 6, **settings) for library in (OURS, THEIRS))
        assert (ours.num_groups, ours.group_size) == (theirs.num_groups, theirs.group_size) == (2, 3)
    with pytest.raises(jn.LayoutError, match=r"jaxnorm\.nnx\.GroupNorm: num_groups=4 does not divide the 6 channels"):
        jx.GroupNorm(6, 4, rngs=nnx.Rngs(0))
