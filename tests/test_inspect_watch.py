"""`jn.inspect.watch`: gaps, noise and skew against float64 NumPy; the norm that is stale is named, and its share of the
loss; devices, linen and nnx."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
import jaxnorm.linen as jl
import jaxnorm.nnx as jx
from jaxnorm.errors import ArgumentError

WIDTH, EPSILON = 3, 1e-5
RNG = np.random.default_rng(0)
CLOSE = {"rel": 1e-4, "abs": 1e-6}  # moments in float32


def bare(mean, var, **more):
    return {"bn": {"mean": jnp.asarray(mean, jnp.float32), "var": jnp.asarray(var, jnp.float32), **more}}


@jax.jit
def collect(variables, x):
    return {"bn": jn.moments(x, "n c", "n")}


def batches_of(*shape, seed=0, shift=0.0):
    return list((np.random.default_rng(seed).normal(shift, 1, shape)).astype(np.float32))


def test_the_numbers_are_those_of_the_formulas():
    x = [(b * [1, 2, 3] + [0, 1, 5]).astype(np.float32) for b in batches_of(6, 20, WIDTH)]
    mean, var = np.array([0.5, 1.0, 2.0]), np.array([1.0, 9.0, 4.0])
    watched = jn.inspect.watch(collect, bare(mean, var), x, epsilon=EPSILON)
    rows, s = np.stack(x).astype(np.float64), np.sqrt(var + EPSILON)
    together = rows.reshape(-1, WIDTH)
    (row,) = watched
    assert row["count"] == 120
    assert row["mean gap"] == pytest.approx(np.sqrt((((together.mean(0) - mean) / s) ** 2).mean()), **CLOSE)
    logs = np.log((together.var(0) + EPSILON) / (var + EPSILON))
    assert row["var gap"] == pytest.approx(np.sqrt((logs**2).mean()), **CLOSE)
    spread = (rows.mean(1) / s).std(0, ddof=1) / np.sqrt(6)
    assert row["mean noise"] == pytest.approx(np.sqrt((spread**2).mean()), **CLOSE)
    spread = np.log(rows.var(1) + EPSILON).std(0, ddof=1) / np.sqrt(6)
    assert row["var noise"] == pytest.approx(np.sqrt((spread**2).mean()), **CLOSE)
    assert watched.recalibrate == ("bn",)
    assert row.get("skew") is None
    assert row.get("share") is None
    assert watched.losses == {}
    assert watched.title == "1 of 1 batch norms to recalibrate"
    (row,) = jn.inspect.watch(collect, bare(mean, var), x[:1], epsilon=EPSILON)
    assert row["mean gap"] == pytest.approx(np.sqrt((((rows[0].mean(0) - mean) / s) ** 2).mean()), **CLOSE)
    assert row.get("mean noise") is None
    assert row["finding"] == "one batch: noise unknown"


def test_an_uneven_last_batch_weighs_what_it_has():
    x = [np.full((30, 1), 1.0, np.float32), np.full((10, 1), 5.0, np.float32)]
    (row,) = jn.inspect.watch(collect, bare([2.0], [3.0]), x, epsilon=0.0)
    assert row["mean gap"] == pytest.approx(0, abs=1e-6)  # (30 * 1 + 10 * 5) / 40 = 2
    assert row["var gap"] == pytest.approx(0, abs=1e-6)  # (30 * 1 + 10 * 9) / 40 = 3


@pytest.mark.parametrize("seed", range(5))
def test_what_is_within_the_noise_is_no_gap(seed):
    """Four batches of eight: their means are 0.18 from the truth, beyond the tolerance of 0.1; and truly apart they are
    found. Of a batch of 8 the variance of one channel is off by half."""
    x = batches_of(4, 8, 16, seed=seed)
    right, off = (jn.inspect.watch(collect, bare([m] * 16, [1.0] * 16), x) for m in (0.0, 1.5))
    assert right.rows[0]["mean gap"] > 0.1
    assert right.recalibrate == ()
    assert off.recalibrate == ("bn",)
    assert jn.inspect.watch(collect, bare([0.0] * 16, [4.0] * 16), batches_of(40, 8, 16)).recalibrate == ("bn",)
    assert jn.inspect.watch(collect, bare([1.5] * 16, [1.0] * 16), x, tolerance=2.0).recalibrate == ()


# --- devices


def per_device(variables, x):  # 4 devices, each with its own statistics
    return jax.vmap(lambda rows: collect(variables, rows))(x)


def test_skew_between_devices():
    """Device d sees classes of its own: inputs shifted by d."""
    alike = batches_of(5, 4, 50, WIDTH)
    shifts = np.arange(4, dtype=np.float32)[:, None, None]
    skewed = [x + shifts for x in alike]
    truth = np.concatenate(skewed, 1).astype(np.float64)  # device, row, channel
    mean, var = truth.mean((0, 1)), truth.var((0, 1))
    watched = jn.inspect.watch(jax.jit(per_device), bare(mean, var), skewed)
    (row,) = watched
    expected = np.sqrt((((truth.mean(1) - mean) / np.sqrt(var + EPSILON)) ** 2).mean())
    assert row["skew"] == pytest.approx(expected, **CLOSE)
    batch = np.stack(skewed).astype(np.float64)  # batch, device, row, channel
    apart = (batch.mean(2) - batch.mean((1, 2))[:, None]) / np.sqrt(var + EPSILON)
    assert row["skew noise"] == pytest.approx(np.sqrt((apart.std(0, ddof=1) ** 2 / 5).mean()), rel=1e-3)
    assert watched.skewed == ("bn",)
    assert watched.recalibrate == ()  # of all devices together the statistics are right
    assert row["count"] == 1000
    right = jn.inspect.watch(jax.jit(per_device), bare([0.0] * 3, [1.0] * 3), alike)
    assert right.rows[0]["skew"] < 0.1
    assert right.skewed == ()


def test_devices_of_shard_map():
    """Local statistics, one row a device; masks that leave a device without an element."""
    mesh = jax.make_mesh((8,), ("devices",))
    x = np.random.default_rng(3).normal(0, 1, (64, WIDTH)).astype(np.float32)
    mask = np.arange(64) >= 8  # device 0 has none

    def local(x, mask):
        m = jn.moments(x, "n c", "n", mask=mask[:, None])
        return jax.tree.map(lambda z: jnp.broadcast_to(z, (1, WIDTH)), m)

    spec = P("devices")
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=spec))
    batch = jax.device_put((x, mask), jax.NamedSharding(mesh, spec))
    (row,) = jn.inspect.watch(lambda v, batch: {"bn": mapped(*batch)}, bare([0] * 3, [1] * 3), [batch] * 2)
    rows = x[8:].reshape(7, 8, WIDTH).astype(np.float64)
    std = np.sqrt(x[8:].astype(np.float64).var(0) + EPSILON)
    expected = np.sqrt((((rows.mean(1) - rows.mean((0, 1))) / std) ** 2).mean())
    assert row["skew"] == pytest.approx(expected, **CLOSE)
    assert row["skew noise"] == 0  # the same batch, twice
    assert "devices differ" in row["finding"]
    assert row["count"] == 2 * 56


def test_pixels_are_not_independent():
    """Pictures whose brightness varies: thousands of pixels a device, and its mean is off by 1 / sqrt(2 pictures)."""
    look = jax.jit(lambda v, x: {"bn": jax.vmap(lambda z: jn.moments(z, "n h w c", "n h w"))(x)})
    for seed in range(5):
        rng = np.random.default_rng(seed)
        light, grain = rng.normal(size=(4, 8, 2, 1, 1, WIDTH)), rng.normal(size=(4, 8, 2, 16, 16, WIDTH))
        pictures = list((light + grain).astype(np.float32))  # batch, device, picture, pixels, channel
        right = jn.inspect.watch(look, bare([0.0] * 3, [2.0] * 3), pictures)
        assert right.rows[0]["skew"] > 3 * np.sqrt(1 / (4 * 2 * 16 * 16))  # as if they were
        assert right.skewed == right.recalibrate == ()
        shifted = [x + np.arange(8, dtype=np.float32)[:, None, None, None, None] for x in pictures]
        assert jn.inspect.watch(look, bare([3.5] * 3, [7.0] * 3), shifted).skewed == ("bn",)
        one = jn.inspect.watch(look, bare([0.0] * 3, [1.0] * 3), pictures[:1])
        assert one.skewed == one.recalibrate == ()
        assert one.rows[0]["finding"] == "one batch: noise unknown"


# --- the loss


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for i in range(3):
            x = nn.Dense(8, name=f"dense_{i}")(x)
            x = nn.relu(jl.BatchNorm(name=f"bn_{i}")(x, use_running_average=not train))
        return nn.Dense(4, name="head")(x)


@functools.cache
def fitted():
    """A net, what it takes to watch it, and statistics that fit: of all batches, in training mode."""
    net, x = Net(), batches_of(4, 64, 5, shift=0.3)
    data = [(b, np.argmax(b[:, :4] + b[:, 1:], 1)) for b in x]
    variables = net.init(jax.random.key(0), x[0], False)
    seen = jax.jit(lambda v, b: net.apply(v, b[0], True, mutable=["moments", "batch_stats"])[1]["moments"])

    @functools.partial(jax.jit, static_argnums=2)
    def loss(variables, batch, train):
        logits, _ = net.apply(variables, batch[0], train, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], 1).mean()

    step = jax.jit(lambda v, b: jax.tree.map(lambda p, g: p - 0.1 * g, v, jax.grad(loss)(v, b, True)))
    for _ in range(20):
        for batch in data:
            variables = {**variables, "params": step(variables, batch)["params"]}
    return seen, loss, jn.tools.recalibrate(seen, variables, data, progress=False).variables, data


@pytest.mark.parametrize("stale", ["bn_0", "bn_1", "bn_2"])
def test_the_norm_that_is_stale_is_named_with_its_share_of_the_loss(stale):
    collect, loss, variables, data = fitted()
    right = jn.inspect.watch(collect, variables, data, loss=loss)
    assert right.recalibrate == ()
    stats = variables["batch_stats"]
    off = {"mean": stats[stale]["mean"] + 2 * jnp.sqrt(stats[stale]["var"]), "var": stats[stale]["var"] * 4}
    watched = jn.inspect.watch(collect, {**variables, "batch_stats": {**stats, stale: off}}, data, loss=loss)
    assert watched.recalibrate == (stale,)
    shares = {row["norm"]: row["share"] for row in watched}
    # training mode has the noise of its batches, which statistics do not explain: 1 +- 0.1 was seen
    assert shares.pop(stale) == pytest.approx(1, abs=0.2)
    assert shares == pytest.approx(dict.fromkeys(shares, 0), abs=0.05)
    training, evaluation = (np.mean([loss(v, b, t) for b in data]) for v, t in (
        (variables, True), ({**variables, "batch_stats": {**stats, stale: off}}, False)
    ))  # fmt: skip
    assert watched.losses == pytest.approx(
        {"training": training, "evaluation": evaluation, "recalibrated": right.losses["evaluation"]}, rel=1e-5
    )
    assert watched.losses["evaluation"] - watched.losses["training"] > 0.1
    assert f", loss: {training:.4g} training, {evaluation:.4g} evaluation" in watched.title


def test_what_it_names_is_what_recalibrate_takes():
    collect, _, variables, data = fitted()
    stats = variables["batch_stats"]
    stale = {**variables, "batch_stats": {**stats, "bn_1": jax.tree.map(lambda z: z * 0 + 2, stats["bn_1"])}}
    watched = jn.inspect.watch(collect, stale, data)
    fixed = jn.tools.recalibrate(collect, stale, data, where=watched.recalibrate, progress=False).variables
    assert jn.inspect.watch(collect, fixed, data).recalibrate == ()


def test_where_the_evaluation_is_no_worse_there_is_no_share():
    watched = jn.inspect.watch(collect, bare([0.0] * 3, [1.0] * 3), batches_of(2, 9, 3), loss=lambda v, b, t: float(t))
    assert watched.losses == {"training": 1.0, "evaluation": 0.0, "recalibrated": 0.0}
    assert watched.rows[0]["share"] is None
    assert watched.title.endswith("0 recalibrated, evaluation is no worse: no share")


def test_nnx():
    model = nnx.Sequential(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), jx.BatchNorm(3, rngs=nnx.Rngs(0)))
    graph, variables = nnx.split(model)
    x = batches_of(3, 32, 5)
    seen = jax.jit(lambda v, b: nnx.capture(nnx.merge(graph, v), jx.BatchMoments)(b)[1])
    watched = jn.inspect.watch(seen, variables, x)
    inputs = np.concatenate(x).astype(np.float64) @ np.asarray(model.layers[0].kernel[...], np.float64)
    expected = np.sqrt((inputs.mean(0) ** 2 / (1 + EPSILON)).mean())  # its bias and its running mean are 0
    assert watched.rows[0]["norm"] == "layers/1"
    assert watched.rows[0]["mean gap"] == pytest.approx(expected, rel=1e-3)


# --- what is left out, and what it refuses


def test_norms_of_which_nothing_is_seen():
    variables = {**bare([0.0] * 3, [1.0] * 3), "other": bare([0.0], [1.0])["bn"]}
    watched = jn.inspect.watch(collect, variables, batches_of(2, 9, 3))
    assert [row["finding"] for row in watched] == ["", "collect gave no moments of it"]
    nothing = jax.jit(lambda v, x: {"bn": jn.moments(x, "n c", "n", mask=jnp.zeros_like(x, bool))})
    watched = jn.inspect.watch(nothing, bare([0.0] * 3, [1.0] * 3), batches_of(2, 9, 3), loss=lambda v, b, t: 1.0 - t)
    assert watched.rows[0]["finding"] == "nothing was counted"
    assert watched.recalibrate == ()
    half = jax.jit(lambda v, x: {"bn": jn.moments(x, "n c", "n", mask=jnp.arange(3) > 0)})
    x = batches_of(2, 9, 3)
    (row,) = jn.inspect.watch(half, bare([7.0, 0.0, 0.0], [1.0] * 3), x)  # the channel that is far off was not seen
    truth = np.concatenate(x)[:, 1:].astype(np.float64)
    assert row["mean gap"] == pytest.approx(np.sqrt((truth.mean(0) ** 2 / (1 + EPSILON)).mean()), rel=1e-3)


@pytest.mark.parametrize("var", [[-1.0, 1, 1], [np.nan, 1, 1]])
def test_statistics_that_are_no_numbers_are_a_gap(var):
    (row,) = jn.inspect.watch(collect, bare([0.0] * 3, var), DATA)
    assert row["mean gap"] == row["var gap"] == np.inf
    assert row["finding"] == "recalibrate"
    assert jn.inspect.watch(collect, bare([0.0] * 3, var), DATA[:1]).recalibrate == ("bn",)


GOOD, DATA = bare([0.0] * 3, [1.0] * 3), batches_of(2, 9, 3)
REFUSED = {
    "no batch": ((collect, GOOD, []), {}, "there was no batch"),
    "no norm": ((collect, {"ln": {"scale": jnp.ones(3)}}, DATA), {}, "there is no batch norm among the variables"),
    "one array": ((collect, GOOD, DATA[0]), {}, "batches must be a list of them, got ndarray. Put one batch"),
    "one mapping": ((collect, GOOD, {"x": DATA[0]}), {}, "batches must be a list of them, got dict"),
    "no batches": ((collect, GOOD, None), {}, "batches must be a list of them, got NoneType"),
    "apply": ((lambda v, x: x, GOOD, DATA), {}, r"ndarray holds none. Of a linen model: lambda v, x: net.apply\(v"),
    "some moments": (
        (lambda v, x: {**collect(v, x), "y": x}, GOOD, DATA), {}, "tree of Moments, and there is a ndarray at"
    ),
    "no moments": ((lambda v, x: {"bn": x}, GOOD, DATA), {}, "collect must give a tree of Moments"),
    "another name": ((lambda v, x: {"bm": collect(v, x)["bn"]}, GOOD, DATA), {}, "no such batch norm. Did you mean"),
    "another shape": ((lambda v, x: collect(v, x[:, :2]), GOOD, DATA), {}, r"moments of 'bn' of shape \(2,\)"),
    "not finite": ((collect, GOOD, [DATA[0] * np.float32(np.nan)]), {}, "sees is not finite"),
    "loss": ((collect, GOOD, DATA), {"loss": lambda v, b, t: jnp.ones(2)}, r"loss must be one number a batch"),
    "where": ((collect, GOOD, DATA), {"where": "x"}, "where='x' matches no norm"),
    "tolerance": ((collect, GOOD, DATA), {"tolerance": -1.0}, "tolerance and epsilon are numbers from 0"),
    "epsilon": ((collect, GOOD, DATA), {"epsilon": np.nan}, "tolerance and epsilon are numbers from 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_refuses(case):
    args, settings, message = REFUSED[case]
    with pytest.raises(ArgumentError, match=rf"^jaxnorm\.inspect\.watch: .*{message}"):
        jn.inspect.watch(*args, **settings)
