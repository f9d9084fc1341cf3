"""Recalibrated statistics are those of all the data, in float64 NumPy: in any batches, masks, devices and processes."""

import functools
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_processes import ENVIRONMENT

import jaxnorm as jn
import jaxnorm.linen as jl
import jaxnorm.nnx as jx
from jaxnorm.tools.recalibrate import recalibrate

DEPTH, WIDTH, EPSILON = 3, 5, 1e-5
NAMES = [f"bn{i}" for i in range(DEPTH)]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # float32 nets of three layers, numbers of size 1 to 20
RNG = np.random.default_rng(0)
X = (RNG.standard_t(4, (37, WIDTH)) + np.linspace(-2, 4, 37)[:, None]).astype(np.float32)  # batches are not alike
BATCHES = [X[i : i + 8] for i in range(0, 37, 8)]  # the last has 5 rows
KERNELS = RNG.normal(0, 1, (DEPTH, WIDTH, WIDTH)).astype(np.float32)
SCALES = RNG.uniform(0.5, 2, (DEPTH, WIDTH)).astype(np.float32)
STALE = {"mean": np.full(WIDTH, 0.5, np.float32), "var": np.full(WIDTH, 3.0, np.float32)}


# --- what is right


def brute_force(parts, masks=None, kernels=KERNELS, together=True):
    """Mean and biased variance of what every norm sees of all rows that count: of the data as one batch in training, or
    with every part normalized by itself."""
    parts = [np.where(m[:, None], p, 0) for p, m in zip(parts, masks, strict=True)] if masks is not None else parts
    parts, stats = [p.astype(np.float64) for p in parts], []
    masks = [np.ones(len(p), bool) for p in parts] if masks is None else masks
    for kernel, scale in zip(kernels.astype(np.float64), SCALES.astype(np.float64), strict=True):
        parts = [p @ kernel for p in parts]
        rows = np.concatenate([p[m] for p, m in zip(parts, masks, strict=True)])
        stats.append((rows.mean(0), rows.var(0)))
        used = [stats[-1] if together else (p[m].mean(0), p[m].var(0)) for p, m in zip(parts, masks, strict=True)]
        parts = [
            np.maximum((p - mean) / np.sqrt(var + EPSILON) * scale, 0)
            for p, (mean, var) in zip(parts, used, strict=True)
        ]
    return stats


# --- one net in three trees: (collect, variables, what reads the statistics of a norm)


class LinenNet(nn.Module):
    over: str = "n"

    @nn.compact
    def __call__(self, x, mask=None, train=False):
        for i in range(DEPTH):
            x = nn.Dense(WIDTH, use_bias=False, name=f"dense{i}")(x)
            norm = jl.BatchNorm(layout="n c", over=self.over, use_bias=False, name=NAMES[i])
            x = nn.relu(norm(x, not train, mask=mask))
        return x


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.List([nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(DEPTH)])
        for name in NAMES:
            setattr(self, name, jx.BatchNorm(WIDTH, use_bias=False, rngs=rngs))

    def __call__(self, x, mask=None):
        for dense, name in zip(self.dense, NAMES, strict=True):
            x = nnx.relu(getattr(self, name)(dense(x), mask=mask))
        return x


def linen_variables(kernels=KERNELS):
    params = {f"dense{i}": {"kernel": jnp.asarray(kernels[i])} for i in range(DEPTH)}
    params |= {name: {"scale": jnp.asarray(SCALES[i])} for i, name in enumerate(NAMES)}
    return {"params": params, "batch_stats": {name: jax.tree.map(jnp.asarray, STALE) for name in NAMES}}


@functools.cache
def linen_collect(train, over="n"):
    mutable = ["moments", "batch_stats"] if train else ["moments"]

    def collect(variables, batch):
        x, mask = batch if isinstance(batch, tuple) else (batch, None)
        mask = None if mask is None else mask[:, None]
        return LinenNet(over).apply(variables, x, mask, train, mutable=mutable)[1]["moments"]

    return collect if over != "n" else jax.jit(collect)


def nnx_net(train):
    model = NnxNet(nnx.Rngs(0))
    for i, name in enumerate(NAMES):
        model.dense[i].kernel[...] = jnp.asarray(KERNELS[i])
        getattr(model, name).scale[...] = jnp.asarray(SCALES[i])
        getattr(model, name).mean[...], getattr(model, name).var[...] = map(jnp.asarray, STALE.values())
    model.train() if train else model.eval()
    graph, variables = nnx.split(model)

    def collect(variables, batch):
        x, mask = batch if isinstance(batch, tuple) else (batch, None)
        mask = None if mask is None else mask[:, None]
        return nnx.capture(nnx.merge(graph, variables), jx.BatchMoments)(x, mask)[1]

    return jax.jit(collect), variables, lambda v, name: (v[name]["mean"][...], v[name]["var"][...])


def bare_net(train):
    norms = {name: {"scale": SCALES[i], **STALE} for i, name in enumerate(NAMES)}
    variables = {"kernels": jnp.asarray(KERNELS), "norms": norms}  # the norms are NumPy's

    def collect(variables, batch):
        x, mask = batch if isinstance(batch, tuple) else (batch, None)
        mask, seen = None if mask is None else mask[:, None], {}
        for kernel, name in zip(variables["kernels"], NAMES, strict=True):
            own, x = variables["norms"][name], x @ kernel
            seen[f"norms/{name}"] = stats = jn.moments(x, "n c", "n", mask=mask)
            running = jn.RunningStats(own["mean"], own["var"], jnp.int32(0), ("c",))
            x = jax.nn.relu(jn.normalize(x, stats if train else running, "n c", scale=own["scale"], mask=mask))
        return seen

    return jax.jit(collect), variables, lambda v, name: (v["norms"][name]["mean"], v["norms"][name]["var"])


@functools.cache
def net(host, train):
    if host == "linen":
        stats = lambda v, name: (v["batch_stats"][name]["mean"], v["batch_stats"][name]["var"])  # noqa: E731
        return linen_collect(train), linen_variables(), stats
    return nnx_net(train) if host == "nnx" else bare_net(train)


def assert_statistics(variables, stats, expected, **close):
    for name, (mean, var) in zip(NAMES, expected, strict=True):
        got = stats(variables, name)
        np.testing.assert_allclose(got[0], mean, **(close or CLOSE), err_msg=f"{name}: mean")
        np.testing.assert_allclose(got[1], var, **(close or CLOSE), err_msg=f"{name}: var")


linen_stats = net("linen", False)[2]
HOSTS = ["linen", "nnx", "bare"]


# --- the two answers


@pytest.mark.parametrize("host", HOSTS)
def test_layer_by_layer_is_the_whole_data_as_one_batch(host):
    collect, variables, stats = net(host, train=False)
    done, report = recalibrate(collect, variables, BATCHES, progress=False)
    assert_statistics(done, stats, brute_force(BATCHES))
    assert jax.tree.structure(done) == jax.tree.structure(variables)
    kinds = lambda tree: [(type(leaf), leaf.dtype) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert kinds(done) == kinds(variables)
    assert report.title == "3 of 3 batch norms recalibrated, 5 batches, 3 passes"
    assert report.to_dict()["count"] == [37] * 3
    assert report.to_dict()["note"] == [None] * 3


@pytest.mark.parametrize("host", HOSTS)
def test_all_at_once_is_every_batch_normalized_by_itself(host):
    collect, variables, stats = net(host, train=True)
    done, report = recalibrate(collect, variables, BATCHES, progress=False)
    assert_statistics(done, stats, brute_force(BATCHES, together=False))
    assert report.to_dict()["note"] == [None] * 3
    assert report.title.endswith("1 pass")


def test_how_far_the_two_answers_are_apart():
    whole, apart = brute_force(BATCHES), brute_force(BATCHES, together=False)
    smaller = brute_force([X[i : i + 4] for i in range(0, 36, 4)], together=False)
    far = [abs(a / w - 1).max() for (_, a), (_, w) in zip(apart, whole, strict=True)]
    assert far[0] < 1e-12  # nothing is in front of the first norm
    assert far[1] > 0.05
    assert far[2] > 0.05
    assert abs(smaller[1][1] / apart[1][1] - 1).max() > 0.05  # and it depends on the batch size
    collect, variables, stats = net("linen", train=True)
    done, _ = recalibrate(collect, variables, BATCHES, progress=False)
    assert abs(np.asarray(stats(done, "bn1")[1]) / whole[1][1] - 1).max() > 0.05
    pieces = [X[i : i + 4] for i in range(0, 37, 4)]  # layer by layer does not
    done, _ = recalibrate(net("linen", False)[0], variables, pieces, progress=False)
    assert_statistics(done, stats, whole)


def test_each_pass_settles_one_depth():
    collect, variables, stats = net("linen", train=False)
    whole = brute_force(BATCHES)
    for passes in (1, 2, 3):
        done, report = recalibrate(collect, variables, BATCHES, passes=passes, progress=False)
        exact = [np.allclose(stats(done, name)[1], whole[i][1], **CLOSE) for i, name in enumerate(NAMES)]
        assert exact == [i < passes for i in range(DEPTH)]
        assert [note is not None for note in report.to_dict()["note"]] == [i >= passes for i in range(DEPTH)]
    assert_statistics(done, stats, whole)
    done, report = recalibrate(collect, variables, iter(BATCHES), progress=False)  # it can be read once
    assert report.title.endswith("1 pass, 2 not settled")
    assert [note is not None for note in report.to_dict()["note"]] == [False, True, True]


def test_ema_weights():
    """Statistics of averaged weights: nobody has ever seen them, and the ones at hand are wrong."""

    def loss(params, stats, x):
        y, new = LinenNet().apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return jnp.mean((y - x) ** 2), new["batch_stats"]

    optimizer = optax.sgd(0.3)
    variables = linen_variables()
    params, stats = variables["params"], variables["batch_stats"]
    state, average = optimizer.init(params), params

    @jax.jit
    def step(params, stats, state, average, x):
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, x)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        return params, stats, state, optax.incremental_update(params, average, jnp.float32(0.2))

    for batch in BATCHES[:4] * 5:
        params, stats, state, average = step(params, stats, state, average, batch)
    stale = {"params": average, "batch_stats": stats}
    kernels = np.stack([average[f"dense{i}"]["kernel"] for i in range(DEPTH)])
    scales = [average[name]["scale"] for name in NAMES]
    # brute_force has the scales of the start: fold the averaged ones into the kernels behind (relu is homogeneous)
    for i in range(DEPTH - 1):
        kernels[i + 1] = kernels[i + 1] * (np.asarray(scales[i]) / SCALES[i])[:, None]
    expected = brute_force(BATCHES, kernels=kernels)
    done, report = recalibrate(linen_collect(False), stale, BATCHES, progress=False)
    assert_statistics(done, linen_stats, expected, rtol=1e-4, atol=1e-4)
    assert all(abs(linen_stats(stale, n)[1] / v - 1).max() > 0.1 for n, (_, v) in zip(NAMES, expected, strict=True))
    assert all(abs(times - 1) > 0.1 for times in report.to_dict()["var times"])
    jax.tree.map(np.testing.assert_array_equal, done["params"], average)


# --- what counts


def masked(batches):
    """The batches filled up to one size with NaN, and some rows among the others masked, NaN in them too."""
    rng, out = np.random.default_rng(1), []
    for batch in batches:
        full = np.full((8, WIDTH), np.nan, np.float32)
        full[: len(batch)] = batch
        mask = np.isfinite(full[:, 0]) & (rng.random(8) < 0.8)
        full[~mask] = np.nan
        out.append((full, mask))
    return out


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_masks(host, train):
    collect, variables, stats = net(host, train)
    batches = [*masked(BATCHES), (np.full((8, WIDTH), np.nan, np.float32), np.zeros(8, bool))]  # and one of nothing
    done, report = recalibrate(collect, variables, batches, progress=False)
    expected = brute_force(*zip(*batches[:-1], strict=True), together=not train)
    assert_statistics(done, stats, expected)
    assert report.to_dict()["count"] == [sum(mask.sum() for _, mask in batches)] * 3


def test_eight_devices():
    """Uneven shards, one of them empty, in batches of uneven size: collect merges over the devices."""
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    where = NamedSharding(mesh, P("devices"))
    mapped = jax.shard_map(linen_collect(False, "n devices"), mesh=mesh, in_specs=(P(), P("devices")), out_specs=P())
    rows = np.concatenate([X, X[:11] * 2])
    batches = []
    for start, size in ((0, 24), (24, 19), (43, 5)):
        full, mask = np.full((32, WIDTH), np.nan, np.float32), np.zeros(32, bool)
        places = np.delete(np.arange(32), np.arange(4, 8))[np.random.default_rng(start).permutation(28)[:size]]
        full[places], mask[places] = rows[start : start + size], True  # device 1 has nothing
        batches.append((full, mask))
    expected = brute_force(*zip(*batches, strict=True))
    data = [jax.device_put(batch, where) for batch in batches]
    variables = jax.device_put(linen_variables(), NamedSharding(mesh, P()))
    done, report = recalibrate(jax.jit(mapped), variables, data, progress=False)
    assert_statistics(done, linen_stats, expected)
    assert report.to_dict()["count"] == [48] * 3
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.sharding.is_fully_replicated and leaf.committed, done))


SCRIPT = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec as P
import jaxnorm as jn
from jaxnorm.tools.recalibrate import recalibrate

mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
place = lambda z: jax.make_array_from_process_local_data(NamedSharding(mesh, P("devices")), z)
local = lambda v, batch: {"bn": jn.moments(batch[0], "n c", "n devices", mask=batch[1])}
collect = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P()))
x = np.arange(24.0, dtype=np.float32).reshape(12, 2) ** 2
mask = np.arange(12)[:, None] < 9
rank = int(sys.argv[2])
# batches of 8 and of 4 rows, a half of each on this process
batches = [tuple(place(z[a + rank * n : a + rank * n + n]) for z in (x, mask)) for a, n in ((0, 4), (8, 2))]
zeros = np.zeros(2, np.float32)
start = jax.device_put({"bn": {"mean": zeros, "var": zeros + 1}}, NamedSharding(mesh, P()))
done, report = recalibrate(collect, start, batches)
print(*np.asarray(done["bn"]["mean"]), *np.asarray(done["bn"]["var"]), report.rows[0]["count"])
"""


def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", SCRIPT, address]
    started = [
        subprocess.Popen([*command, str(i)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        answers = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], answers[0][1][-2000:]
    rows = (np.arange(24.0).reshape(12, 2) ** 2)[:9]
    for out, _ in answers:
        numbers = np.array(out.splitlines()[-1].split(), float)
        np.testing.assert_allclose(numbers, [*rows.mean(0), *rows.var(0), 9], rtol=1e-6)


def test_counts_beyond_float32():
    """2^24 + 1 is 2^24 in float32, and a thousand single elements would be lost."""
    big = jn.Moments(jnp.array([2.0**24]), jnp.array([0.0]), jnp.array([0.0]), ("c",))
    one = jn.Moments(jnp.array([1.0]), jnp.array([2.0**14]), jnp.array([0.0]), ("c",))
    variables = {"bn": {"mean": jnp.zeros(1), "var": jnp.ones(1), "num_updates": jnp.int32(3)}}
    done, report = recalibrate(lambda v, batch: {"bn": batch}, variables, [big, *[one] * 1000], progress=False)
    n, total = 2**24 + 1000, 1000 * 2**14
    assert report.to_dict()["count"] == [n]
    np.testing.assert_allclose(done["bn"]["mean"], total / n, rtol=1e-7)
    np.testing.assert_allclose(done["bn"]["var"], 1000 * 2**28 / n - (total / n) ** 2, rtol=1e-7)
    assert int(done["bn"]["num_updates"]) == 1001


@pytest.mark.parametrize("batches", [np.ones((4, 2)), {"a": 1}, 3], ids=["array", "dict", "int"])
def test_one_batch_is_no_list_of_them(batches):
    """The rows of an array would pass for batches."""
    variables = {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"recalibrate: batches must be a list of them, .* got \w+. Put one batch"):
        recalibrate(lambda v, x: {}, variables, batches)


def test_where_that_chooses_nothing_says_so():
    variables = {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    with pytest.raises(ValueError, match="where chose none of 1 batch norms"):
        recalibrate(lambda v, x: {}, variables, [1], where=lambda norm: False)
