"""jaxnorm.tools.fold: outputs of the model without its norms against those of the model with them."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folding import BEFORE, NORMS, Net, Pair, cast, check, close, conv, filled, inputs_for, layer, normal

import jaxnorm as jn
from jaxnorm import linen as jn_linen
from jaxnorm import nnx as jn_nnx
from jaxnorm.errors import ArgumentError
from jaxnorm.tools.fold import fold, scale_and_shift


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", BEFORE)
@pytest.mark.parametrize("norm", NORMS)
def test_into_the_layer_before(norm, kind, use_bias):
    bn = NORMS[norm](use_running_average=True, epsilon=0.1, use_bias=use_bias, use_scale=kind != "conv")
    check(Pair(layer(kind, use_bias), bn), Pair(layer(kind, True), None), inputs_for(kind), "layer", "before")


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", ["dense", "dense over two", "conv 1d", "conv", "grouped", "depthwise"])
@pytest.mark.parametrize("norm", NORMS)
def test_into_the_layer_after(norm, kind, use_bias):
    bn = NORMS[norm](use_running_average=True)
    model = Pair(layer(kind, use_bias), bn, norm_first=True)
    check(model, Pair(layer(kind, True), None, norm_first=True), inputs_for(kind), "layer", "after")


def test_values_are_the_formula_and_the_rest_is_the_same_bits():
    class Model(nn.Module):
        norm: bool = True

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, name="first")(x)
            x = nn.Conv(4, (2,), padding="VALID", name="conv")(x)
            x = nn.BatchNorm(use_running_average=True, epsilon=0.5, name="bn")(x) if self.norm else x
            return nn.Dense(2, name="last")(nn.LayerNorm(name="ln")(x))

    x = normal(2, 5, 3)
    variables = filled(Model().init(jax.random.key(0), x))
    folded, _ = fold(Model().apply, variables, x)
    f64 = jax.tree.map(lambda z: np.asarray(z, np.float64), variables)
    bn, stats, conv = f64["params"]["bn"], f64["batch_stats"]["bn"], f64["params"]["conv"]
    factor = bn["scale"] / np.sqrt(stats["var"] + np.float64(np.float32(0.5)))
    expected = {"kernel": conv["kernel"] * factor, "bias": (conv["bias"] - stats["mean"]) * factor + bn["bias"]}
    for name, value in expected.items():
        assert folded["params"]["conv"][name].dtype == jnp.float32
        np.testing.assert_allclose(folded["params"]["conv"][name], value, rtol=1e-7)
    for name in ("first", "ln", "last"):
        jax.tree.map(np.testing.assert_array_equal, folded["params"][name], variables["params"][name])
    assert folded.keys() == {"params"}
    assert variables["params"].keys() == {"first", "conv", "bn", "ln", "last"}  # the tree given is left alone


def test_dense_after_is_the_formula():
    p = {
        "bn": {"scale": normal(3), "bias": normal(3), "mean": normal(3), "var": jnp.abs(normal(3)) + 0.1},
        "dense": {"kernel": normal(3, 2), "bias": normal(2)},
    }

    def model(p, x):
        b = p["bn"]
        x = (x - b["mean"]) * jax.lax.rsqrt(b["var"] + 1e-5) * b["scale"] + b["bias"]
        return jnp.tanh(x @ p["dense"]["kernel"] + p["dense"]["bias"])

    with jax.numpy_rank_promotion("allow"):
        folded, report = fold(model, p, normal(4, 3))
    b, d = ({k: np.asarray(v, np.float64) for k, v in p[name].items()} for name in ("bn", "dense"))
    factor = b["scale"] / np.sqrt(b["var"] + np.float64(np.float32(1e-5)))
    np.testing.assert_allclose(folded["dense"]["kernel"], factor[:, None] * d["kernel"], rtol=1e-6)
    shift = (b["bias"] - b["mean"] * factor) @ d["kernel"] + d["bias"]
    np.testing.assert_allclose(folded["dense"]["bias"], shift, rtol=1e-6, atol=1e-6)
    assert folded.keys() == {"dense"}
    assert report.title == "1 of 1 norms folded"


@pytest.mark.parametrize("norm", NORMS)
def test_a_net_of_inverted_residuals(norm):
    x = normal(2, 5, 5, 4)
    model, without = Net(NORMS[norm]), Net(None)
    variables = filled(model.init(jax.random.key(0), x))
    folded, report = fold(jax.jit(model.apply), variables, x)
    assert report.title == "6 of 6 norms folded"
    assert set(report.to_dict()["the layer stands"]) == {"before"}
    assert jax.tree.structure(folded) == jax.tree.structure(without.init(jax.random.key(0), x))
    close(without.apply(folded, x), model.apply(variables, x))


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jn_nnx.BatchNorm])
def test_nnx(norm):
    class Model(nnx.Module):
        def __init__(self, rngs, norm):
            self.first = nnx.Conv(3, 4, (3, 3), use_bias=norm is None, rngs=rngs)
            self.bns = nnx.List([norm(4, use_running_average=True, rngs=rngs)] if norm else [])
            self.up = nnx.ConvTranspose(4, 2, (2, 2), transpose_kernel=True, rngs=rngs)
            self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.bn = norm(2, use_running_average=True, rngs=rngs) if norm else None

        def __call__(self, x):
            x = self.first(x)
            for bn in self.bns:
                x = bn(x)
            x = self.up(self.drop(nnx.relu(x)))
            return self.bn(x) if self.bn else x

    x = normal(2, 5, 5, 3)
    graph, state = nnx.split(Model(nnx.Rngs(0), norm))
    state = filled(state)
    folded, report = fold(lambda state, x: nnx.merge(graph, state)(x), state, x)
    assert report.to_dict()["into"] == ["up", "first"]
    without, like = nnx.split(Model(nnx.Rngs(0), None))
    assert jax.tree.structure(folded) == jax.tree.structure(like)
    close(nnx.merge(without, folded)(x), nnx.merge(graph, state)(x))


def test_haiku():
    def net(x, train, norm=True):
        x = hk.Conv2D(4, 3, with_bias=not norm)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, train) if norm else x
        return hk.Linear(2)(jax.nn.relu(x))

    x = normal(2, 5, 5, 3)
    model = hk.transform_with_state(net)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = filled(model.init(jax.random.key(0), x, True))
        (params, state), report = fold(lambda v, x: model.apply(*v, None, x, False)[0], variables, x)
        assert [row["into"] for row in report.rows] == ["conv2_d"]
        assert params.keys() == {"conv2_d", "linear"}
        assert params["conv2_d"].keys() == {"w", "b"}
        assert state == {}
        y, _ = model.apply(*variables, None, x, False)
        close(model.apply(params, state, None, x, False, norm=False)[0], y)


def test_kernel_on_the_left_and_channels_first():
    """Equinox's order, under vmap: kernel [out, in] times x, then norm over channels that stand first."""
    p = {"fc": {"weight": normal(4, 3)}, "bn": {"weight": normal(4), "bias": normal(4)}}
    p["bn"] |= {"running_mean": normal(4), "running_var": jnp.abs(normal(4)) + 0.1}

    def model(p, x):
        y = jax.vmap(lambda column: p["fc"]["weight"] @ column, 1, 1)(x)
        y = y + p["fc"]["bias"][:, None] if "bias" in p["fc"] else y
        if "bn" in p:
            stats = jn.RunningStats(p["bn"]["running_mean"], p["bn"]["running_var"], jnp.array(0), ("c",))
            y = jn.normalize(y, stats, "c n", scale=p["bn"]["weight"], bias=p["bn"]["bias"])
        return jnp.sin(y)

    x = normal(3, 7)
    folded, report = fold(model, p, x)
    assert list(report.rows[0].values()) == ["bn", "fc", "before"]
    close(model(folded, x), model(p, x))


def test_large_inputs_in_the_cpu_form():
    model = Pair(nn.Dense(6), jn_linen.BatchNorm(use_running_average=True))
    x = jax.ShapeDtypeStruct((2**17, 4), jnp.float32)
    variables = filled(model.init(jax.random.key(0), jnp.ones((1, 4))))
    folded, report = fold(model.apply, variables, x)
    assert report.title == "1 of 1 norms folded"
    small = normal(5, 4)
    close(Pair(nn.Dense(6), None).apply(folded, small), model.apply(variables, small))


def test_bfloat16_kernels_keep_their_dtype():
    bn = nn.BatchNorm(use_running_average=True, dtype=jnp.float32)
    more = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model, without = (Pair(nn.Dense(6, use_bias=b, **more), n) for b, n in ((False, bn), (True, None)))
    x = normal(64, 4)
    with jax.numpy_dtype_promotion("standard"):
        variables = filled(model.init(jax.random.key(0), x))
        folded, _ = fold(model.apply, variables, x)
        expected = model.apply(variables, x)
    own = folded["params"]["layer"]
    assert own["kernel"].dtype == own["bias"].dtype == jnp.bfloat16
    close(without.apply(folded, x), expected, tol=0.03)


def test_two_norms_on_both_sides_and_in_a_row():
    def model(p, x):
        for name in ("a", "b", "dense", "c", "d"):
            if name in p:
                x = dense(p, x) if name == "dense" else norm(p[name], x)
        return x

    def dense(p, x):
        x = x @ p["dense"]["kernel"]
        return x + p["dense"]["bias"][None] if "bias" in p["dense"] else x

    def norm(p, x):
        return jn.normalize(x, jn.RunningStats(p["mean"], p["var"], jnp.array(0), ("c",)))

    stats = {n: {"mean": normal(s), "var": jnp.abs(normal(s)) + 0.1} for n, s in zip("abcd", (3, 3, 2, 2), strict=True)}
    p = {**stats, "dense": {"kernel": normal(3, 2)}}
    x = normal(5, 3)
    folded, report = fold(model, p, x)
    assert report.to_dict()["the layer stands"] == [None, "after", "before", "before"]
    close(model(folded, x), model(p, x))


def test_where_and_what_is_no_batch_norm():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = nn.relu(nn.BatchNorm(use_running_average=True, name=f"bn{i}")(nn.Dense(3, name=f"dense{i}")(x)))
            return nn.LayerNorm(name="ln")(x)

    x = normal(2, 3)
    variables = filled(Model().init(jax.random.key(0), x))
    folded, report = fold(Model().apply, variables, x, where=["bn[02]", "ln"])
    assert report.to_dict() == {
        "norm": ["bn0", "bn2", "ln"],
        "into": ["dense0", "dense2", None],
        "the layer stands": ["before", "before", None],
        "why not": [None, None, "it has no running mean and variance"],
    }
    assert folded["batch_stats"].keys() == {"bn1"}
    jax.tree.map(np.testing.assert_array_equal, folded["params"]["dense1"], variables["params"]["dense1"])
    with pytest.raises(ArgumentError, match="matches no norm"):
        fold(Model().apply, variables, x, where="bn7")


def test_the_rest_becomes_scale_and_shift():
    class Model(nn.Module):
        folded: bool = False

        @nn.compact
        def __call__(self, x):
            norm = Affine if self.folded else lambda name: nn.BatchNorm(use_running_average=True, name=name)
            x = nn.relu(norm(name="a")(x))
            x = nn.Dense(3, name="dense")(x)
            return x if self.folded else norm(name="b")(x)

    class Affine(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
            return x * scale[None] + bias[None]

    x = normal(5, 3)
    variables = filled(Model().init(jax.random.key(0), x))
    folded, report = fold(Model().apply, variables, x, rest="scale and shift")
    assert report.title == "1 of 2 norms folded, 1 made scale and shift"
    assert report.to_dict()["into"] == ["scale and shift", "dense"]
    assert jax.tree.structure(folded) == jax.tree.structure(Model(folded=True).init(jax.random.key(0), x))
    close(Model(folded=True).apply(folded, x), Model().apply(variables, x))


def test_the_rest_has_a_place_or_stays():
    """A scale gets a bias beside it; where there is neither, the norm stays."""
    one = {"mean": normal(3), "var": jnp.abs(normal(3)) + 0.1}
    p = {"a": {"gamma": normal(3), "moving_mean": one["mean"], "moving_variance": one["var"]}, "b": one}

    def model(p, x):
        pairs = (p["a"]["moving_mean"], p["a"]["moving_variance"]), (p["b"]["mean"], p["b"]["var"])
        stats = [jn.RunningStats(m, v, jnp.array(0), ("c",)) for m, v in pairs]
        x = jn.normalize(jnp.sin(x), stats[0], scale=p["a"]["gamma"], epsilon=0.5)
        return jn.normalize(jnp.sin(x), stats[1])

    folded, report = fold(model, p, normal(2, 3), rest="scale and shift")
    assert report.to_dict()["into"] == ["scale and shift", None]
    assert report.rows[1]["why not"].endswith("it has no scale and no bias to hold its statistics")
    a = {name: np.asarray(value, np.float64) for name, value in p["a"].items()}
    scale = a["gamma"] / np.sqrt(a["moving_variance"] + 0.5)
    assert folded["a"].keys() == {"gamma", "beta"}
    np.testing.assert_allclose(folded["a"]["gamma"], scale, rtol=1e-6)
    np.testing.assert_allclose(folded["a"]["beta"], -a["moving_mean"] * scale, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, folded["b"], p["b"])


def test_scale_and_shift():
    mean, var, scale, bias = normal(4), jnp.abs(normal(4)), normal(4), normal(4)
    stats = jn.RunningStats(mean, var, jnp.array(3), ("c",))
    a, b = scale_and_shift(stats, scale, bias, epsilon=0.25)
    mean, var, scale, bias = (np.asarray(z, np.float64) for z in (mean, var, scale, bias))
    np.testing.assert_allclose(a, scale / np.sqrt(var + 0.25), rtol=1e-6)
    np.testing.assert_allclose(b, bias - mean * scale / np.sqrt(var + 0.25), rtol=1e-5, atol=1e-6)
    a, b = scale_and_shift(jn.moments(jnp.array([[1.0], [3.0]]), "n c", "n"), epsilon=0.0)
    assert (a.tolist(), b.tolist()) == ([1.0], [-2.0])
    with pytest.raises(ArgumentError, match="scale has shape"):
        scale_and_shift(stats, jnp.ones(3))
    for wrong, message in (("x", "scale must be an array"), (jnp.ones(4, jnp.complex64), "scale is complex")):
        with pytest.raises(ValueError, match=message):
            scale_and_shift(stats, wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="stats must be"):
        scale_and_shift({"mean": mean})  # type: ignore[arg-type]


def test_flips_in_space_and_a_returned_state_do_not_matter():
    class Model(nn.Module):
        norm: bool = True

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (2, 3, 3))
            x = conv(kernel[::-1], x)[:, ::-1]
            x = x + self.param("bias", nn.initializers.ones, (3,)).reshape(1, 1, 3)
            return nn.BatchNorm(use_running_average=True, name="bn")(x) if self.norm else x

    x = normal(2, 5, 3)
    variables = filled(Model().init(jax.random.key(0), x))
    folded, report = fold(lambda v, x: Model().apply(v, x, mutable=["batch_stats"]), variables, x)
    assert report.title == "1 of 1 norms folded"
    close(Model(norm=False).apply(folded, x), Model().apply(variables, x))


def test_constants_are_rounded_as_the_model_rounds_them():
    """A scale held in few digits, a norm read through integers."""
    p = {"bn": {"mean": normal(3), "var": jnp.abs(normal(3)) + 0.1, "scale": 3 * normal(3)}}
    p["conv"] = {"kernel": normal(2, 3, 3)}

    def model(p, x, norm=True):
        x = conv(p["conv"]["kernel"], x)
        x = x + p["conv"]["bias"].reshape(1, 1, 3) if "bias" in p["conv"] else x
        if norm:
            mean, var, scale = (p["bn"][k].reshape(1, 1, 3) for k in ("mean", "var", "scale"))
            mean, scale = cast(4 * mean, jnp.int32) / 4, jax.lax.reduce_precision(cast(scale, jnp.float8_e5m2), 4, 1)
            x = (x - jax.lax.optimization_barrier((var, mean))[1]) * jax.lax.rsqrt(var) * scale
        return x

    x = normal(2, 5, 3)
    folded, report = fold(model, p, x)
    assert report.title == "1 of 1 norms folded"
    close(model(folded, x, norm=False), model(p, x))


def test_wrong_arguments():
    model, x = Pair(nn.Dense(3), nn.BatchNorm(use_running_average=True)), normal(2, 3)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ArgumentError, match="no batch norm in the variables"):
        fold(model.apply, {"params": variables["params"]}, x)
    with pytest.raises(ArgumentError, match="False is no array"):
        fold(model.apply, variables, x, False)
    with pytest.raises(ArgumentError, match="apply must be a function"):
        fold(3, variables, x)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="where chose none of the 1 norms, of which 1 are batch norms"):
        fold(model.apply, variables, x, where=lambda norm: False)
    with pytest.raises(ArgumentError, match="rest must be"):
        fold(model.apply, variables, x, rest="drop")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="arrays with values"):
        jax.jit(lambda v: fold(model.apply, v, x).variables)(variables)
