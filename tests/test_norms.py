"""Every rule that holds for all norms, over every row of the table, against float64 NumPy.

Compiling is what these tests cost, so each puts what it asks of a row into one jitted function. Eager calls are made
where tracing is counted, and by the examples in the docstrings.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from table import NORMS

import jaxnorm as jn

# float32 rounds to 6e-8. An output or a gradient is a handful of operations on numbers of size 1 to 5; over the whole
# table the largest error is 3e-7 of them.
ROUNDING = {"rtol": 1e-6, "atol": 1e-6}

every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
every_state = pytest.mark.parametrize("norm", [norm for norm in NORMS if norm.state], ids=lambda norm: norm.name)


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(np.asarray(actual), expected, **(tolerance or ROUNDING))


def close_stats(moments, stats, names=("count", "mean", "m2"), **tolerance):
    for name in names:
        close(getattr(moments, name), getattr(stats, name), **tolerance)


def same(actual, expected):
    """Equal to the bit, and finite."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actual))


def kinds(function, *args):
    """What a scan compares: the structure with its static parts, and the type of every leaf."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), jax.eval_shape(function, *args))


def start(norm):
    return jn.running_stats(" ".join(norm.state), **norm.state)


# --- values


@every_norm
def test_values(norm):
    x, scale, bias, _, _ = norm.sample()

    @jax.jit
    def everything(x, scale, bias):
        y, moments = norm.verb(x, scale, bias)
        properties = moments.var, moments.var_unbiased, moments.std
        return norm(x, scale, bias), norm(x), y, moments, norm.moments(x), properties

    named, plain, y, moments, alone, properties = everything(x, scale, bias)
    expected, stats = norm.reference(x, scale, bias)
    close(named, expected)
    close(y, expected)
    close(plain, norm.reference(x)[0])
    close_stats(moments, stats)
    close_stats(alone, stats)
    for found, wanted in zip(properties, (stats.var, stats.var_unbiased, np.sqrt(stats.var)), strict=True):
        close(found, wanted)


def test_rms_scale_offset():
    norm = next(norm for norm in NORMS if norm.name == "RMS")
    x, scale, bias, _, _ = norm.sample()
    y = jn.rms_norm(x, scale=scale, bias=bias, scale_offset=1.0)
    close(y, norm.reference(x, 1 + scale, bias)[0])
    # 1 + 2^-9 is no bfloat16: the sum is made in float32
    y = jn.rms_norm(x, scale=jnp.full(5, 2.0**-9, jnp.bfloat16), scale_offset=1.0)
    close(y, norm.reference(x, np.full(5, 1 + 2.0**-9))[0])
    close(jn.rms_norm(x, scale_offset=1.0), norm.reference(x)[0])  # no scale, nothing to offset


@every_norm
def test_vmap_is_a_loop(norm):
    x, scale, bias, mask, _ = (np.stack(pair) for pair in zip(norm.sample(0), norm.sample(1), strict=True))
    both = jax.jit(jax.vmap(lambda x, scale, bias, mask: norm(x, scale, bias, mask=mask)))(x, scale, bias, mask)
    for i in range(2):
        close(both[i], norm.reference(x[i], scale[i], bias[i], mask=mask[i])[0])


@every_norm
def test_gradients(norm):
    x, scale, bias, mask, cotangent = norm.sample()
    for kw in {}, {"mask": mask}:
        got = jax.jit(jax.grad(lambda *a, kw=kw: jnp.sum(norm(*a, **kw) * cotangent), (0, 1, 2)))(x, scale, bias)
        number = lambda *a, kw=kw: np.sum(norm.reference(*a, **kw)[0] * cotangent)  # noqa: E731
        for actual, expected in zip(got, reference.gradients(number, (x, scale, bias)), strict=True):
            close(actual, expected)


# --- masks and weights


def mask_shapes(shape):
    """Every shape that broadcasts to `shape`: each dimension whole or 1, and leading ones left out."""
    shapes = {tuple(np.where(ones, 1, shape).tolist()) for ones in itertools.product((True, False), repeat=len(shape))}
    return sorted(shapes | {shape[i:] for i in range(1, len(shape) + 1)})


@every_norm
def test_masks_of_every_shape(norm):
    x, scale, bias, _, _ = norm.sample()
    rng = np.random.default_rng(2)
    shapes = mask_shapes(norm.shape)
    assert len(shapes) == 2 ** len(norm.shape) + len(norm.shape)
    fit_twice = [shape for shape in shapes if 0 < len(shape) < len(norm.shape) and shape == norm.shape[: len(shape)]]
    for shape in fit_twice:
        with pytest.raises(jn.LayoutError, match="fits the first dimensions of x, and the last ones too"):
            norm.verb(x, scale, bias, mask=np.ones(shape, bool))
    masks = [rng.random(shape) < 0.6 for shape in shapes if shape not in fit_twice]
    masks.append(masks[-1].astype(np.int32))  # 0 and 1 are a mask too
    results = jax.jit(lambda x, masks: [norm.verb(x, scale, bias, mask=mask) for mask in masks])(x, masks)
    for mask, (y, moments) in zip(masks, results, strict=True):
        expected, stats = norm.reference(x, scale, bias, mask=mask.astype(bool))
        close(y, expected, rtol=1e-6, atol=1e-6 * abs(expected).max())  # a masked slot may lie 1e3 deviations off
        close_stats(moments, stats)


@every_norm
def test_masked_slots_reach_nothing(norm):
    x, scale, bias, mask, cotangent = norm.sample()
    counted = cotangent * mask.astype(np.float32)

    @jax.jit
    def everything(x):
        def loss(x, scale, bias):
            y = norm(x, scale, bias, mask=mask)
            return jnp.sum(y * counted), y

        (value, y), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        return (value, gradients, norm.moments(x, mask=mask), jnp.where(mask, y, 0)), y

    zeros = np.where(mask, x, np.float32(0))
    clean, y_of_zeros = everything(zeros)
    assert not np.asarray(clean[1][0])[~mask].any()
    assert np.asarray(clean[1][0]).any()
    for poison in np.nan, np.inf, -np.inf, 1e30:
        poisoned, y = everything(np.where(mask, x, np.float32(poison)))
        same(poisoned, clean)
        if np.isfinite(poison):  # normalized like the rest
            close(y, norm.reference(np.where(mask, x, np.float32(poison)), scale, bias, mask=mask)[0])
        else:  # counts as 0
            same(y, y_of_zeros)


@every_norm
def test_float_weights(norm):
    x, scale, bias, mask, _ = norm.sample()
    weights = np.random.default_rng(3).uniform(0.1, 2.0, norm.shape).astype(np.float32)
    last = weights[..., -1:]  # weights broadcast like masks

    @jax.jit
    def everything(x):
        masked = jnp.where(mask, weights, 0)
        return (
            norm.verb(x, scale, bias, weights=masked),
            norm.verb(x, scale, bias, weights=weights, mask=mask),
            norm.moments(x, weights=last),
        )

    zero, both, broadcast = everything(x)
    expected, stats = norm.reference(x, scale, bias, weights=weights, mask=mask)
    for y, moments in zero, both:
        close(y, expected)
        close_stats(moments, stats)
    close_stats(broadcast, norm.reference(x, weights=last)[1])
    same(everything(np.where(mask, x, np.nan))[0][1], zero[1])  # weight 0 is masked out


@every_state
def test_batch_norms_take_weights(norm):
    x, scale, bias, mask, _ = norm.sample()
    weights = np.random.default_rng(3).uniform(0.1, 2.0, norm.shape).astype(np.float32)
    y = jax.jit(lambda x: norm(x, scale, bias, weights=weights, mask=mask))(x)
    close(y, norm.reference(x, scale, bias, weights=weights, mask=mask)[0])


@every_norm
def test_everything_masked(norm):
    x, scale, bias, _, cotangent = norm.sample()
    nothing = np.zeros(norm.shape, bool)

    @jax.jit
    def everything(x, scale, bias):
        y, back = jax.vjp(lambda *a: norm(*a, mask=nothing), x, scale, bias)
        moments = norm.moments(x, mask=nothing)
        return (y, back(cotangent)), (moments, moments.var, moments.var_unbiased, moments.std)

    for poison in 0.0, np.nan:
        finite, zero = everything(x + np.float32(poison), scale, bias)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(finite))
        assert not any(leaf.any() for leaf in jax.tree.leaves(zero))


@every_state
def test_everything_masked_leaves_the_state(norm):
    x, _, _, _, _ = norm.sample()
    step = jax.jit(lambda running, x, mask: norm.step(running, x, mask=mask)[0])
    before = step(start(norm), x, np.ones(norm.shape, bool))
    same(step(before, np.full_like(x, np.nan), np.zeros(norm.shape, bool)), before)
    # one channel masked: its statistics alone stay
    mask = np.ones(norm.shape, bool)
    np.moveaxis(mask, 1 if norm.layout == "n c ..." else -1, 0)[0] = False
    after = step(before, x, mask)
    for name in "mean", "var":
        stayed = np.asarray(getattr(after, name) == getattr(before, name))
        assert stayed[0]
        assert not stayed[1:].any()


# --- numerics


@every_norm
def test_a_large_mean(norm):
    x = np.random.default_rng(4).normal(1e4, 1.0, norm.shape).astype(np.float32)
    y, moments = jax.jit(norm.verb)(x)
    expected, stats = norm.reference(x)
    # x - mean is exact to a unit in the last place of 1, however large the mean is
    close(moments.m2, stats.m2, rtol=1e-6)
    close(y, expected)


@every_norm
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision(norm, dtype):
    x, scale, bias, mask, _ = norm.sample()
    x = jnp.asarray(x, dtype)
    both = jax.jit(lambda x: [norm.verb(x, scale, bias, mask=mask, **kw) for kw in ({}, {"dtype": jnp.float32})])
    (y, moments), (unrounded, _) = both(x)
    expected, stats = norm.reference(np.asarray(x, np.float32), scale, bias, mask=mask)
    close_stats(moments, stats)
    assert unrounded.dtype == np.float32
    close(unrounded, expected)
    # computed in float32 and rounded once: half a unit in the last place of dtype
    close(np.asarray(y, np.float32), expected, rtol=float(jnp.finfo(dtype).eps) / 2, atol=1e-6)

    own = jnp.asarray(scale, dtype)
    for output in y, *jax.eval_shape(lambda x: (norm(x), norm(x, scale, bias), norm(x, own, own)), x):
        assert output.dtype == dtype
    for statistic in jax.tree.leaves((moments, jax.eval_shape(norm.moments, x))):
        assert statistic.dtype == np.float32
    gradients = jax.eval_shape(jax.grad(lambda *a: norm(*a).astype(jnp.float32).sum(), (0, 1, 2)), x, scale, own)
    assert [g.dtype for g in gradients] == [dtype, np.float32, dtype]


@every_norm
def test_complex(norm):
    x, scale, bias, mask, _ = norm.sample(dtype=np.complex64)
    masks = {}, {"mask": mask}
    results = jax.jit(lambda x: [(norm(x, scale, bias, **kw), norm.moments(x, **kw)) for kw in masks])(x)
    for kw, (y, moments) in zip(masks, results, strict=True):
        expected, stats = norm.reference(x, scale, bias, **kw)
        assert y.dtype == moments.mean.dtype == np.complex64
        assert moments.count.dtype == moments.m2.dtype == moments.var.dtype == np.float32
        close(y, expected)
        close_stats(moments, stats)


@every_norm
def test_float64_stays_float64(norm):
    with jax.enable_x64(True):
        x, scale, bias, _, _ = norm.sample(dtype=np.float64)
        y, moments = jax.jit(norm.verb)(x, scale, bias)
        expected, stats = norm.reference(x, scale, bias)
        assert {y.dtype, *(leaf.dtype for leaf in jax.tree.leaves(moments))} == {np.dtype(np.float64)}
        close(y, expected, rtol=1e-13, atol=1e-13)
        close_stats(moments, stats, rtol=1e-13, atol=1e-13)


@every_norm
def test_zero_size(norm):
    x = np.zeros((0, *norm.shape[1:]), np.float32)
    features = norm.features_shape() if norm.features[0] != "n" else (0, *norm.features_shape()[1:])
    scale, bias = np.ones(features, np.float32), np.zeros(features, np.float32)

    @jax.jit
    def everything(x, scale, bias):
        y, back = jax.vjp(norm, x, scale, bias)
        state = norm.step(start(norm), x, scale, bias)[0] if norm.state else None
        return y, back(jnp.ones_like(y)), norm.moments(x), state

    y, gradients, moments, state = everything(x, scale, bias)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert not any(g.any() for g in gradients)  # NaN is true
    stats = norm.reference(x)[1]
    for name in "count", "mean", "m2":
        np.testing.assert_array_equal(getattr(moments, name), getattr(stats, name))  # the shapes too
    if norm.state:
        same(state, start(norm))


# --- types and traces


@every_state
def test_state_keeps_its_type(norm):
    x, scale, bias, mask, _ = norm.sample()
    running = start(norm)
    pair = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), running)

    def step(running, x):
        return norm.step(running, x, scale, bias, mask=mask)

    expected = kinds(lambda s: s, running)
    for batch in jnp.asarray(x), jnp.asarray(x, jnp.bfloat16):
        twice = jnp.stack([batch, batch])
        assert kinds(lambda s, x: step(s, x)[0], running, batch) == expected
        assert kinds(lambda s, x: jax.jit(step)(s, x)[0], running, batch) == expected
        assert kinds(lambda s, x: jax.lax.scan(step, s, x)[0], running, twice) == expected  # raises where it drifts
        assert kinds(lambda s, x: jax.vmap(step)(s, x)[0], pair, twice) == kinds(lambda s: s, pair)


@every_norm
def test_equal_configurations_trace_once(norm):
    x, scale, bias, mask, _ = (jnp.asarray(a) for a in norm.sample())

    def call():
        # names that are equal and not the same object, as after reading a configuration file
        layout, over, features = ("".join(list(text)) for text in (norm.layout, norm.over, norm.features))
        names = {"features": features, "epsilon": norm.epsilon, "center": norm.center, "sizes": dict(norm.sizes)}
        return jn.standardize(x, layout, over, scale=scale, bias=bias, mask=mask, **names), norm(x, scale, bias)

    (y, moments), unmasked = call()
    with jax.no_tracing(True):  # raises where jit would trace
        same(call(), ((y, moments), unmasked))
    close(y, norm.reference(x, scale, bias, mask=mask)[0])
    close(unmasked, norm.reference(x, scale, bias)[0])


@every_state
def test_state_goes_round_without_a_new_trace(norm):
    x, scale, bias, _, _ = norm.sample()
    traces = 0

    @jax.jit
    def step(running, x):
        nonlocal traces
        traces += 1
        return norm.step(running, x, scale, bias)

    running = start(norm)
    for _ in range(3):
        running, _ = step(running, x)
    assert traces == 1
    assert running.num_updates == 3
