"""Replicas of a model: pooled as all their data would give, given back, compared."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
import jaxnorm.linen as jl
import jaxnorm.nnx as jx
from jaxnorm.tools.replicas import check_replicas, merge_replicas, replicate

RNG = np.random.default_rng(0)
EACH = P("devices")
DEVICES = 8


def pooled(mean, var, t=None):
    """Rows of replicas, in float64."""
    mean, var = np.asarray(mean, np.float64), np.asarray(var, np.float64)
    t = np.ones(len(mean)) if t is None else np.asarray(t, np.float64)
    t = (t / t.sum()).reshape((-1,) + (1,) * (mean.ndim - 1))
    whole = (t * mean).sum(0)
    return whole, (t * (var + (mean - whole) ** 2)).sum(0)


def saved(replicas=4, **more):
    """What a run under pmap leaves: NumPy's, as from a checkpoint."""
    shared = RNG.normal(size=(3, 5)).astype(np.float32)
    stats = {"mean": RNG.normal(size=(replicas, 5)), "var": RNG.uniform(1, 2, (replicas, 5)), **more}
    stats = {name: np.asarray(leaf, np.int32 if name == "num_updates" else np.float32) for name, leaf in stats.items()}
    params = {"dense": {"kernel": np.stack([shared] * replicas)}, "bn": {"scale": np.ones((replicas, 5), np.float32)}}
    return {"params": params, "batch_stats": {"bn": stats}}


def test_local_to_synced_and_back():
    """Trained unsynced on 8 devices, saved, pooled, evaluated; given back to the devices, and trained on."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = jl.BatchNorm(layout="n c", over="n", momentum=0.5, name="bn")(nn.Dense(4, name="dense")(x), not train)
            return nn.Dense(1, name="out")(nn.relu(x))

    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    x = RNG.normal(size=(16, 3)).astype(np.float32) + np.linspace(-3, 3, 16, dtype=np.float32)[:, None]
    variables = Net().init(jax.random.key(0), x, train=True)

    def step(params, stats, x):
        stats = jax.tree.map(lambda z: z[0], stats)

        def loss(params):
            y, new = Net().apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            return jnp.mean(y**2), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(params)
        grads = jn.reduce_gradients(grads, "devices", mean=True)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return params, jax.tree.map(lambda z: z[None], stats)

    train = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), EACH, EACH), out_specs=(P(), EACH)))
    params, stats = variables["params"], replicate(variables["batch_stats"], DEVICES)
    for _ in range(3):
        params, stats = train(params, stats, x)
    assert not check_replicas(stats, axis=0).ok
    one, report = merge_replicas(stats)

    mean, var = pooled(stats["bn"]["mean"], stats["bn"]["var"])
    dense, out = ({name: np.asarray(z, np.float64) for name, z in params[k].items()} for k in ("dense", "out"))
    z = (x @ dense["kernel"] + dense["bias"] - mean) / np.sqrt(var + 1e-5)
    z = np.maximum(z * np.asarray(params["bn"]["scale"]) + np.asarray(params["bn"]["bias"]), 0)
    y = Net().apply({"params": params, "batch_stats": one}, x, train=False)
    np.testing.assert_allclose(y, z @ out["kernel"] + out["bias"], rtol=1e-4, atol=1e-5)
    apart = (abs(np.asarray(stats["bn"]["mean"]) - mean) / np.sqrt(var)).max()
    np.testing.assert_allclose(report.to_dict()["apart"], [apart], rtol=1e-5)
    assert apart > 0.5  # or pooling would not matter

    back = replicate(one, DEVICES)
    assert check_replicas(back, axis=0).ok
    jax.tree.map(np.testing.assert_array_equal, merge_replicas(back)[0], one)
    _, stats = train(params, back, x)
    parts = (x @ dense["kernel"] + dense["bias"]).reshape(DEVICES, 2, 4)
    np.testing.assert_allclose(stats["bn"]["mean"], 0.5 * mean + 0.5 * parts.mean(1), rtol=1e-4, atol=1e-5)


def test_a_whole_saved_model():
    variables = saved()
    done, report = merge_replicas(variables)
    stats = variables["batch_stats"]["bn"]
    mean, var = pooled(stats["mean"], stats["var"])
    np.testing.assert_allclose(done["batch_stats"]["bn"]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(done["batch_stats"]["bn"]["var"], var, rtol=1e-6)
    np.testing.assert_array_equal(done["params"]["dense"]["kernel"], variables["params"]["dense"]["kernel"][0])
    assert {(type(leaf), leaf.dtype) for leaf in jax.tree.leaves(done)} == {(np.ndarray, np.dtype(np.float32))}
    assert report.title == "1 batch norms of 4 replicas pooled"


@pytest.mark.parametrize("given", ["counts", "num_updates"])
def test_replicas_that_have_seen_more(given):
    t = np.array([1, 0, 5, 2])
    variables = saved(**({"num_updates": t} if given == "num_updates" else {}))
    done, _ = merge_replicas(variables, counts=list(t) if given == "counts" else None)
    stats = variables["batch_stats"]["bn"]
    mean, var = pooled(stats["mean"], stats["var"], t)
    np.testing.assert_allclose(done["batch_stats"]["bn"]["mean"], mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(done["batch_stats"]["bn"]["var"], var, rtol=1e-6)
    assert done["batch_stats"]["bn"].get("num_updates", 5) == 5


def test_large_means_and_another_axis():
    """A variance of 1e-2 at a mean of 1e4: the between-device term has its digits, the mean those of float32."""
    mean = 1e4 + np.array([[0.0, 1.0], [0.5, 2.0], [1.0, 4.0]])  # float32 has them all
    var = np.full((3, 2), 0.01)
    variables = {"bn": {"mean": jnp.asarray(mean.T, jnp.float32), "var": jnp.asarray(var.T, jnp.float32)}}
    done, _ = merge_replicas(variables, axis=1)
    back = replicate(done, 4, axis=1)
    jax.tree.map(np.testing.assert_array_equal, merge_replicas(back, axis=1).variables, done)
    expected = pooled(mean, var)
    np.testing.assert_allclose(done["bn"]["mean"], expected[0], rtol=1e-7)
    np.testing.assert_allclose(done["bn"]["var"], expected[1], rtol=1e-6)
    assert isinstance(done["bn"]["mean"], jax.Array)


def test_nnx_state():
    norm = nnx.state(jx.BatchNorm(2, rngs=nnx.Rngs(0)))
    state = replicate(norm, 3)
    state["mean"][...] = state["mean"][...] + jnp.array([[0.0], [1.0], [5.0]])
    done, _ = merge_replicas(state)
    assert type(done) is type(norm)
    np.testing.assert_allclose(done["mean"][...], np.full(2, 2.0), rtol=1e-6)
    np.testing.assert_allclose(done["var"][...], np.full(2, 1 + (4 + 1 + 9) / 3), rtol=1e-6)
    np.testing.assert_array_equal(done["scale"][...], np.ones(2))


def test_haiku():
    """The averages before they are debiased go with those that are."""
    model = hk.transform_with_state(lambda x: hk.BatchNorm(False, False, 0.9)(x, is_training=True))
    x = RNG.normal(size=(3, 6, 2)).astype(np.float32) + np.arange(3, dtype=np.float32)[:, None, None]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, state = model.init(jax.random.key(0), x[0])
        states = [model.apply(params, state, None, rows)[1] for rows in x]
        done, _ = merge_replicas(jax.tree.map(lambda *z: jnp.stack(z), *states))
        _, after = model.apply(params, done, None, x[0])
    t = 0.9 * (1 - 0.9) / (1 - 0.9**2)
    mean = x.astype(np.float64).mean((0, 1))
    got = after["batch_norm/~/mean_ema"]["average"][0]
    np.testing.assert_allclose(got, t * mean + (1 - t) * x[0].mean(0), rtol=1e-5)


def test_where_and_tolerance():
    two = {"a": saved()["batch_stats"]["bn"], "b": saved()["batch_stats"]["bn"]}
    with pytest.raises(ValueError, match=r"differ in 2 of the 2 arrays that they share: \['b'\]\['mean'\] by"):
        merge_replicas(two, where="a")
    done, report = merge_replicas(two, where="a", tolerance=100.0)
    np.testing.assert_array_equal(done["b"]["mean"], two["b"]["mean"][0])
    assert report.to_dict()["norm"] == ["a"]


def test_copies_on_a_mesh():
    """PEERS, row 6: an array that JAX believes to be replicated, and is not."""
    mesh = jax.make_mesh((4, 2), ("devices", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = np.repeat(np.arange(4, dtype=np.float32), 2).reshape(8, 1) * np.ones((1, 2), np.float32)

    def local(x):
        _, running = jn.batch_norm(x, jn.running_stats(c=2), "n c", "n", momentum=0.0)
        _, synced = jn.batch_norm(x, jn.running_stats(c=2), "n c", "n devices", momentum=0.0)
        return {"local": running.mean, "synced": synced.mean}

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("devices"), out_specs=P(), check_vma=False)
    stats = jax.jit(mapped)(x)
    report = check_replicas(stats)
    assert not report.ok
    assert report.to_dict() == {"array": ["['local']"], "replicas": ["2 3 4 5 6 7"], "difference": [3.0]}
    assert report.title == "1 of 2 arrays differ between replicas"
    assert check_replicas(stats["synced"]).ok
    # cut along one axis and replicated along the other: each part is compared with its own copies
    cut = jax.device_put(x, NamedSharding(mesh, P("devices")))
    assert check_replicas([cut, jax.device_put(jax.random.key(0), NamedSharding(mesh, P()))]).ok


def test_bits():
    rows = {"zero": np.array([0.0, -0.0]), "nan": np.array([np.nan, np.nan]), "one": np.array([1.0, np.nan])}
    assert check_replicas(rows, axis=0).to_dict() == {
        "array": ["['one']", "['zero']"], "replicas": ["1", "1"], "difference": [np.inf, 0.0],
    }  # fmt: skip


ERRORS = {
    "no dimension": (lambda: merge_replicas({"a": np.ones((2, 3)), "step": np.array(1)}), r"\['step'\] of shape \(\)"),
    "sizes": (lambda: check_replicas({"a": np.ones((2, 3)), "b": np.ones((3, 3))}, 0), "no dimension 0 of 2 replicas"),
    "nothing": (lambda: merge_replicas({"a": "text"}), "no array with replicas"),
    "counts": (lambda: merge_replicas(saved(), counts=[1, 2]), "counts must be 4 numbers"),
    "no counts": (lambda: merge_replicas(saved(), counts=[0] * 4), "counts must be 4 numbers"),
    "keys": (lambda: merge_replicas({"key": jax.random.split(jax.random.key(0), 2)}), "holds random keys"),
    "pattern": (lambda: merge_replicas(saved(), where="bm"), "matches no norm. Did you mean 'bn'"),
    "devices": (lambda: replicate(saved(), 0), "a number from 1, got 0"),
    "one device": (lambda: check_replicas({"a": jnp.ones(2)}), "no array here has two copies"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert str(error.value).startswith("jaxnorm.tools.")


def test_parameters_that_drifted_apart():
    variables = saved()
    variables["params"]["dense"]["kernel"][2, 1] += 0.25
    with pytest.raises(ValueError, match=r"1 of the 2 arrays .*: \['params'\]\['dense'\]\['kernel'\] by 0.25"):
        merge_replicas(variables)
