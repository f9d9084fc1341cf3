"""State that cannot lie, and gradients that are summed exactly once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

DEVICES, C = 8, 3
RNG = np.random.default_rng(0)
X = RNG.normal(np.arange(DEVICES)[:, None, None], 1, (DEVICES, 5, C)).astype(np.float32)  # means far apart
MESH = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))


def vmap(f):
    return jax.vmap(f, axis_name="devices")


def pmap(f):
    return jax.pmap(f, "devices")


def shard_map(f, **options):
    def local(x):
        return jax.tree.map(lambda z: z[None], f(x[0]))

    return jax.jit(jax.shard_map(local, mesh=MESH, in_specs=P("devices"), out_specs=P("devices"), **options))


MAPPINGS = {
    "vmap": vmap,
    "pmap": pmap,
    "shard_map": shard_map,
    "shard_map, check_vma=False": functools.partial(shard_map, check_vma=False),
}


def own_state(x, steps=1):
    """The state of one device that never heard of the others."""
    running = jn.running_stats(c=C)
    if jax.sharding.get_abstract_mesh().manual_axes:
        running = lax.pcast(running, "devices", to="varying")
    for _ in range(steps):
        running = jn.batch_norm(x, running, "n c", "n", momentum=0.0)[1]
    return running


# ------------------------------------------------------------------------------------------------------ sync_state


@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
def test_sync_state_pools_with_the_variance_between_the_devices(mapping):
    state = mapping(lambda x: jn.sync_state(own_state(x), "devices"))(X)
    whole = X.reshape(-1, C).astype(np.float64)
    for i in range(DEVICES):  # every device holds the same
        np.testing.assert_allclose(state.mean[i], whole.mean(0), rtol=3e-7)
        np.testing.assert_allclose(state.var[i], whole.var(0), rtol=5e-7)  # a mean of variances would be 1, not 6
    np.testing.assert_array_equal(state.num_updates, np.ones(DEVICES))


@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
def test_a_device_weighs_as_its_updates(mapping):
    """Devices 0 and 1 with 1 and 3 updates, the others with none: means 2 and 6, variances 1 and 4."""
    mean, var, updates = np.zeros((DEVICES, C)), np.ones((DEVICES, C)), np.zeros(DEVICES, np.int32)
    mean[:2], var[:2], updates[:2] = [[2.0], [6.0]], [[1.0], [4.0]], [1, 3]

    def local(i):
        own = (jnp.asarray(z)[i] for z in (mean.astype(np.float32), var.astype(np.float32), updates))
        return jn.sync_state(jn.RunningStats(*own, ("c",)))

    state = mapping(local)(np.arange(DEVICES))
    np.testing.assert_allclose(state.mean, np.full((DEVICES, C), (2 + 3 * 6) / 4))
    np.testing.assert_allclose(state.var, np.full((DEVICES, C), (1 + 9 + 3 * (4 + 1)) / 4), rtol=2e-7)
    np.testing.assert_array_equal(state.num_updates, np.full(DEVICES, 3))


def test_a_state_without_updates_and_a_synced_state_stay_as_they_are():
    def local(x):
        fresh, once = jn.sync_state(jn.running_stats(c=C)), jn.sync_state(own_state(x))
        return fresh, once, jn.sync_state(once)

    mapped = jax.shard_map(local, mesh=MESH, in_specs=P("devices"), out_specs=P())
    fresh, once, twice = jax.jit(mapped)(X.reshape(-1, C))
    for new, old in ((fresh, jn.running_stats(c=C)), (twice, once)):
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-7)  # the mean of eight equal numbers, rounded


def test_sync_state_over_two_axes_and_absent_ones():
    def local(x):
        return jn.sync_state(own_state_grid(x), "a b absent?")

    def own_state_grid(x):
        return jn.batch_norm(x, jn.running_stats(c=C), "n c", "n", momentum=0.0)[1]

    grid = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    state = jax.jit(jax.shard_map(local, mesh=grid, in_specs=P(("a", "b")), out_specs=P()))(X.reshape(-1, C))
    np.testing.assert_allclose(state.var, X.reshape(-1, C).astype(np.float64).var(0), rtol=5e-7)
    alone = own_state_grid(X[0])
    assert jn.sync_state(alone, "devices?") is alone
    with pytest.raises(jn.AxisError, match=r"sync_state: 'devices' in over is no mapped axis"):
        jn.sync_state(alone)


def test_synced_state_leaves_shard_map_unsynced_cannot_and_sync_state_is_the_way():
    def run(finish):
        mapped = jax.shard_map(lambda x: finish(x), mesh=MESH, in_specs=P("devices"), out_specs=P())
        return jax.jit(mapped)(X.reshape(-1, C))

    def train(over):
        return lambda x: jn.batch_norm(x, jn.running_stats(c=C), "n c", over, momentum=0.0)[1]

    whole = X.reshape(-1, C).astype(np.float64)
    for state in (run(train("n devices")), run(lambda x: jn.sync_state(train("n")(x)))):
        np.testing.assert_allclose(state.var, whole.var(0), rtol=5e-7)
    with pytest.raises(ValueError, match="out_specs"):
        run(train("n"))


# ----------------------------------------------------------------------------------------- the state as a program's


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_synced_state_is_a_carry_a_donated_argument_and_keeps_its_dtype(dtype):
    """Three steps of a scan inside shard_map, the state donated; its bytes are reused, its type is unchanged."""

    def local(x, running):
        return lax.scan(lambda r, _: (jn.batch_norm(x, r, "n c", "n devices", momentum=0.5)[1], None), running,
                        length=3)[0]  # fmt: skip

    mapped = jax.shard_map(local, mesh=MESH, in_specs=(P("devices"), P()), out_specs=P())
    fresh = jn.running_stats(c=C)
    start = jn.RunningStats(fresh.mean.astype(dtype), fresh.var.astype(dtype), fresh.num_updates, fresh.axes)
    start = jax.device_put(start, NamedSharding(MESH, P()))
    end = jax.jit(mapped, donate_argnums=1)(X.reshape(-1, C), start)
    assert [z.is_deleted() for z in jax.tree.leaves(start)] == [True, True, True]
    assert (end.mean.dtype, end.var.dtype, end.num_updates.dtype) == (dtype, dtype, jnp.int32)
    whole = X.reshape(-1, C).astype(np.float64)
    rtol = 2e-2 if dtype == jnp.bfloat16 else 1e-6  # bfloat16 rounds by 4e-3, three times
    np.testing.assert_allclose(end.mean.astype(np.float32), whole.mean(0) * 7 / 8, rtol=rtol)
    np.testing.assert_allclose(end.var.astype(np.float32), 1 / 8 + whole.var(0) * 7 / 8, rtol=rtol)


@pytest.mark.parametrize("lies", [P(), P("devices")])
@pytest.mark.parametrize("channels", [P(), P("devices")])
def test_state_keeps_its_sharding_where_that_is_its_type(lies, channels):
    """Explicit axis types: replicated or sharded state, met by channels that are or are not."""
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Explicit,))
    x = RNG.normal(size=(6, 16)).astype(np.float32)
    sharded_x = jax.device_put(x, NamedSharding(mesh, P(None, *channels)))
    fresh = jn.running_stats(c=16)
    mean, var = (jax.device_put(z, NamedSharding(mesh, lies)) for z in (fresh.mean, fresh.var))
    running = jn.RunningStats(mean, var, jax.device_put(fresh.num_updates, NamedSharding(mesh, P())), fresh.axes)

    @jax.jit
    def steps(x, running):
        return lax.scan(lambda r, _: jn.batch_norm(x, r, "n c", "n", momentum=0.5)[::-1], running, length=2)

    new, y = steps(sharded_x, running)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(running), strict=True):
        assert jax.typeof(a).sharding.spec == jax.typeof(b).sharding.spec
    np.testing.assert_allclose(new.mean, 0.75 * x.astype(np.float64).mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(y[1], (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), atol=2e-6)


# ------------------------------------------------------------------------------------------------ reduce_gradients

PARAMS = {"w": np.array([0.5, -1.0, 2.0], np.float32), "b": np.float32(0.3)}


def local_loss(params, x):
    return jnp.sum(jnp.sin(x * params["w"][None] + params["b"]))


def true_gradient(mean):
    """In float64. In float32 40 terms, each up to x = 10 times a cosine that is off by 1e-6, leave 5e-5 at most."""
    x = X.reshape(-1, C).astype(np.float64)
    g = np.cos(x * PARAMS["w"] + PARAMS["b"])
    return {"w": (g * x).sum(0) / (DEVICES if mean else 1), "b": g.sum() / (DEVICES if mean else 1)}


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
def test_the_sum_exactly_once_in_every_context(mapping, mean):
    grads = mapping(lambda x: jn.reduce_gradients(jax.grad(local_loss)(PARAMS, x), "devices", mean=mean))(X)
    for name, want in true_gradient(mean).items():
        np.testing.assert_allclose(grads[name], np.broadcast_to(want, grads[name].shape), atol=5e-5)


def test_the_trap_that_it_is_there_for():
    """PEERS.md row 5: pmean of a gradient is right under check_vma=False and eight times too large under True."""

    def run(reduce, **options):
        mapped = jax.shard_map(
            lambda x: reduce(jax.grad(local_loss)(PARAMS, x))["w"], mesh=MESH, in_specs=P("devices"), out_specs=P(),
            **options,
        )  # fmt: skip
        return jax.jit(mapped)(X.reshape(-1, C))

    want = true_gradient(mean=True)["w"]
    pmean = functools.partial(lax.pmean, axis_name="devices")
    np.testing.assert_allclose(run(pmean, check_vma=False), want, rtol=1e-5)
    np.testing.assert_allclose(run(pmean), DEVICES * want, rtol=1e-5)
    for check_vma in (True, False):
        ours = run(functools.partial(jn.reduce_gradients, mean=True), check_vma=check_vma)
        np.testing.assert_allclose(ours, want, rtol=1e-5)


def test_parameters_that_differ_between_devices_are_summed_under_check_vma_too():
    """Cast to varying, as a user may: JAX leaves those gradients partial, beside others that it has summed."""

    def local(x):
        own = {"w": lax.pcast(jnp.asarray(PARAMS["w"]), "devices", to="varying"), "b": jnp.asarray(PARAMS["b"])}
        return jn.reduce_gradients(jax.grad(local_loss)(own, x))

    grads = jax.jit(jax.shard_map(local, mesh=MESH, in_specs=P("devices"), out_specs=P()))(X.reshape(-1, C))
    for name, want in true_gradient(mean=False).items():
        np.testing.assert_allclose(grads[name], want, atol=5e-5)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
def test_a_loss_that_is_the_same_everywhere_has_to_vary(mapping, mean):
    """Weight decay by itself: cast to varying it is one loss for each device in every context (see the docstring)."""

    def local(x):
        def decay(w):
            loss = jnp.sum(w**2) / 2
            manual = jax.sharding.get_abstract_mesh().manual_axes
            return lax.pcast(loss, "devices", to="varying") if manual else loss

        return jn.reduce_gradients(jax.grad(decay)(jnp.asarray(PARAMS["w"])), mean=mean)

    want = PARAMS["w"] * (1 if mean else DEVICES)
    np.testing.assert_allclose(mapping(local)(X), np.broadcast_to(want, (DEVICES, C)), rtol=1e-6)


def test_leaves_that_are_no_gradients():
    def local(x):
        grads = jax.grad(lambda w, k: jnp.sum(w * x) + k.astype(jnp.float32), (0, 1), allow_int=True)(1.0, np.int32(2))
        (w, k), scalars = jn.reduce_gradients(grads, mean=True), jn.reduce_gradients({"a": 1.0, "none": None})
        assert k.dtype == jax.dtypes.float0
        return w, scalars["a"]

    w, a = vmap(local)(X)
    np.testing.assert_allclose(w[0], X.astype(np.float64).sum() / DEVICES, rtol=1e-6)
    np.testing.assert_array_equal(a, np.full(DEVICES, 8.0))
    with pytest.raises(ValueError, match=r"reduce_gradients: grads\['step'\] has dtype int32"):
        vmap(lambda x: jn.reduce_gradients({"step": jnp.asarray(3)}))(X)


def test_under_jit_there_is_nothing_left_to_do():
    whole = jax.device_put(X.reshape(-1, C), NamedSharding(MESH, P("devices")))
    grads = jax.jit(lambda x: jn.reduce_gradients(jax.grad(local_loss)(PARAMS, x), "devices?"))(whole)
    for name, want in true_gradient(mean=False).items():
        np.testing.assert_allclose(grads[name], want, atol=5e-5)
    with pytest.raises(jn.AxisError, match=r"reduce_gradients: 'device' in over is no mapped axis"):
        jn.reduce_gradients(grads, "device")


def test_one_training_step_is_the_same_step_everywhere():
    """What the README promises: one function, moved from vmap to pmap to shard_map, and not a line of it changes."""
    optimizer = optax.sgd(0.1)
    params = {"scale": np.ones(C, np.float32), "bias": np.zeros(C, np.float32)}

    def step(x):
        def loss(params):
            y, running = jn.batch_norm(x, jn.running_stats(c=C), "n c", "n devices", **params)
            return jnp.mean(jnp.sin(y) * jnp.arange(3.0)[None]), running

        grads, running = jax.grad(loss, has_aux=True)(params)
        updates, _ = optimizer.update(jn.reduce_gradients(grads, mean=True), optimizer.init(params))
        return optax.apply_updates(params, updates), running

    x = X.reshape(-1, C).astype(np.float64)
    xh = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    g = np.cos(xh) * np.arange(3.0) / xh.size
    want = {"scale": 1 - 0.1 * (g * xh).sum(0), "bias": -0.1 * g.sum(0)}
    for mapping in MAPPINGS.values():
        new, running = mapping(step)(X)
        for name in params:
            np.testing.assert_allclose(new[name], np.broadcast_to(want[name], (DEVICES, C)), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(running.mean, np.broadcast_to(0.01 * x.mean(0), (DEVICES, C)), rtol=1e-6)
