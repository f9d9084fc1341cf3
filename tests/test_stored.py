"""Norms that use stored statistics while the rest trains; and back, without loss."""


import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from freezing import KEY, Model, Net, X, as_users_run, bits, variables  # noqa: F401

import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.linen import use_stored_stats
from jaxnorm.nnx import use_stored_stats as view_with_stored_stats


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
