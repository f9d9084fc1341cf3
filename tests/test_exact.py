"""Errors at the level of float32 itself, however large the mean is: statistics, y and gradients against float64.

The arrays are large enough for the forms that large arrays get on CPU, and every test runs in each form.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import table

import jaxnorm as jn
from jaxnorm import cpu
from jaxnorm import stats as stats_module

# layout, over, shape, the axes averaged in NumPy
NORMS = {
    "batch": ("n c", "n", (4096, 16), (0,)),
    "layer": ("n c", "c", (128, 512), (1,)),
    "instance": ("n h w c", "h w", (2, 64, 64, 8), (1, 2)),
    "group": ("n h w (g k)", "h w k", (2, 64, 64, 8), (1, 2, 4)),
}
optimized = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})  # as users compile
every_norm = pytest.mark.parametrize("name", NORMS)
means = pytest.mark.parametrize("mean", [0, 0.65, 0.99, 3, 1e4, 1e6])  # 0.65: sums about 0 lose most (stats.FAR)


def sample(name, mean, dtype=np.float32):
    x = np.random.default_rng(0).normal(mean, 1, NORMS[name][2])
    return np.array(jnp.asarray(x, dtype))


def ours(name, x, **options):
    layout, over, *_ = NORMS[name]
    sizes = {"g": 2} if name == "group" else None
    return jn.standardize(x, layout, over, epsilon=0.0, sizes=sizes, **options)


def parts(name, x):
    """x in float64, with the groups of channels as a dimension."""
    x = np.asarray(x, np.float64)
    return x.reshape(*x.shape[:-1], 2, -1) if name == "group" else x


def exact(name, x):
    """y and the variance in float64."""
    z, axes = parts(name, x), NORMS[name][3]
    var = z.var(axes, keepdims=True)
    return ((z - z.mean(axes, keepdims=True)) / np.sqrt(var)).reshape(x.shape), np.squeeze(var, axes)


@means
@every_norm
def test_variance_and_y(name, mean, form):
    """y to 4 units in the last place of max(1, |y|): its scale is the standard deviation."""
    x = sample(name, mean)
    y, stats = optimized(lambda x: ours(name, x))(x)
    alone = optimized(lambda x: ours(name, x)[0])(x)  # without the statistics the compiler makes other loops
    want, var = exact(name, x)
    assert abs(np.float64(stats.var) / var - 1).max() <= (1e-6 if mean <= 1e4 else 1e-5)
    unit = np.spacing(np.maximum(1, abs(want)).astype(np.float32))
    assert (abs(np.float64(y) - want) / unit).max() <= 4
    assert (abs(np.float64(alone) - want) / unit).max() <= 4


@every_norm
def test_a_shift_from_a_part_that_is_like_no_other(name, form):
    """The worst case of `stats._part`: the sixteenth that gives the shift is sqrt(15) standard deviations off, and what
    the sums are rounded by counts 15-fold."""
    x = sample(name, 1e4)
    d = NORMS[name][3][0]
    x[(slice(None),) * d + (slice(x.shape[d] // 16 or 1),)] = 0
    y, stats = optimized(lambda x: ours(name, x))(x)
    want, var = exact(name, x)
    worst = 15 if form == "elsewhere" else 1
    assert abs(np.float64(stats.var) / var - 1).max() <= 1e-6 * worst
    assert (abs(np.float64(y) - want) / np.spacing(np.maximum(1, abs(want)).astype(np.float32))).max() <= 4 * worst


@pytest.mark.parametrize(
    ("name", "options", "taken"),
    [("batch", {}, True), ("instance", {}, True), ("group", {}, True), ("batch", {"mask": True}, False)],
)
def test_where_siblings_fuse_a_part_gives_the_shift(name, options, taken, monkeypatch):
    """Else the tests above would pass as well: with a pass of its own for the mean. Under a mask there is one."""
    monkeypatch.setattr(cpu, "alone", lambda: True)
    monkeypatch.setattr(cpu, "SMALL", 0)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    jax.clear_caches()
    x = sample(name, 0)
    d = NORMS[name][3][0]
    part = (*x.shape[:d], x.shape[d] // 16, *x.shape[d + 1 :])
    text = str(jax.make_jaxpr(lambda x: ours(name, x, **{k: jnp.asarray(v) for k, v in options.items()}))(x))
    jax.clear_caches()
    assert (f"f32[{','.join(map(str, part))}] = slice[" in text) == taken


@every_norm
def test_squares_that_overflow(name, form):
    """The square of x is no float32, that of x - mean is."""
    x = sample(name, 1e3) * np.float32(1e17)
    y, stats = optimized(lambda x: ours(name, x))(x)
    want, var = exact(name, x)
    assert abs(np.float64(stats.var) / var - 1).max() <= 1e-6
    assert (abs(np.float64(y) - want) / np.spacing(np.maximum(1, abs(want)).astype(np.float32))).max() <= 4


def test_a_nan_costs_no_digit_of_another_channel(form):
    x = sample("batch", 1e4)
    clean, _ = ours("batch", x)
    x[0, 0] = np.nan
    y, stats = optimized(lambda x: ours("batch", x))(x)
    assert np.isnan(y[:, 0]).all()
    assert np.isnan(stats.var[0])
    np.testing.assert_allclose(y[:, 1:], clean[:, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm", table.NORMS, ids=lambda norm: norm.name)
def test_every_norm(norm, masked, dtype, form):
    x, scale, bias, mask, _ = norm.sample(dtype=dtype)
    given = {"mask": mask} if masked else {}
    y, stats = norm.verb(x, scale, bias, **given)
    want, wanted = norm.reference(x, scale, bias, **given)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    close(y, want)
    close(norm(x, scale, bias, **given), want)
    close(stats.mean, wanted.mean)
    close(stats.m2, wanted.m2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@every_norm
def test_sixteen_bits(name, dtype, form):
    """What is rounded is the input and y, and nothing between: y is float64's, rounded, but for ties."""
    for mean in (0, 30, 1000):
        x = sample(name, mean, dtype)
        y, stats = optimized(lambda x: ours(name, x))(x)
        want, var = exact(name, x)
        assert abs(np.float64(stats.var) / var - 1).max() <= 1e-6
        unit = np.abs(want) * float(jnp.finfo(dtype).eps) + 1e-6
        assert (abs(np.float64(y) - want) <= 0.51 * unit).all()


@pytest.mark.parametrize("mean", [0.5, 1e4, 1e6])
@every_norm
def test_gradients(name, mean, form):
    """Of float32 x by x, scale and bias, against plain autodiff in float64."""
    x, axes = sample(name, mean), NORMS[name][3]
    rng = np.random.default_rng(1)
    w, scale = rng.normal(size=x.shape).astype(np.float32), rng.uniform(0.5, 1.5, x.shape[-1]).astype(np.float32)

    def plain(x, scale, bias, w):
        scale, bias = (z.reshape((1,) * (x.ndim - 1) + (-1,)) for z in (scale, bias))
        z = x.reshape(*x.shape[:-1], 2, -1) if name == "group" else x
        c = z - z.mean(axes, keepdims=True)
        y = (c / jnp.sqrt((c**2).mean(axes, keepdims=True))).reshape(x.shape)
        return jnp.sum(jnp.sin(y * scale + bias) * w)

    def rule(x, scale, bias, w):
        features = "(g k)" if name == "group" else "c"
        return jnp.sum(jnp.sin(ours(name, x, scale=scale, bias=bias, features=features)[0]) * w)

    at = x, scale, np.zeros_like(scale), w
    got = optimized(jax.grad(rule, (0, 1, 2)))(*at)
    with jax.enable_x64(True):
        want = optimized(jax.grad(plain, (0, 1, 2)))(*(jnp.asarray(z, jnp.float64) for z in at))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("mean", [0, 0.68, 0.72, 0.9, 1.1, 1e4])  # on either side of stats.FAR
def test_splits_of_a_batch_agree(mean, form):
    """Eager and jit to 4e-7 of the variance. So do parts that are merged, up to what a mean rounded to float32 costs:
    2 d 2^-24 |mean| where the parts' means differ by d, here 0.1 standard deviations.
    """
    x = sample("batch", mean)
    whole = jn.moments(x, "n c", "n")
    jitted = optimized(lambda x: jn.moments(x, "n c", "n"))(x)
    halves, sixteenths = (jn.merge(*(jn.moments(part, "n c", "n") for part in np.split(x, k))) for k in (2, 16))
    for moments, rounding in ((jitted, 0), (halves, 2 * 0.1 * 2**-24 * mean), (sixteenths, 2 * 0.1 * 2**-24 * mean)):
        np.testing.assert_allclose(moments.mean, whole.mean, rtol=1.2e-7, atol=2e-7)
        np.testing.assert_allclose(moments.var, whole.var, rtol=4e-7 + rounding)


def programs(name, mean, monkeypatch):
    """Of a norm with a scale on one CPU: the gradient by x, scale and bias as a jaxpr, in the form of large arrays."""
    monkeypatch.setattr(cpu, "alone", lambda: True)
    monkeypatch.setattr(cpu, "SMALL", 0)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, cpu=None, **_: (cpu or default)(*args))
    jax.clear_caches()
    x, scale = sample(name, mean), jnp.ones(NORMS[name][2][-1])

    def loss(x, scale, bias):
        return ours(name, x, scale=scale, bias=bias)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, scale, scale))
    jax.clear_caches()
    return text


@pytest.mark.parametrize("cached", [True, False])
def test_rows_are_multiplied_as_a_matrix_on_cpu(cached, monkeypatch):
    """Else every other test would pass as well, by sums. Out of the cache it is sums."""
    monkeypatch.setattr(cpu, "CACHED", 2**26 if cached else 0)
    assert ("dot_general" in programs("layer", 0, monkeypatch)) == cached


def test_sums_about_the_mean_are_left_out_where_means_are_small(monkeypatch):
    """What a call of `sums_about` would give is poisoned: near 0 it is not asked, far from it it is."""
    monkeypatch.setattr(cpu, "alone", lambda: True)
    monkeypatch.setattr(cpu, "SMALL", 0)
    real = stats_module.centred

    def poisoned(plan, x, slots, copy, *means):
        return real(plan, x, slots, copy, *means) * (jnp.nan if copy in (1, 2) else 1)

    monkeypatch.setattr(stats_module, "centred", poisoned)
    for mean, far in ((0.6, False), (0.8, True)):
        jax.clear_caches()
        moments = jn.moments(np.random.default_rng(0).normal(mean, 1, (2**16, 4)).astype(np.float32), "n c", "n")
        assert bool(jnp.isnan(moments.var).any()) == far
    jax.clear_caches()
