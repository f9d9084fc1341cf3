"""Derivatives of every order, in every mode, and what is kept for the backward pass.

The reference is plain autodiff of the formula written down in a line, in float64: the hand-written rule must agree to
1e-9 there, where no rounding hides a wrong term.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import cpu

K = jax.random.key(0)
N, T, C = 3, 4, 6
MASK = np.arange(N * T).reshape(N, T, 1) % 5 != 2
MASK_OF_CHANNELS = np.arange(C) % 3 != 1
WEIGHTS = np.linspace(0.25, 2, N * T).reshape(N, T, 1)


def plain(dims, groups=1, center=True, weights=None):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias for x [N, T, C], by autodiff."""

    def f(x, scale, bias):
        z = x.reshape(N, T, groups, C // groups)
        w = jnp.broadcast_to(jnp.asarray(1 if weights is None else weights, x.dtype), x.shape).reshape(z.shape)
        n = w.sum(dims, keepdims=True)
        mean = (w * z).sum(dims, keepdims=True) / n if center else jnp.zeros((1, 1, 1, 1))
        var = (w * (z - mean) ** 2).sum(dims, keepdims=True) / n
        scale, bias = (jnp.broadcast_to(p, (1, 1, C)) for p in (scale, bias))
        y = ((z - mean) / jnp.sqrt(var + 1e-5)).reshape(N, T, C) * scale + bias
        return y, jnp.sum(jnp.tanh(var) * jnp.cos(mean))

    return f


def ours(layout, over, **options):
    def f(x, scale, bias):
        y, stats = jn.standardize(x, layout, over, scale=scale, bias=bias, **options)
        return y, jnp.sum(jnp.tanh(stats.var) * jnp.cos(stats.mean))

    return f


def devices_mapped(x, scale, bias):
    """Batch norm whose t lies in two halves under vmap, each with its own part of the mask."""

    def halves(z):
        return z.reshape(N, 2, T // 2, -1)

    def part(x, mask):
        return ours("n t c", "n t devices", mask=mask)(x, scale, bias)

    y, rest = jax.vmap(part, (1, 1), (1, 0), axis_name="devices")(halves(x), halves(MASK))
    return y.reshape(N, T, C), rest[0]


def devices_sharded(x, scale, bias):
    """Layer norm whose c lies on two devices, under shard_map, which checks what is replicated."""
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    c, whole = P("devices"), P(None, None, "devices")

    def part(x, scale, bias, mask):
        return ours("n t c", "c devices", mask=mask)(x, scale, bias)

    step = jax.shard_map(part, mesh=mesh, in_specs=(whole, c, c, c), out_specs=(whole, P()))
    return step(x, scale, bias, MASK_OF_CHANNELS)


ROWS = {
    "batch": (ours("n t c", "n t"), plain((0, 1), C)),
    "batch masked": (ours("n t c", "n t", mask=MASK), plain((0, 1), C, weights=MASK)),
    "batch weighted": (ours("n t c", "n t", weights=WEIGHTS), plain((0, 1), C, weights=WEIGHTS)),
    "layer": (ours("n t c", "c"), plain((2, 3))),
    "rms": (ours("n t c", "c", center=False), plain((2, 3), center=False)),
    "instance": (ours("n t c", "t"), plain((1,), C)),
    "instance masked": (ours("n t c", "t", mask=MASK), plain((1,), C, weights=MASK)),
    "batch masked, synced by vmap": (devices_mapped, plain((0, 1), C, weights=MASK)),
    "layer masked, c over shard_map": (devices_sharded, plain((2, 3), weights=MASK_OF_CHANNELS)),
    "group": (ours("n t (g k)", "t k", sizes={"g": 3}, features="(g k)"), plain((1, 3), 3)),
}

x, w, tx = (jax.random.normal(key, (N, T, C)) for key in jax.random.split(K, 3))
s, b = jnp.linspace(0.5, 1.5, C), jnp.linspace(-1.0, 1.0, C)


def checks(f, args):
    """Every mode and nesting. `args` are x, scale, bias, a cotangent and a tangent."""
    x, s, b, w, tx = args
    at, wrt = (x, s, b), (0, 1, 2)
    two = jnp.stack([x, 2 * x])

    def y(*a):
        return f(*a)[0]

    def loss(x, s, b):
        y, rest = f(x, s, b)
        return jnp.sum(jnp.sin(y) * w) + rest

    def many(x, s, b):
        return jax.vmap(loss, (0, None, None))(x, s, b).sum()

    tangents = (tx, s * 0.3, b * 0.2)
    return {
        "value": lambda: f(*at),
        "jvp": lambda: jax.jvp(f, at, tangents),
        "vjp": lambda: jax.vjp(y, *at)[1](w),
        "grad, jit": lambda: jax.jit(jax.grad(loss, wrt))(*at),
        "jacfwd": lambda: jax.jacfwd(y, wrt)(*at),
        "jacrev": lambda: jax.jacrev(y, wrt)(*at),
        "hessian, forward of reverse": lambda: jax.hessian(loss, wrt)(*at),
        "hessian, reverse of reverse": lambda: jax.jacrev(jax.jacrev(loss, wrt), wrt)(*at),
        "hessian, reverse of forward": lambda: jax.jacrev(jax.jacfwd(loss, wrt), wrt)(*at),
        "hessian, forward of forward": lambda: jax.jacfwd(jax.jacfwd(loss, wrt), wrt)(*at),
        "hessian-vector product, jit": lambda: jax.jit(lambda x: jax.jvp(jax.grad(loss), (x, s, b), tangents))(x),
        "third order": lambda: jax.jvp(jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x, s, b), tx)), (x,), (tx,)),
        "linearize": lambda: jax.linearize(f, *at)[1](*tangents),
        "transpose of linearize": lambda: jax.linear_transpose(jax.linearize(y, *at)[1], *at)(w),
        "vmap": lambda: jax.vmap(f, (0, None, None))(two, s, b),
        "vmap of grad": lambda: jax.vmap(jax.grad(loss, wrt), (0, None, None))(two, s, b),
        "vmap of grad over scale": lambda: jax.vmap(jax.grad(loss, wrt), (None, 0, None))(x, jnp.stack([s, 2 * s]), b),
        "grad of vmap": lambda: jax.grad(many, wrt)(two, s, b),
        "vmap of jvp": lambda: jax.vmap(lambda t: jax.jvp(f, at, (t, s, b)))(two),
        "vmap of hessian": lambda: jax.vmap(jax.hessian(loss, 1), (0, None, None))(two, s, b),
        "scan": lambda: jax.grad(
            lambda x: lax.scan(lambda c, _: (y(c, s, b) + 0.1 * c, None), x, length=3)[0].sum()
        )(x),
        "remat": lambda: jax.grad(jax.checkpoint(loss), wrt)(*at),
        "remat of scan": lambda: jax.grad(
            lambda x: lax.scan(jax.checkpoint(lambda c, _: (y(c, s, b) + c, None)), x, length=3)[0].sum()
        )(x),
    }


MODES = [
    "value", "jvp", "vjp", "grad, jit", "jacfwd", "jacrev", "hessian, forward of reverse",
    "hessian, reverse of reverse", "hessian, reverse of forward", "hessian, forward of forward",
    "hessian-vector product, jit", "third order", "linearize", "transpose of linearize",
    "vmap", "vmap of grad", "vmap of grad over scale", "grad of vmap", "vmap of jvp",
    "vmap of hessian", "scan", "remat", "remat of scan",
]  # fmt: skip


def compare(row, modes):
    """The rule against plain autodiff in float64."""
    with jax.enable_x64(True):
        args = tuple(jnp.asarray(np.asarray(a), jnp.float64) for a in (x, s, b, w, tx))
        assert list(checks(ROWS[row][0], args)) == MODES

        def run(f):  # one program: op by op this takes minutes
            return jax.jit(lambda *a: {mode: checks(f, a)[mode]() for mode in modes})(*args)

        got, want = (run(f) for f in ROWS[row])
        for mode in modes:
            for a, c in zip(jax.tree.leaves(got[mode]), jax.tree.leaves(want[mode]), strict=True):
                np.testing.assert_allclose(a, c, rtol=1e-9, atol=1e-9 * max(1, np.abs(c).max()), err_msg=mode)


@pytest.mark.parametrize("row", ROWS)
def test_every_mode_and_order(row):
    compare(row, MODES)


@pytest.mark.parametrize("form", ["large"], indirect=True)
@pytest.mark.parametrize("row", ROWS)
def test_the_form_of_large_arrays(row, form):
    """What they get on CPU (jaxnorm/cpu.py); the arrays above are small, and get what other platforms do."""
    compare(row, ["vjp", "hessian, forward of reverse"])


def test_gradient_of_the_weights():
    with jax.enable_x64(True):
        x64, w64 = (jnp.asarray(np.asarray(a), jnp.float64) for a in (x, w))
        weights = jnp.asarray(WEIGHTS)

        def loss(f, weights):
            y, rest = f(x64, weights)
            return jnp.sum(jnp.sin(y) * w64) + rest

        def rule(x, weights):
            return ours("n t c", "n t", weights=weights)(x, None, None)

        def formula(x, weights):
            return plain((0, 1), C, weights=weights)(x, 1.0, 0.0)

        for derivative in (jax.grad, lambda f, argnums: jax.jacfwd(jax.grad(f, argnums), argnums)):
            got = jax.jit(derivative(functools.partial(loss, rule), 0))(weights)
            want = jax.jit(derivative(functools.partial(loss, formula), 0))(weights)
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_gradients_of_given_statistics_and_epsilon():
    """normalize is differentiable in everything it is given."""
    with jax.enable_x64(True):
        x64, mean, var = jnp.asarray(np.asarray(x), jnp.float64), jnp.linspace(-1, 1, C), jnp.linspace(0.5, 2, C)

        def rule(x, mean, var, epsilon):
            stats = jn.Moments(jnp.full(C, 12.0), mean, 12 * var, ("c",))
            return jnp.sum(jnp.sin(jn.normalize(x, stats, "n t c", epsilon=epsilon)))

        def formula(x, mean, var, epsilon):
            return jnp.sum(jnp.sin((x - mean[None, None]) / jnp.sqrt(var + epsilon)[None, None]))

        at = (x64, mean, var, jnp.asarray(0.1))
        for got, want in zip(jax.grad(rule, (0, 1, 2, 3))(*at), jax.grad(formula, (0, 1, 2, 3))(*at), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def kept_bytes(f, x, *params):
    """Bytes that jax.vjp keeps, beyond those of the parameters."""
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(f, *a)[1], x, *params))
    return sum(a.size * a.dtype.itemsize for a in kept)


def every_kept(test):
    """Batch, layer, RMS, instance and group norm, with mask and without, in both dtypes."""
    rows = [
        ("n t c", "n t", None, True), ("n t c", "c", None, True), ("n t c", "c", None, False),
        ("n t c", "t", None, True), ("n t (g k)", "t k", {"g": 8}, True),
    ]  # fmt: skip
    test = pytest.mark.parametrize(("layout", "over", "sizes", "center"), rows)(test)
    test = pytest.mark.parametrize("masked", [False, True])(test)
    return pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])(test)


@every_kept
def test_only_x_is_kept(layout, over, sizes, center, masked, dtype):
    """x in its own dtype, the mask as it was given, and statistics: linen's LayerNorm keeps 12 bytes an element."""
    big = jnp.zeros((16, 128, 64), dtype)
    scale, bias = jnp.ones(64), jnp.zeros(64)
    mask = jnp.ones((16, 128, 1), bool) if masked else None

    def f(x, scale, bias):
        affine = {"scale": scale, "bias": bias}
        return jn.standardize(x, layout, over, **affine, mask=mask, sizes=sizes, center=center)[0]

    small = 6 * 4 * (16 * 128 + 64) + 16 * 128  # at most six float32 arrays of statistics or parameters, and the mask
    assert kept_bytes(f, big, scale, bias) <= big.size * big.dtype.itemsize + small


@every_kept
def test_only_x_is_kept_under_scan(layout, over, sizes, center, masked, dtype):
    """Four layers in a scan keep four x: in bfloat16 2 bytes an element, where linen's LayerNorm keeps 12."""
    big = jnp.zeros((16, 128, 64), dtype)
    mask = jnp.ones((16, 128, 1), bool) if masked else None

    def f(x, scale):
        def layer(x, scale):
            return jn.standardize(x, layout, over, scale=scale, mask=mask, sizes=sizes, center=center)[0], None

        return lax.scan(layer, x, scale)[0]

    small = 6 * 4 * (16 * 128 + 64) + 16 * 128
    assert kept_bytes(f, big, jnp.ones((4, 64))) <= 4 * (big.size * big.dtype.itemsize + small)


def temporaries(norm, dtype):
    """Bytes of temporaries of a compiled gradient: eight times Dense 1024 -> norm -> relu, of 4096 rows."""

    def loss(kernels, x):
        for kernel in kernels:
            x = jax.nn.relu(norm(x @ kernel, jnp.ones(1024), jnp.zeros(1024)))
        return jnp.sum(x.astype(jnp.float32) ** 2)

    shapes = [jax.ShapeDtypeStruct((1024, 1024), dtype)] * 8, jax.ShapeDtypeStruct((4096, 1024), dtype)
    return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_memory_of_a_deep_net(dtype, monkeypatch):
    """In float32 at most a tenth above the net without norms. In bfloat16 that net keeps one array a layer, as relu
    needs nothing else, and any function that needs its input keeps a second: there an elementwise one is the measure.
    """
    monkeypatch.setattr(cpu, "alone", lambda: True)
    without = {jnp.float32: lambda x, *_: x, jnp.bfloat16: lambda x, *_: lax.erf(x)}[dtype]
    running = jn.running_stats(c=1024)

    def layer(x, scale, bias):
        return jn.layer_norm(x, scale=scale, bias=bias)

    def batch(x, scale, bias):
        return jn.batch_norm(x, running, scale=scale, bias=bias)[0]

    for norm in (layer, batch):
        assert temporaries(norm, dtype) <= (1.1 if dtype == jnp.float32 else 1.06) * temporaries(without, dtype)
