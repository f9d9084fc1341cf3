"""jaxnorm.tools.optimizer: what is decayed, what a rejected step leaves, what an average of the weights is."""

import operator

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(1.0, 2.0, (8, 4)).astype(np.float32)


class Net(nn.Module):
    norm: type = jaxnorm.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4)(x)
        x = self.norm(use_running_average=not train, name="bn")(x)
        x = nn.LayerNorm(name="ln")(x)
        return nn.Dense(2)(x)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.bn = jaxnorm.nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.dense(x))


@pytest.fixture(scope="module")
def variables():
    with jax.numpy_rank_promotion("allow"):  # flax's Dense
        return Net().init(KEY, X)


def bits(tree):
    """What is stored, bit for bit."""
    return [(np.asarray(z).dtype, np.asarray(z).tobytes()) for z in jax.tree.leaves(tree)]


# --- norm_mask


def chosen(mask):
    leaves = jax.tree_util.tree_flatten_with_path(mask)[0]
    assert all(type(value) is bool for _, value in leaves)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, value in leaves if value}


def test_mask_linen(variables):
    mask = jn.tools.norm_mask(variables["params"])
    assert jax.tree.structure(mask) == jax.tree.structure(variables["params"])
    assert chosen(mask) == {"bn/scale", "bn/bias", "ln/scale", "ln/bias"}
    assert chosen(jn.tools.norm_mask(variables)) == {f"params/{name}" for name in chosen(mask)}
    assert chosen(jn.tools.norm_mask(variables["params"], "ln")) == {"ln/scale", "ln/bias"}
    assert chosen(jn.tools.norm_mask(variables["params"], lambda norm: norm.path == "bn")) == {"bn/scale", "bn/bias"}
    with pytest.raises(ValueError, match=r"jaxnorm.tools.norm_mask: where='l' matches no norm"):
        jn.tools.norm_mask(variables["params"], "l")


def test_mask_of_a_batch_norm_without_scale():
    params = {"bn": {"bias": X[0]}, "dense": {"kernel": X, "bias": X[0]}}
    assert chosen(jn.tools.norm_mask(params)) == set()  # a bias alone may be anything
    stats = {"bn": {"mean": X[0], "var": X[0]}}
    assert chosen(jn.tools.norm_mask({"params": params, "batch_stats": stats})["params"]) == {"bn/bias"}


def test_mask_haiku_torch_equinox():
    def net(x):
        return hk.Linear(3)(hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), True))

    with jax.numpy_rank_promotion("allow"):  # haiku's
        params, _ = hk.transform_with_state(net).init(KEY, X)
    mask = jn.tools.norm_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert chosen(mask) == {"batch_norm/scale", "batch_norm/offset"}
    flat = {"0.weight": X, "0.bias": X[0], "1.weight": X[0], "1.bias": X[0], "1.running_mean": X[0], "2.weight": X}
    flat["1.running_var"] = X[0]
    assert chosen(jn.tools.norm_mask(flat)) == {"1.weight", "1.bias"}
    net = eqx.filter(eqx.nn.Sequential([eqx.nn.Linear(4, 4, key=KEY), eqx.nn.LayerNorm(4)]), eqx.is_array)
    assert jax.tree.leaves(jn.tools.norm_mask(net)) == [False, False, True, True]


def decayed(params):
    return jax.tree.map(operator.not_, jn.tools.norm_mask(params))


def test_weight_decay_in_linen(variables):
    """One step of decay alone, p - 0.1 p, for all but norms."""
    params = variables["params"]
    tx = optax.chain(optax.add_decayed_weights(0.1, mask=decayed), optax.sgd(1.0))
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert bits([new["bn"], new["ln"]]) == bits([params["bn"], params["ln"]])
    for name in ("Dense_0", "Dense_1"):
        np.testing.assert_allclose(new[name]["kernel"], params[name]["kernel"] * 0.9, rtol=1e-6)


@pytest.mark.parametrize("whole", [False, True], ids=["function", "tree"])
def test_weight_decay_in_nnx(whole):
    """The same mask fits the State with Variables that tx.init sees, and the State of arrays that tx.update sees."""
    model = Model(nnx.Rngs(0))
    kernel, scale = (np.asarray(z[...]) for z in (model.dense.kernel, model.bn.scale))
    state = nnx.state(model, nnx.Param)
    mask = decayed(state) if whole else decayed
    assert isinstance(decayed(state), nnx.State)
    tx = optax.chain(optax.add_decayed_weights(0.1, mask=mask), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: 0.0 * model.dense.kernel[...].sum())(model))

    step(model, optimizer)
    np.testing.assert_allclose(model.dense.kernel[...], kernel * 0.9, rtol=1e-6)
    assert bits(model.bn.scale[...]) == bits(scale)


# --- commit_if_finite


def test_commit_keeps_every_kind_of_leaf():
    old = {
        "f32": jnp.array([-0.0, 1.0]), "bf16": jnp.zeros(2, jnp.bfloat16), "int": jnp.array(3), "none": None,
        "key": jax.random.key(0), "running": jn.running_stats(c=2), "state": (optax.EmptyState(), [jnp.zeros(2)]),
        "bool": jnp.array([False, False]), "numpy": np.arange(2.0, dtype=np.float32), "complex": jnp.zeros(1, complex),
    }  # fmt: skip
    new = jax.tree.map(lambda z: jax.random.key(1) if z is old["key"] else jnp.ones_like(z), old)
    data = lambda tree: {**tree, "key": jax.random.key_data(tree["key"])}  # noqa: E731
    for ok, want in ((True, new), (jnp.array(False), old), (np.bool_(False), old), (None, new)):
        got = jn.tools.commit_if_finite(old, new, ok)
        assert jax.tree.structure(got) == jax.tree.structure(old)
        assert bits(data(got)) == bits(data(want))
    jitted = jax.jit(jn.tools.commit_if_finite)(old, new, jnp.array(False))
    assert bits(data(jitted)) == bits(data(old))
    assert [z.dtype for z in jax.tree.leaves(jitted)] == [z.dtype for z in jax.tree.leaves(old)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_without_ok_one_number_rejects_all(bad):
    old, new = {"a": jnp.zeros(2), "n": jnp.array(0)}, {"a": jnp.array([1.0, bad]), "n": jnp.array(1)}
    assert bits(jn.tools.commit_if_finite(old, new)) == bits(old)
    new["a"] = jnp.ones(2)
    assert bits(jn.tools.commit_if_finite(old, new)) == bits(new)


def test_nothing_of_a_rejected_step_reaches_a_gradient():
    def loss(old, new):
        return jn.tools.commit_if_finite({"a": old}, {"a": new})["a"].sum()

    old, new = jnp.ones(2), jnp.array([jnp.nan, 1.0])
    for_old, for_new = jax.grad(loss, (0, 1))(old, new)
    assert for_old.tolist() == [1.0, 1.0]
    assert for_new.tolist() == [0.0, 0.0]


def test_commit_is_a_scan_carry():
    """Six steps, of which those with an infinity in x do not count: the statistics of the others alone."""
    xs = np.stack([X + i for i in range(6)])
    xs[[1, 4], 2, 3] = np.inf

    def step(running, x):
        _, new = jn.batch_norm(x, running, "n c", "n", momentum=None)
        return jn.tools.commit_if_finite(running, new), None

    got, _ = jax.lax.scan(step, jn.running_stats(c=4), xs)
    good = xs[[0, 2, 3, 5]].astype(np.float64)
    np.testing.assert_allclose(got.mean, good.mean(1).mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.var, good.var(1).mean(0), rtol=1e-5)
    assert int(got.num_updates) == 4


def test_loss_scaling_that_rejects_a_step_changes_no_bit(variables):
    """float16 gradients of a loss that was scaled too far: params, momentum and statistics stay, the scale halves."""
    tx = optax.sgd(0.1, momentum=0.9)

    def loss(params, stats, x, scale):
        y, new = Net().apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return (jnp.square(y).mean().astype(jnp.float16) * scale).astype(jnp.float32), new["batch_stats"]

    @jax.jit
    def step(state, x, scale):
        grads, stats = jax.grad(loss, has_aux=True)(state["params"], state["batch_stats"], x, scale)
        grads = jax.tree.map(lambda g: g / scale.astype(jnp.float32), grads)
        ok = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        updates, opt = tx.update(grads, state["opt"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "batch_stats": stats, "opt": opt}
        return jn.tools.commit_if_finite(state, new, ok), jnp.where(ok, scale, scale / 2)

    with jax.numpy_rank_promotion("allow"):  # flax's Dense
        start = {**variables, "opt": tx.init(variables["params"])}
        accepted, scale = step(start, X, jnp.array(8.0, jnp.float16))
        assert scale == 8.0
        poisoned = X.copy()
        poisoned[3, 1] = np.inf
        rejected, scale = step(accepted, poisoned, scale)
    assert bits(accepted["batch_stats"]) != bits(start["batch_stats"])
    assert scale == 4.0
    assert bits(rejected) == bits(accepted)


def test_commit_in_nnx():
    model = Model(nnx.Rngs(0))
    same = nnx.state(model), nnx.state(model)
    with pytest.raises(ValueError, match=r"hold the same nnx Variables, which a step changes in both"):
        jn.tools.commit_if_finite(*same)
    with pytest.raises(ValueError, match=r"averaged and variables hold the same nnx Variables"):
        jn.tools.ema(*same)

    @nnx.jit
    def step(model, x):
        old = nnx.as_pure(nnx.state(model))
        model(x)
        nnx.update(model, jn.tools.commit_if_finite(old, nnx.as_pure(nnx.state(model))))

    with jax.numpy_rank_promotion("allow"):
        before = bits(nnx.state(model))
        step(model, X * np.inf)
        assert bits(nnx.state(model)) == before
        step(model, X)
        assert bits(nnx.state(model)) != before


MESH = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))


def test_ok_that_differs_between_devices():
    """Each device decides for itself. What comes out may differ, which JAX knows; reduced first, it is one decision."""

    def own(old, x):
        return jn.tools.commit_if_finite(old, old + 1, jnp.isfinite(x).all())

    def agreed(old, x):
        ok = jax.lax.pmin(jnp.isfinite(x).all().astype(jnp.int32), "devices") > 0
        return jn.tools.commit_if_finite(old, old + 1, ok)

    x = np.zeros(8, np.float32)
    x[3] = np.nan

    def run(f, out):
        return jax.jit(jax.shard_map(f, mesh=MESH, in_specs=(P(), P("devices")), out_specs=out))(jnp.zeros(1), x)

    assert run(own, P("devices")).tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="out_specs"):
        run(own, P())
    assert run(agreed, P()).tolist() == [0]


@pytest.mark.parametrize(
    ("old", "new", "ok", "message"),
    [
        ({"a": X}, {"b": X}, True, "old and new are different trees: ['a'] is in old alone, ['b'] is in new alone."),
        ([X], (X,), True, "old and new are different trees: their containers are of other types."),
        ({"a": X}, {"a": X[0]}, True, "['a'] is float32[8, 4] in old, float32[4] in new."),
        ({"a": X}, {"a": X.astype(np.float16)}, True, "['a'] is float32[8, 4] in old, float16[8, 4] in new."),
        ({"a": X}, {"a": X}, X[0] > 0, "ok is one bool, whether the step counts, got bool[4]."),
        ({"a": X}, {"a": X}, 1.0, "ok is one bool, whether the step counts, got float32[]."),
        ({"a": "relu"}, {"a": "relu"}, True, "['a'] in old is no array, it is a str."),
    ],
)  # fmt: skip
def test_wrong_commits(old, new, ok, message):
    with pytest.raises(jn.errors.ArgumentError) as error:
        jn.tools.commit_if_finite(old, new, ok)
    assert str(error.value) == f"jaxnorm.tools.commit_if_finite: {message}"


# --- ema


def tree(weight, mean, updates):
    return {
        "params": {"bn": {"scale": jnp.full(2, weight)}, "dense": {"kernel": jnp.full((2, 2), weight)}},
        "batch_stats": {
            "bn": {"mean": jnp.full(2, mean), "var": jnp.full(2, mean + 1), "num_updates": jnp.array(updates)}
        },
    }


@pytest.mark.parametrize(
    ("stats", "mean", "updates"), [("average", 0.75 * 4 + 0.25 * 8, 9), ("newest", 8.0, 9), ("keep", 4.0, 5)]
)
def test_ema(stats, mean, updates):
    got = jax.jit(lambda a, b: jn.tools.ema(a, b, 0.75, stats=stats))(tree(1.0, 4.0, 5), tree(3.0, 8.0, 9))
    want = tree(0.75 * 1 + 0.25 * 3, mean, updates)
    assert jax.tree.map(lambda z: (z.dtype, z.tolist()), got) == jax.tree.map(lambda z: (z.dtype, z.tolist()), want)


def test_ema_of_traced_momentum_is_the_plain_average():
    """momentum = t / (t + 1), SWA."""

    def step(carry, x):
        averaged, t = carry
        return (jn.tools.ema(averaged, {"w": x}, t / (t + 1)), t + 1), None

    (got, _), _ = jax.lax.scan(step, ({"w": jnp.zeros(4)}, jnp.array(0.0)), X)
    np.testing.assert_allclose(got["w"], X.astype(np.float64).mean(0), rtol=1e-5)


def test_ema_keeps_float32_of_half_precision_weights():
    """A thousand steps of 0.999: the distance left is 0.999^1000 of the first."""
    new = {"w": jnp.ones(1, jnp.bfloat16), "key": jax.random.key(1)}
    start = {"w": jnp.zeros(1), "key": jax.random.key(0)}
    got = jax.lax.fori_loop(0, 1000, lambda _, averaged: jn.tools.ema(averaged, new), start)
    np.testing.assert_allclose(got["w"], [1 - 0.999**1000], rtol=1e-4)
    assert (jax.random.key_data(got["key"]) == jax.random.key_data(new["key"])).all()
    with pytest.raises(ValueError, match=r"averaged\['w'\] is bfloat16, which loses what a step adds"):
        jn.tools.ema(new, new)


def test_ema_of_nnx_and_of_haiku():
    model = Model(nnx.Rngs(0))
    averaged = nnx.as_pure(nnx.state(model))
    with jax.numpy_rank_promotion("allow"):
        model(X)
    new = nnx.as_pure(nnx.state(model))
    got = jn.tools.ema(averaged, new, 0.5)
    assert isinstance(got, nnx.State)
    np.testing.assert_allclose(got["bn"]["mean"], (averaged["bn"]["mean"] + new["bn"]["mean"]) / 2, rtol=1e-6)
    assert bits(jn.tools.ema(averaged, new, 0.5, stats="keep")["bn"]) == bits(averaged["bn"])
    ema = "batch_norm/~/mean_ema"
    state = [{ema: {"hidden": z, "average": z, "counter": n}} for z, n in ((X[0], jnp.array(1)), (X[1], jnp.array(2)))]
    var = {"batch_norm/~/var_ema": {"average": X[0]}}
    a, b = (({"batch_norm": {"scale": X[i]}}, {**state[i], **var}) for i in (0, 1))
    params, kept = jn.tools.ema(a, b, 0.5, stats="keep")
    assert bits(kept) == bits(a[1])
    np.testing.assert_allclose(params["batch_norm"]["scale"], (X[0] + X[1]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jn.tools.ema({"a": X}, {"a": X}, 1.5), "momentum is the part of the old value that is kept"),
        (lambda: jn.tools.ema({"a": X}, {"a": X}, jnp.float32(1.5)), "momentum is the part of the old value"),
        (lambda: jn.tools.ema({"a": X}, {"a": X}, jnp.ones(4)), "momentum is the part of the old value"),
        (lambda: jn.tools.ema({"a": X}, {"a": X}, "0.9"), "momentum is the part of the old value"),
        (lambda: jn.tools.ema({"a": X}, {"a": X}, stats="copy"), 'must be "average", "newest" or "keep", got \'copy\''),
        (lambda: jn.tools.ema({"a": X}, {"a": X[0]}), r"\['a'\] is float32\[8, 4\] in averaged, float32\[4\] in"),
    ],
)
def test_wrong_averages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
