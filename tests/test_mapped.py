"""Statistics across devices: the same numbers and gradients under every mapping, in one collective.

The reference is one device on the whole batch in float64 NumPy, with the gradient written out:
with g = dL/dy, c = x - mean, r = 1 / sqrt(var + epsilon), xh = c r and n counted elements,

    dL/dx = r (g s - m (sum(g s) / n + xh sum(g s xh) / n)),   dL/ds = sum(g xh),   dL/db = sum(g)

where the sums run over every slot of y (masked ones are normalized too) and m is 1 where a slot counts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

DEVICES, ROWS, CHANNELS = 8, 3, 5
RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (DEVICES, ROWS, CHANNELS)).astype(np.float32)
W = RNG.normal(size=X.shape).astype(np.float32)
SCALE = np.linspace(0.5, 1.5, CHANNELS, dtype=np.float32)
BIAS = np.linspace(-1, 1, CHANNELS, dtype=np.float32)
UNEVEN = np.arange(DEVICES * ROWS).reshape(DEVICES, ROWS, 1) % 4 != 1
HOLE = UNEVEN & (np.arange(DEVICES) != 2)[:, None, None]
MASKS = {"none": None, "uneven": UNEVEN, "one device empty": HOLE, "all empty": np.zeros_like(UNEVEN)}

make_mesh = functools.partial(jax.make_mesh, (DEVICES,), ("devices",))
AUTO = make_mesh(axis_types=(AxisType.Auto,))
GRID = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def reference(x, mask, w, epsilon=1e-5, momentum=0.99):
    x, w, s, b = (np.asarray(z, np.float64) for z in (x.reshape(-1, CHANNELS), w.reshape(-1, CHANNELS), SCALE, BIAS))
    m = np.ones(x.shape) if mask is None else np.broadcast_to(mask.reshape(-1, 1), x.shape).astype(float)
    n = np.maximum(m.sum(0), 1)
    mean = (m * x).sum(0) / n
    var = (m * (x - mean) ** 2).sum(0) / n
    r = 1 / np.sqrt(var + epsilon)
    xh = (x - mean) * r
    g = np.cos(xh * s + b) * w
    dx = r * (g * s - m * ((g * s).sum(0) / n + xh * (g * s * xh).sum(0) / n))
    counted = m.sum(0) > 0
    running = (np.where(counted, (1 - momentum) * mean, 0), np.where(counted, momentum + (1 - momentum) * var, 1))
    return np.sum(np.sin(xh * s + b) * w), running, dx, (g * xh).sum(0), g.sum(0)


def step(over, x, w, mask, scale, bias):
    """Loss, new running statistics and gradients of one device, before any reduction of ours."""

    def loss(x, scale, bias):
        y, running = jn.batch_norm(x, jn.running_stats(c=CHANNELS), "n c", over, scale=scale, bias=bias, mask=mask)
        return jnp.sum(jnp.sin(y) * w), (running.mean, running.var)

    (value, running), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return value, running, *grads


def by_device(mapped):
    """Run where every device returns its own part: local losses and parameter gradients are partial sums."""

    def run(over, *data):
        value, running, dx, ds, db = mapped(functools.partial(step, over))(*data, SCALE, BIAS)
        for statistic in running:
            np.testing.assert_array_equal(statistic, np.broadcast_to(statistic[:1], statistic.shape))
        return value.sum(), tuple(s[0] for s in running), dx, ds.sum(0), db.sum(0)

    return run


IN_AXES = (0, 0, 0, None, None)


def vmap(f):
    return jax.vmap(f, IN_AXES, axis_name="devices")


def pmap(f):
    return jax.pmap(f, "devices", in_axes=IN_AXES)


def pmap_of_vmap(f):
    inner = jax.vmap(f, IN_AXES, axis_name="b")

    def run(*data):
        *batch, scale, bias = data
        grid = [None if z is None else z.reshape(4, 2, *z.shape[1:]) for z in batch]
        out = jax.pmap(inner, "a", in_axes=IN_AXES)(*grid, scale, bias)
        return jax.tree.map(lambda z: z.reshape(DEVICES, *z.shape[2:]), out)

    return run


def unchecked(f):
    def local(*data):
        first = [None if z is None else z[0] for z in data[:3]]
        return jax.tree.map(lambda z: z[None], f(*first, *data[3:]))

    specs = (P("devices"),) * 3 + (P(), P())
    return jax.jit(jax.shard_map(local, mesh=AUTO, in_specs=specs, out_specs=P("devices"), check_vma=False))


def in_scan(f):
    """The second of two steps of a scan inside vmap; the carry only carries."""

    def twice(*data):
        return jax.tree.map(lambda z: z[1], lax.scan(lambda c, _: (c, f(*data)), 0, length=2)[1])

    return vmap(twice)


def checked(mesh, axes, **options):
    """Under check_vma=True the state is replicated and parameter gradients arrive summed."""

    def run(over, x, w, mask):
        def local(*data):
            value, running, *grads = step(over, *data)
            return lax.psum(value, axes), running, *grads

        split, whole = P(axes), P()
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(split, split, split, whole, whole),
            out_specs=(whole, (whole, whole), split, whole, whole), **options,
        )  # fmt: skip
        flat = [None if z is None else z.reshape(-1, z.shape[-1]) for z in (x, w, mask)]
        return jax.jit(mapped)(*flat, SCALE, BIAS)

    return run


def sharded(axis_type):
    """jit over sharded arrays: the statistics are global already, no axis is named."""

    def run(over, *data):
        mesh = make_mesh(axis_types=(axis_type,))

        def put(z, spec):
            return None if z is None else jax.device_put(z, NamedSharding(mesh, spec))

        rows = [None if z is None else put(z.reshape(-1, z.shape[-1]), P("devices")) for z in data]
        return jax.jit(functools.partial(step, over))(*rows, put(SCALE, P()), put(BIAS, P()))

    return run


def one_device(over, *data):
    return step(over, *(None if z is None else z.reshape(-1, z.shape[-1]) for z in data), SCALE, BIAS)


CONTEXTS = {
    "one device": ("n", one_device),
    "vmap": ("n devices", by_device(vmap)),
    "pmap": ("n devices", by_device(pmap)),
    "pmap of vmap": ("n a b", by_device(pmap_of_vmap)),
    "scan in vmap": ("n devices", by_device(in_scan)),
    "shard_map check_vma=False": ("n devices", by_device(unchecked)),
    "shard_map check_vma=True": ("n devices", checked(AUTO, "devices")),
    "shard_map two axes": ("n a b", checked(GRID, ("a", "b"))),
    "shard_map one axis to the compiler": ("n a", checked(GRID, "a", axis_names={"a"})),
    "jit auto": ("n devices?", sharded(AxisType.Auto)),
    "jit explicit": ("n", sharded(AxisType.Explicit)),
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("over", "run"), CONTEXTS.values(), ids=CONTEXTS)
def test_every_mapping_equals_one_device(over, run, mask):
    value, running, dx, ds, db = run(over, X, W, mask)
    want_value, want_running, want_dx, want_ds, want_db = reference(X, mask, W)
    # an epsilon of 1e-5 under an empty mask makes y as large as |x| / sqrt(1e-5) = 3000, and sin(y) turns its rounding
    # into an error of 3000 * 6e-8; elsewhere the sums of 24 terms of order 1 leave a few units of float32
    tolerance = 3e-3 if mask is not None and not mask.any() else 4e-6
    scale = max(1.0, np.abs(want_dx).max())
    np.testing.assert_allclose(value, want_value, atol=20 * tolerance)
    for got, want in zip(running, want_running, strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-7)
    np.testing.assert_allclose(np.reshape(dx, want_dx.shape), want_dx, atol=tolerance * scale)
    np.testing.assert_allclose(ds, want_ds, atol=tolerance * 20 * scale)
    np.testing.assert_allclose(db, want_db, atol=tolerance * 20)


FEATURE_NORMS = {
    "layer": (jn.layer_norm, True),
    "rms": (jn.rms_norm, False),
}


@pytest.mark.parametrize(("norm", "center"), FEATURE_NORMS.values(), ids=FEATURE_NORMS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_features(norm, center, check_vma):
    """Layer and RMS norm over features that lie on eight devices equal those on one."""
    x = RNG.normal(3, 2, (4, 16)).astype(np.float32)
    scale, w = RNG.normal(size=16).astype(np.float32), RNG.normal(size=(4, 16)).astype(np.float32)

    def grads(over, x, w, scale):
        return jax.grad(lambda x, s: jnp.sum(norm(x, "n c", over, scale=s) * w), (0, 1))(x, scale)

    parts = (P(None, "devices"), P(None, "devices"), P("devices"))
    mapped = jax.shard_map(
        functools.partial(grads, "c devices"),
        mesh=AUTO,
        in_specs=parts,
        out_specs=(parts[0], parts[2]),
        check_vma=check_vma,
    )
    dx, ds = jax.jit(mapped)(x, w, scale)
    x64 = x.astype(np.float64)
    c = x64 - x64.mean(1, keepdims=True) if center else x64
    r = 1 / np.sqrt((c**2).mean(1, keepdims=True) + 1e-6)
    g = w * scale
    want = r * (g - center * g.mean(1, keepdims=True) - c * r * (g * c * r).mean(1, keepdims=True))
    np.testing.assert_allclose(dx, want, atol=2e-6)
    np.testing.assert_allclose(ds, (w * c * r).sum(0), atol=4e-6)


def test_one_collective_forward_and_one_backward():
    def count(f, *arrays):
        mapped = jax.shard_map(f, mesh=AUTO, in_specs=P("devices"), out_specs=P("devices"))
        text = jax.jit(mapped).lower(*arrays).compile().as_text()
        return sum(
            text.count(f" {op}(") for op in ("all-reduce", "all-gather", "collective-permute", "all-reduce-start")
        )

    rows, mask = X.reshape(-1, CHANNELS), UNEVEN.reshape(-1, 1)

    def y(x, m=None):
        return jn.standardize(x, "n c", "n devices", mask=m)[0]

    def dx(x, m=None):
        return jax.grad(lambda x: jnp.sum(jnp.sin(y(x, m))))(x)

    assert [count(y, rows), count(y, rows, mask), count(dx, rows), count(dx, rows, mask)] == [1, 1, 2, 2]


@pytest.mark.parametrize(("mean", "tolerance"), [(1e2, 2e-6), (1e4, 1e-5)])
def test_a_large_mean_costs_no_digits_across_devices(mean, tolerance):
    """N(mean, 1), float32: Flax's psum of raw moments is off by 1.5e-3 and by 25 here."""
    x = RNG.normal(mean, 1, (DEVICES, 200, 3)).astype(np.float32)
    stats = jax.vmap(lambda x: jn.moments(x, "n c", "n devices"), axis_name="devices")(x)
    want = x.reshape(-1, 3).astype(np.float64).var(0)
    np.testing.assert_allclose(stats.m2[0] / stats.count[0], want, rtol=tolerance)


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2, 5], [1], [3, 4, 6, 7]]])
@pytest.mark.parametrize("mapping", [vmap, pmap, unchecked], ids=["vmap", "pmap", "shard_map check_vma=False"])
def test_groups(mapping, groups):
    def local(x, w, mask, scale, bias):
        def loss(x):
            y, stats = jn.standardize(
                x, "n c", "n devices", mask=mask, groups={"devices": groups}, scale=scale, bias=bias
            )
            return jnp.sum(jnp.sin(y) * w), stats.mean

        (value, mean), dx = jax.value_and_grad(loss, has_aux=True)(x)
        return value, mean, dx

    value, _, dx = mapping(local)(X, W, HOLE, SCALE, BIAS)
    for group in groups:
        want_value, _, want_dx, _, _ = reference(X[group], HOLE[group], W[group])
        np.testing.assert_allclose(value[np.array(group)].sum(), want_value, atol=1e-5)
        # a device alone has two rows, nearly equal in one channel: gradients of 200 there, hence a relative term
        np.testing.assert_allclose(dx[np.array(group)].reshape(-1, CHANNELS), want_dx, rtol=2e-6, atol=4e-6)


def test_groups_under_check_vma():
    groups = {"devices": [[0, 1, 2], [3, 4, 5, 6, 7]]}

    def local(x):
        return jn.standardize(x, "n c", "n devices", groups=groups)[1].mean[None]

    mean = jax.shard_map(local, mesh=AUTO, in_specs=P("devices"), out_specs=P("devices"))(X.reshape(-1, CHANNELS))
    for group in groups["devices"]:
        want = X[group].reshape(-1, CHANNELS).astype(np.float64).mean(0)
        np.testing.assert_allclose(mean[np.array(group)], np.broadcast_to(want, (len(group), CHANNELS)), rtol=3e-7)


def test_state_leaves_shard_map_replicated_when_and_only_when_it_was_synced():
    def run(over):
        def local(x):
            return jn.batch_norm(x, jn.running_stats(c=CHANNELS), "n c", over)[1]

        return jax.shard_map(local, mesh=AUTO, in_specs=P("devices"), out_specs=P())(X.reshape(-1, CHANNELS))

    assert run("n devices").mean.shape == (CHANNELS,)
    with pytest.raises(ValueError, match="out_specs"):
        run("n")


def test_an_optional_axis_is_reduced_where_bound_and_skipped_where_not():
    def mean(x):
        return jn.moments(x, "n c", "n devices?").mean

    np.testing.assert_allclose(jax.vmap(mean, axis_name="devices")(X)[0], X.reshape(-1, CHANNELS).mean(0), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(mean)(X), X.mean(1), rtol=1e-6)


def test_every_order_of_derivative_crosses_devices():
    """Hessian-vector product and gradient penalty of synced batch norm equal those of one device."""

    def penalty(over, x, w):
        def loss(x):
            return jnp.sum(jnp.sin(jn.standardize(x, "n c", over, scale=SCALE, bias=BIAS)[0]) * w)

        return loss, jax.grad(loss)

    def products(over, gather):
        def run(x, w):
            _, dx = penalty(over, x, w)
            hvp = jax.jvp(dx, (x,), (w,))[1]
            forward = jax.jvp(lambda x: jn.standardize(x, "n c", over)[1].var, (x,), (w,))[1]
            return hvp, gather(forward)

        return run

    flat = X.reshape(-1, CHANNELS), W.reshape(-1, CHANNELS)
    want = products("n", lambda z: z)(*flat)
    mapped = jax.vmap(products("n devices", lambda z: z), axis_name="devices")(X, W)
    np.testing.assert_allclose(mapped[0].reshape(-1, CHANNELS), want[0], atol=5e-5)
    np.testing.assert_allclose(mapped[1][0], want[1], atol=5e-6)
    specs = (P("devices"), P("devices"))
    for check_vma in (True, False):
        shard = jax.shard_map(
            products("n devices", lambda z: z),
            mesh=AUTO,
            in_specs=specs,
            out_specs=(P("devices"), P()),
            check_vma=check_vma,
        )
        got = jax.jit(shard)(*flat)
        np.testing.assert_allclose(got[0], want[0], atol=5e-5)
        np.testing.assert_allclose(got[1], want[1], atol=5e-6)


def test_running_statistics_meet_sharded_channels():
    """Explicit axis types: replicated state and moments of sharded channels, as where a model is split by channel."""
    mesh = make_mesh(axis_types=(AxisType.Explicit,))
    x = RNG.normal(size=(6, 16)).astype(np.float32)
    sharded_x = jax.device_put(x, NamedSharding(mesh, P(None, "devices")))
    running = jax.device_put(jn.running_stats(c=16), NamedSharding(mesh, P()))
    y, new = jax.jit(lambda x, running: jn.batch_norm(x, running, "n c", "n"))(sharded_x, running)
    np.testing.assert_allclose(new.mean, 0.01 * x.mean(0), atol=1e-8)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), atol=1e-6)


def test_ghosts_along_a_sharded_batch():
    """Explicit axis types: the parts of the batch lie on the devices, and merging them needs no gather."""
    mesh = make_mesh(axis_types=(AxisType.Explicit,))
    x = RNG.normal(size=(16, 3)).astype(np.float32)
    sharded_x = jax.device_put(x, NamedSharding(mesh, P("devices")))

    @jax.jit
    def step(x):
        return jn.batch_norm(x, jn.running_stats(c=3), "(m n) c", "n", features="c", sizes={"m": 8}, momentum=0.0)

    y, running = step(sharded_x)
    parts = x.reshape(8, 2, 3).astype(np.float64)
    want = (parts - parts.mean(1, keepdims=True)) / np.sqrt(parts.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, want.reshape(16, 3), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(running.var, x.astype(np.float64).var(0), rtol=1e-6)


def test_local_state_is_a_scan_carry_once_it_varies():
    """Under check_vma=True a device's own statistics need a carry that varies from the start: the README's pcast."""

    def local(x):
        running = lax.pcast(jn.running_stats(c=CHANNELS), "devices", to="varying")
        running, _ = lax.scan(lambda r, x: jn.batch_norm(x, r, "n c", "n")[::-1], running, jnp.stack([x, x]))
        return running.mean[None]

    mean = jax.shard_map(local, mesh=AUTO, in_specs=P("devices"), out_specs=P("devices"))(X.reshape(-1, CHANNELS))
    np.testing.assert_allclose(mean, (1 - 0.99**2) * X.mean(1), rtol=1e-5)
