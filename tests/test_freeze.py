"""Three ways to freeze a norm: its scale and bias, its statistics, or its use of the batch; and back, without loss."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.linen import use_stored_stats
from jaxnorm.nnx import use_stored_stats as view_with_stored_stats

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(1.0, 2.0, (8, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def as_users_run():
    """optax's schedules and flax's Dense promote."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Block(nn.Module):
    norm: type = jaxnorm.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        return self.norm(name="bn", momentum=0.5)(nn.Dense(4, name="dense")(x), use_running_average=not train)


class Net(nn.Module):
    norm: type = jaxnorm.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        x = Block(self.norm, name="a")(x, train)
        return nn.LayerNorm(name="ln")(Block(self.norm, name="b")(nn.relu(x), train))


class Model(nnx.Module):
    def __init__(self, norm=jaxnorm.nnx.BatchNorm, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.bns = nnx.List([norm(4, rngs=rngs, momentum=0.5) for norm in (norm, norm)])

    def __call__(self, x, train=True):
        for bn in self.bns:
            x = bn(self.dense(x), use_running_average=not train)
        return x


def bits(tree):
    return [(np.asarray(z).dtype, np.asarray(z).tobytes()) for z in jax.tree.leaves(tree)]


@functools.cache
def variables(norm=jaxnorm.linen.BatchNorm):
    """With scales and biases that are no round numbers, and a zero with a sign."""
    v = Net(norm).init(KEY, X)
    noise = np.random.default_rng(1).normal(size=4).astype(np.float32)
    noise[0] = -0.0
    return jax.tree.map(lambda z: z + jnp.asarray(noise) * 0.1 if z.shape == (4,) else z, v) | {
        "params": jax.tree.map(lambda z: jnp.asarray(noise) if z.shape == (4,) else z, v["params"])
    }


# --- scale and bias

OPTIMIZERS = {
    "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.1, weight_decay=0.1),
    "lamb": optax.lamb(0.1, weight_decay=0.1),
    "adafactor": optax.adafactor(0.1, weight_decay_rate=0.1),
}


def trained(tx, labels):
    return optax.multi_transform({"trained": tx, "frozen": jn.tools.frozen()}, labels)


def steps(tx, params, number, start=None):
    """Ten steps in one program."""

    def loss(params, i):
        y, _ = Net().apply({"params": params, **stats}, X + i, mutable=["batch_stats"])
        return jnp.sin(y).sum()

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, i), state, params)
        return (optax.apply_updates(params, updates), state), None

    stats = {"batch_stats": variables()["batch_stats"]}
    carry = params, tx.init(params) if start is None else start
    return jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(float(number)))[0])(carry)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_layer_does_not_move_by_a_bit(name):
    """Ten steps, with weight decay and a global clip outside; the rest moves."""
    params = variables()["params"]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), trained(OPTIMIZERS[name], jn.tools.freeze_affine(params, ["a/*", "ln"]))
    )
    new, _ = steps(tx, params, 10)
    for frozen in (("a", "bn"), ("ln",)):
        assert bits(functools.reduce(dict.get, frozen, new)) == bits(functools.reduce(dict.get, frozen, params))
    for moved in (("a", "dense"), ("b", "bn"), ("b", "dense")):
        for old, z in zip(*(jax.tree.leaves(functools.reduce(dict.get, moved, t)) for t in (params, new)), strict=True):
            assert (old != z).any()


def test_freezing_ends_without_loss():
    """Frozen for three steps and then trained: what plain SGD gives from the same point."""
    params = variables()["params"]
    frozen, _ = steps(trained(optax.sgd(0.1), jn.tools.freeze_affine(params)), params, 3)
    assert bits(frozen["a"]["bn"]) == bits(params["a"]["bn"])
    on = trained(optax.sgd(0.1), jax.tree.map(lambda _: "trained", params))
    assert bits(steps(on, frozen, 3)[0]) == bits(steps(optax.sgd(0.1), frozen, 3)[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_frozen_moves_no_number(dtype):
    """x + -0.0 is x for every x. With 0.0, which optax.set_to_zero adds, -0.0 becomes 0.0."""
    x = jnp.array([-0.0, 0.0, jnp.inf, -jnp.inf, jnp.nan, 1.0, -3e4, 6.2e-5], dtype)
    x = -x if dtype == jnp.complex64 else x  # with -0.0 in imaginary parts
    moved = []
    for tx in (jn.tools.frozen(), optax.set_to_zero()):
        step = lambda x: optax.apply_updates(x, tx.update(jnp.ones_like(x), tx.init(x), x)[0])  # noqa: E731, B023
        moved.append(bits(step(x)) != bits(x))
    assert moved == [False, True]
    assert bits(jax.jit(step)(x[5:])) == bits(x[5:])


def test_labels():
    params = {"dense": {"kernel": X}, "bn": {"scale": X[0], "bias": X[0]}, "ln": {"scale": X[0]}}
    labels = jn.tools.freeze_affine(params, lambda norm: norm.kind == "scale")
    assert labels == {
        "dense": {"kernel": "trained"}, "bn": {"scale": "trained", "bias": "trained"}, "ln": {"scale": "frozen"},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"jaxnorm.tools.freeze_affine: where='c' matches no norm"):
        jn.tools.freeze_affine(params, "c")
    with pytest.raises(ValueError, match=r"jaxnorm.tools.freeze_affine: there is no norm to freeze"):
        jn.tools.freeze_affine(params["dense"])


@pytest.mark.parametrize("whole", [False, True], ids=["function", "tree"])
def test_a_frozen_layer_in_nnx(whole):
    model = Model()
    state = nnx.state(model, nnx.Param)
    before = bits(state["bns"][0]), bits(state["bns"][1]), bits(state["dense"])
    labels = functools.partial(jn.tools.freeze_affine, where="bns/0")
    optimizer = nnx.Optimizer(
        model, trained(optax.adamw(0.1, weight_decay=0.1), labels(state) if whole else labels), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sin(model(X)).sum())(model))

    for _ in range(10):
        step(model, optimizer)
    state = nnx.state(model, nnx.Param)
    assert bits(state["bns"][0]) == before[0]
    assert bits(state["bns"][1]) != before[1]
    assert bits(state["dense"]) != before[2]


# --- statistics


def update(v, x=X):
    return Net().apply(v, x, mutable=["batch_stats"])[1]


def test_freeze_stats():
    v = variables()
    new = update(v)
    got = jn.tools.freeze_stats(v, new, "a/*")["batch_stats"]  # from all variables, into the statistics alone
    assert bits(got["a"]) == bits(v["batch_stats"]["a"])
    assert bits(got["b"]) == bits(new["batch_stats"]["b"])
    assert bits(got["b"]) != bits(v["batch_stats"]["b"])
    alone = jn.tools.freeze_stats(v["batch_stats"], new["batch_stats"], lambda norm: norm.path == "a/bn")
    assert bits(alone) == bits(got)
    whole = jn.tools.freeze_stats(v, {**v, **new})
    assert bits(whole) == bits(v)
    assert jax.tree.structure(whole) == jax.tree.structure({**v, **new})


def test_freezing_statistics_ends_without_loss():
    """Frozen in steps 1 and 2 they are as if the model had met the batch of step 3 alone: 0.5 old + 0.5 batch."""
    v = variables()
    for i in range(3):
        new = update(v, X + i)
        v = {**v, **(jn.tools.freeze_stats(v, new) if i < 2 else new)}
    dense = v["params"]["a"]["dense"]
    z = (X + 2).astype(np.float64) @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"], np.float64)
    old = variables()["batch_stats"]["a"]["bn"]
    np.testing.assert_allclose(v["batch_stats"]["a"]["bn"]["mean"], 0.5 * old["mean"] + 0.5 * z.mean(0), rtol=1e-5)
    np.testing.assert_allclose(v["batch_stats"]["a"]["bn"]["var"], 0.5 * old["var"] + 0.5 * z.var(0), rtol=1e-5)


def test_freeze_stats_in_other_trees():
    model = Model()
    old = nnx.as_pure(nnx.state(model))
    model(X)
    new = nnx.as_pure(nnx.state(model))
    got = jn.tools.freeze_stats(old, new, "bns/1")
    assert isinstance(got, nnx.State)
    with pytest.raises(ValueError, match="old and new hold the same nnx Variables"):
        jn.tools.freeze_stats(nnx.state(model), nnx.state(model))
    assert bits(got["bns"][1]) == bits(old["bns"][1])
    assert bits(got["bns"][0]) == bits(new["bns"][0]) != bits(old["bns"][0])
    torch = {"1.weight": X[0], "1.running_mean": X[1], "1.running_var": X[2], "1.num_batches_tracked": np.array(1)}
    later = {name: z + 1 for name, z in torch.items()}
    got = jn.tools.freeze_stats(torch, later)
    assert {name for name in torch if got[name] is torch[name]} == set(torch) - {"1.weight"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"ln": {"scale": X[0]}}, {"ln": {"scale": X[0]}}, "there are no running statistics: see find_norms."),
        ({}, {"bn": jn.running_stats(c=2)}, "old has no mean of 'bn'."),
        (
            {"bn": jn.running_stats(c=3)},
            {"bn": jn.running_stats(c=2)},
            "mean of 'bn' is float32[3] in old, float32[2] in new.",
        ),
    ],
)
def test_wrong_statistics(old, new, message):
    with pytest.raises(jn.errors.ArgumentError) as error:
        jn.tools.freeze_stats(old, new)
    assert str(error.value) == f"jaxnorm.tools.freeze_stats: {message}"


# --- stored statistics in training


def by_hand(v, x, a_stored, b_stored):
    """Net in float64; a norm that is stored is an affine map with its statistics."""

    def f(z):
        return np.asarray(z, np.float64)

    for name, stored in (("a", a_stored), ("b", b_stored)):
        p, s = v["params"][name], v["batch_stats"][name]["bn"]
        x = x @ f(p["dense"]["kernel"]) + f(p["dense"]["bias"])
        mean, var = (f(s["mean"]), f(s["var"])) if stored else (x.mean(0), x.var(0))
        x = (x - mean) / np.sqrt(var + 1e-5) * f(p["bn"]["scale"]) + f(p["bn"]["bias"])
        x = np.maximum(x, 0) if name == "a" else x
    p = v["params"]["ln"]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    return x * f(p["scale"]) + f(p["bias"])


@pytest.mark.parametrize("norm", [jaxnorm.linen.BatchNorm, nn.BatchNorm], ids=["jaxnorm", "flax"])
@pytest.mark.parametrize("where", ["a/*", None], ids=str)
def test_stored_in_linen(norm, where):
    v = variables(norm)
    apply = jax.jit(use_stored_stats(Net(norm).apply, where), static_argnames="mutable")
    y, state = apply(v, X, mutable=("batch_stats",))
    np.testing.assert_allclose(y, by_hand(v, X.astype(np.float64), True, where is None), rtol=1e-4, atol=1e-4)
    assert bits(state["batch_stats"]["a"]) == bits(v["batch_stats"]["a"])
    assert (bits(state["batch_stats"]["b"]) == bits(v["batch_stats"]["b"])) == (where is None)
    plain, _ = Net(norm).apply(v, X, mutable=["batch_stats"])  # and as before
    np.testing.assert_allclose(plain, by_hand(v, X.astype(np.float64), False, False), rtol=1e-4, atol=1e-4)


def test_gradients_through_stored_statistics_are_those_of_an_affine_map():
    """d y / d x = scale / sqrt(var + epsilon), of each element alone."""
    norm = jaxnorm.linen.BatchNorm(use_running_average=False)
    v = {
        "params": {"scale": jnp.array([2.0, 3.0]), "bias": jnp.zeros(2)},
        "batch_stats": {"mean": jnp.array([1.0, -1.0]), "var": jnp.array([4.0, 0.25])},
    }
    x, weight = X[:, :2], X[:, 2:]

    def loss(x, v):
        return (use_stored_stats(norm.apply)(v, x, mutable=["batch_stats"])[0] * weight).sum()

    by_x, by_v = jax.grad(loss, (0, 1))(x, v)
    std = np.sqrt(np.array([4.0, 0.25]) + 1e-5)
    np.testing.assert_allclose(by_x, weight * np.array([2.0, 3.0]) / std, rtol=1e-5)
    np.testing.assert_allclose(by_v["params"]["scale"], (weight * (x - [1.0, -1.0]) / std).sum(0), rtol=1e-4)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jaxnorm.linen.BatchNorm(use_running_average=False, name="bn")(x), None


class Under(nn.Module):
    """One batch norm under a transform of flax."""

    transform: str

    @nn.compact
    def __call__(self, x):
        norm = jaxnorm.linen.BatchNorm
        if self.transform == "scan":
            axes = {"params": 0, "batch_stats": 0}
            layers = nn.scan(Scanned, variable_axes=axes, split_rngs={"params": True}, length=1)
            return layers(name="layers")(x, None)[0]
        if self.transform == "positional":
            return norm(name="bn")(x, False)
        if self.transform == "ghost":
            return jaxnorm.linen.GhostBatchNorm(num_ghosts=2, use_running_average=False, name="bn")(x)
        return getattr(nn, self.transform)(norm)(use_running_average=False, name="bn")(x)


@pytest.mark.parametrize("transform", ["jit", "remat", "scan", "positional", "ghost"])
def test_stored_under_transforms_of_flax(transform):
    """nn.jit traces once for all calls that look alike, so the order of calls must not matter."""
    module = Under(transform)
    v = module.init(KEY, X)
    v = {**v, "batch_stats": jax.tree.map(lambda z: z + 2.0, v["batch_stats"])}
    stored = use_stored_stats(module.apply)
    before, old = module.apply(v, X, mutable=["batch_stats"])
    for mutable in (["batch_stats"], True):
        y, state = stored(v, X, mutable=mutable)
        np.testing.assert_allclose(y, (X - 2.0) / np.sqrt(3.0 + 1e-5), rtol=1e-5)
        assert bits(state["batch_stats"]) == bits(v["batch_stats"])
        assert state.keys() <= {"params", "batch_stats"}
    np.testing.assert_allclose(stored(v, X), (X - 2.0) / np.sqrt(3.0 + 1e-5), rtol=1e-5)
    after, new = module.apply(v, X, mutable=["batch_stats"])
    assert bits((before, old)) == bits((after, new))
    assert bits(new) != bits(v["batch_stats"])


def test_stored_says_what_it_cannot_do():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", jnp.zeros, 4)
            self.variable("batch_stats", "var", jnp.ones, 4)
            return x - mean.value

    own = nn.Sequential([Own()])
    v = own.init(KEY, X)
    with pytest.raises(ValueError, match=r"^jaxnorm.linen.use_stored_stats: Own 'layers_0' has no use_running_average"):
        use_stored_stats(own.apply)(v, X)
    with pytest.raises(ValueError, match=r"^jaxnorm.linen.use_stored_stats: where='ln' matches no norm."):
        use_stored_stats(Net().apply, "ln")(variables(), X)  # it has no statistics
    with pytest.raises(ValueError, match="there are no running statistics"):
        use_stored_stats(Net().apply)({"params": variables()["params"]}, X)


@pytest.mark.parametrize("norm", [jaxnorm.nnx.BatchNorm, nnx.BatchNorm], ids=["jaxnorm", "flax"])
def test_stored_in_nnx(norm):
    model = Model(norm)
    stats = [bits(nnx.state(bn, nnx.BatchStat)) for bn in model.bns]
    view = view_with_stored_stats(model, "bns/0")
    assert view.dense.kernel is model.dense.kernel

    @nnx.jit
    def run(model, x):
        return model(x)

    y = run(view, X)
    new = [bits(nnx.state(bn, nnx.BatchStat)) for bn in model.bns]
    assert new[0] == stats[0]
    assert new[1] != stats[1]
    dense = X.astype(np.float64) @ np.asarray(model.dense.kernel[...], np.float64)
    z = dense / np.sqrt(1 + 1e-5)
    z = z @ np.asarray(model.dense.kernel[...], np.float64)
    np.testing.assert_allclose(y, (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5), rtol=1e-4, atol=1e-5)
    run(model, X)  # the model itself, as before
    np.testing.assert_allclose(model.bns[0].mean[...], dense.mean(0) / 2, rtol=1e-4, atol=1e-6)
    assert type(model.bns[0]) is norm


def test_a_view_with_stored_statistics_trains_the_model():
    """One step of SGD through the affine map: the gradient of sum(y) by bias is the number of examples."""
    model = nnx.Sequential(jaxnorm.nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)

    @nnx.jit
    def step(view, optimizer, x):
        optimizer.update(view, nnx.grad(lambda view: view(x, use_running_average=False).sum())(view))

    step(view_with_stored_stats(model), optimizer, X)
    np.testing.assert_allclose(model.layers[0].bias[...], -8.0 * np.ones(4))
    np.testing.assert_allclose(model.layers[0].scale[...], 1 - X.sum(0) / np.sqrt(1 + 1e-5), rtol=1e-5)
    assert model.layers[0].mean[...].tolist() == [0.0] * 4


def test_stored_in_nnx_says_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"^jaxnorm.nnx.use_stored_stats: where='bn' matches no norm"):
        view_with_stored_stats(Model(), "bn")
    with pytest.raises(ValueError, match="there are no running statistics"):
        view_with_stored_stats(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))

    class Own(nnx.Module):
        def __init__(self):
            self.mean, self.var = nnx.BatchStat(jnp.zeros(4)), nnx.BatchStat(jnp.ones(4))

        def __call__(self, x):
            return x

    with pytest.raises(ValueError, match="a call of Own has no use_running_average to set"):
        view_with_stored_stats(nnx.Sequential(Own()))
