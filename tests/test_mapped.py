"""Mapped axes beside the matrix of test_matrix.py: groups, absent axes, large means, ghosts, what JAX refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

DEVICES, ROWS, CHANNELS = 8, 4, 3
RNG = np.random.default_rng(0)
X, W, TX = (RNG.normal(1, 2, (DEVICES, ROWS, CHANNELS)).astype(np.float32) for _ in range(3))
HOLE = (np.arange(DEVICES * ROWS).reshape(DEVICES, ROWS, 1) % 3 != 1) & (np.arange(DEVICES) != 2)[:, None, None]

make_mesh = functools.partial(jax.make_mesh, (DEVICES,), ("devices",))
AUTO = make_mesh(axis_types=(AxisType.Auto,))
GRID = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def vmap(f):
    return jax.vmap(f, axis_name="devices")


def pmap(f):
    return jax.pmap(f, "devices")


def over_a_grid(outer):
    """Rows of devices as (a, b), b under vmap."""

    def mapping(f):
        mapped = outer(jax.vmap(f, axis_name="b"), axis_name="a")

        def run(*data):
            out = mapped(*(z.reshape(4, 2, *z.shape[1:]) for z in data))
            return jax.tree.map(lambda z: z.reshape(DEVICES, *z.shape[2:]), out)

        return run

    return mapping


def by_mesh(mesh, **options):
    def mapping(f):
        def local(*data):
            return jax.tree.map(lambda z: z[None], f(*(z[0] for z in data)))

        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P(mesh.axis_names),
                                     **options))  # fmt: skip

    return mapping


GROUPED = {
    "vmap": (vmap, "devices"),
    "pmap": (pmap, "devices"),
    "vmap of vmap": (over_a_grid(jax.vmap), "a b"),
    "pmap of vmap": (over_a_grid(jax.pmap), "a b"),
    "shard_map": (by_mesh(AUTO), "devices"),
    "shard_map, check_vma=False": (by_mesh(AUTO, check_vma=False), "devices"),
    "shard_map, two mesh axes": (by_mesh(GRID), "a b"),
}
# groups of the first axis in `over`, and which devices then share statistics
GROUPS = {
    "devices": {
        "equal": ([[0, 1, 2, 3], [4, 5, 6, 7]],) * 2,
        "unequal": ([[0, 2, 5], [1], [3, 4, 6, 7]],) * 2,
    },
    "a b": {
        "equal": ([[0, 2], [1, 3]], [[0, 1, 4, 5], [2, 3, 6, 7]]),
        "unequal": ([[0, 2, 3], [1]], [[0, 1, 4, 5, 6, 7], [2, 3]]),
    },
}


@functools.cache
def plain(group):
    """Of these devices alone: y, the mean, the gradient of the loss and a Hessian-vector product, by plain autodiff."""

    @jax.jit
    def everything(x, m, w, tx):
        n = m.sum((0, 1), keepdims=True)

        def y(x):
            mean = (m * x).sum((0, 1), keepdims=True) / n
            return (x - mean) / jnp.sqrt((m * (x - mean) ** 2).sum((0, 1), keepdims=True) / n + 0.1), mean

        dx = jax.grad(lambda x: jnp.sum(jnp.sin(y(x)[0]) * w))
        return *y(x), dx(x), jax.jvp(dx, (x,), (tx,))[1]

    arrays = [z[np.array(group)].astype(np.float64) for z in (X, np.broadcast_to(HOLE, X.shape), W, TX)]
    with jax.enable_x64(True):
        return [np.asarray(z) for z in everything(*arrays)]


@pytest.mark.parametrize("kind", ["equal", "unequal"])
@pytest.mark.parametrize(("mapping", "names"), GROUPED.values(), ids=GROUPED)
def test_groups_of_devices_under_every_mapping(mapping, names, kind):
    """Each group has the numbers, and the derivatives of first and second order, of its devices alone."""
    parts, members = GROUPS[names][kind]

    def local(x, mask, w, tx):
        def y(x):
            y, stats = jn.standardize(
                x, "n c", f"n {names}", mask=mask, groups={names.split()[0]: parts}, epsilon=0.1
            )
            return y, stats.mean

        dx = jax.grad(lambda x: jnp.sum(jnp.sin(y(x)[0]) * w))
        return *y(x), dx(x), jax.jvp(dx, (x,), (tx,))[1]

    got = mapping(local)(X, HOLE, W, TX)
    for group in members:
        for ours, want in zip(got, plain(tuple(group)), strict=True):
            want = np.broadcast_to(want.reshape(-1, CHANNELS), (len(group), CHANNELS)) if want.shape[1] == 1 else want
            # of the largest number: a second derivative adds products of sums that are larger than itself
            np.testing.assert_allclose(ours[np.array(group)], want, rtol=0, atol=4e-6 * max(1, np.abs(want).max()))


@pytest.mark.parametrize(("mean", "tolerance"), [(1e2, 2e-6), (1e4, 1e-5)])
@pytest.mark.parametrize("mapping", [vmap, by_mesh(AUTO)], ids=["vmap", "shard_map"])
def test_a_large_mean_costs_no_digits_across_devices(mapping, mean, tolerance):
    """N(mean, 1), float32: Flax's psum of raw moments is off by 1.5e-3 and by 25 here."""
    x = RNG.normal(mean, 1, (DEVICES, 200, 3)).astype(np.float32)
    stats = mapping(lambda x: jn.moments(x, "n c", "n devices"))(x)
    want = x.reshape(-1, 3).astype(np.float64).var(0)
    np.testing.assert_allclose(stats.m2[0] / stats.count[0], want, rtol=tolerance)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_large_mean_costs_no_digits_under_jit(kind):
    """The parts of a sharded batch are merged like devices: see sharded.py."""
    x = RNG.normal(1e4, 1, (DEVICES * 64, 3)).astype(np.float32)
    mesh = make_mesh(axis_types=(kind,))
    with jax.set_mesh(mesh):
        stats = jax.jit(lambda x: jn.moments(x, "n c", "n"))(jax.device_put(x, NamedSharding(mesh, P("devices"))))
    np.testing.assert_allclose(stats.var, x.astype(np.float64).var(0), rtol=1e-6)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_weights_and_their_gradient_in_parts(kind, center):
    """What the matrix leaves out of a batch that jit has cut: weights, some of them 0, complex x, RMS."""
    x = (RNG.normal(1, 2, (512, 3)) + 1j * RNG.normal(size=(512, 3))).astype(np.complex64)
    weights = np.where(np.arange(512) % 5 == 0, 0, RNG.uniform(0.5, 2, 512)).astype(np.float32)[:, None]

    def loss(x, weights, standardize):
        y, var = standardize(x, weights)
        return jnp.sum(jnp.cos(jnp.real(y)) * jnp.arange(3.0)[None]) + jnp.sum(var)

    def ours(x, weights):
        y, stats = jn.standardize(x, "n c", "n", weights=weights, center=center, epsilon=0.1)
        return y, stats.var

    def plain(x, w):
        n = w.sum()
        c = x - center * (w * x).sum(0, keepdims=True) / n
        var = (w * (c.real**2 + c.imag**2)).sum(0, keepdims=True) / n
        return c / jnp.sqrt(var + 0.1), var

    mesh = make_mesh(axis_types=(kind,))
    put = [jax.device_put(z, NamedSharding(mesh, P("devices"))) for z in (x, weights)]
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(functools.partial(loss, standardize=ours), (0, 1)))(*put)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        want = jax.grad(functools.partial(loss, standardize=plain), (0, 1))(x.astype(complex), weights.astype(float))
        want = [np.asarray(z) for z in want]
    counted = weights[:, 0] != 0  # weight 0 is a masked slot, which has no gradient of its own weight
    got = [np.asarray(z) for z in got]
    np.testing.assert_allclose(got[0], want[0], atol=2e-6)
    np.testing.assert_allclose(got[1][counted], want[1][counted], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("lies", [P(), P("a"), P("a", "b")], ids=str)
@pytest.mark.parametrize("what", ["mask", "weights"])
def test_a_mask_may_lie_in_another_way_than_x(what, lies):
    """Explicit axis types: x cut along both dimensions, mask or weights (n, 1) or (n, c), replicated or not."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = RNG.normal(1, 2, (16, 4)).astype(np.float32)
    slots = (RNG.random((16, 4 if len(lies) == 2 else 1)) < 0.7).astype(np.float32)
    put = [jax.device_put(z, NamedSharding(mesh, spec)) for z, spec in ((x, P("a", "b")), (slots, lies))]

    def loss(x, slots):
        slots = slots > 0 if what == "mask" else slots
        y, stats = jn.standardize(x, "n c", "n", epsilon=0.1, **{what: slots})
        return jnp.sum(jnp.sin(y)) + jnp.sum(stats.count)

    got = np.asarray(jax.jit(jax.grad(loss))(*put))
    m = np.broadcast_to(slots, x.shape).astype(float)
    c = x - (m * x).sum(0) / m.sum(0)
    r = 1 / np.sqrt((m * c**2).sum(0) / m.sum(0) + 0.1)
    g = np.cos(c * r)
    np.testing.assert_allclose(got, r * (g - m * (g.sum(0) + c * r * (g * c * r).sum(0)) / m.sum(0)), atol=3e-6)


def test_an_empty_batch_that_lies_on_devices():
    mesh = make_mesh(axis_types=(AxisType.Explicit,))
    x = jax.device_put(np.zeros((0, 3), np.float32), NamedSharding(mesh, P("devices")))
    y, running = jax.jit(lambda x: jn.batch_norm(x, jn.running_stats(c=3), "n c", "n"))(x)
    assert y.shape == (0, 3)
    np.testing.assert_array_equal(running.var, np.ones(3))


def test_an_optional_axis_is_reduced_where_bound_and_skipped_where_not():
    def mean(x):
        return jn.moments(x, "n c", "n devices?").mean

    np.testing.assert_allclose(jax.vmap(mean, axis_name="devices")(X)[0], X.reshape(-1, CHANNELS).mean(0), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(mean)(X), X.mean(1), rtol=1e-6)


def test_replicated_data_counts_once_for_every_device():
    """Moments over an axis along which x is the same are those of that many copies, with and without types."""
    for check_vma in (True, False):
        mapped = jax.shard_map(
            lambda x: jn.moments(x, "n c", "n devices"), mesh=AUTO, in_specs=P(), out_specs=P(), check_vma=check_vma
        )
        stats = mapped(X[0])
        np.testing.assert_array_equal(stats.count, np.full(CHANNELS, DEVICES * ROWS))
        np.testing.assert_allclose(stats.var, X[0].astype(np.float64).var(0), rtol=3e-7)


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


def test_group_norm_of_channels_that_lie_apart():
    """Explicit axis types: right where every device holds whole groups, one clear error where none does."""
    x = RNG.normal(size=(2, 3, 16)).astype(np.float32)
    sharded_x = jax.device_put(x, NamedSharding(make_mesh(axis_types=(AxisType.Explicit,)), P(None, None, "devices")))
    groups = x.reshape(2, 3, 8, 2).astype(np.float64)
    want = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    y = jax.jit(lambda x: jn.group_norm(x, 8))(sharded_x)
    np.testing.assert_allclose(y, want.reshape(x.shape), rtol=1e-5, atol=2e-6)
    with pytest.raises(jn.LayoutError, match=r"group_norm: .* lies in 8 parts .* 4 is not a multiple of 8"):
        jax.jit(lambda x: jn.group_norm(x, 4))(sharded_x)


def test_a_vmap_axis_inside_checked_shard_map_is_refused_with_advice():
    """JAX itself cannot: a bare AssertionError without us. The advice is followed in the second half."""

    def inner(x):
        return jax.vmap(lambda x: jn.moments(x, "n c", "n members").mean, axis_name="members")(x)

    def run(**options):
        return jax.shard_map(inner, mesh=AUTO, in_specs=P("devices"), out_specs=P("devices"), **options)

    x = RNG.normal(size=(DEVICES * 2, 5, 3)).astype(np.float32)
    with pytest.raises(jn.AxisError, match=r"'members' is an axis of vmap .* dimension of the layout .* check_vma=Fal"):
        run()(x)
    want = np.repeat(x.reshape(DEVICES, 10, 3).mean(1), 2, 0)
    np.testing.assert_allclose(run(check_vma=False)(x), want, rtol=2e-5, atol=1e-6)
    as_dimension = jax.shard_map(
        lambda x: jn.moments(x, "m n c", "m n").mean[None], mesh=AUTO, in_specs=P("devices"), out_specs=P("devices")
    )
    np.testing.assert_allclose(as_dimension(x), want[::2], rtol=2e-5, atol=1e-6)


def test_local_state_is_a_scan_carry_once_it_varies():
    """Under check_vma=True a device's own statistics need a carry that varies from the start: the README's pcast."""

    def local(x):
        running = lax.pcast(jn.running_stats(c=CHANNELS), "devices", to="varying")
        running, _ = lax.scan(lambda r, x: jn.batch_norm(x, r, "n c", "n")[::-1], running, jnp.stack([x, x]))
        return running.mean[None]

    mean = jax.shard_map(local, mesh=AUTO, in_specs=P("devices"), out_specs=P("devices"))(X.reshape(-1, CHANNELS))
    np.testing.assert_allclose(mean, (1 - 0.99**2) * X.mean(1), rtol=1e-5)
