"""jaxnorm.tools.fold: outputs of the model without its norms against those of the model with them; every refusal."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jn_linen
from jaxnorm import nnx as jn_nnx
from jaxnorm.errors import ArgumentError
from jaxnorm.tools.fold import fold, fold_pairs, scale_and_shift

RNG = np.random.default_rng(0)
NORMS = {"flax": nn.BatchNorm, "jaxnorm": jn_linen.BatchNorm}


def filled(tree):
    """The tree with statistics and parameters that show whatever is wrong: none is 0 or 1."""

    def fill(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        words = jax.tree_util.keystr(path)
        value = RNG.normal(size=leaf.shape)
        if "var" in words or "scale" in words:
            value = RNG.uniform(0.3, 2.0, leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def close(a, b, tol=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= tol * np.abs(b).max()


class Pair(nn.Module):
    """[layer, norm, relu] or [relu, norm, layer]; `norm` None is the model once folded."""

    layer: nn.Module
    norm: nn.Module | None
    norm_first: bool = False

    @nn.compact
    def __call__(self, x):
        norm = self.norm or (lambda x: x)
        return self.layer(norm(nn.relu(x))) if self.norm_first else nn.relu(norm(self.layer(x)))


def layer(kind, use_bias, **more):
    kinds = {
        "dense": lambda: nn.Dense(6, use_bias=use_bias, **more),
        "dense over two": lambda: nn.DenseGeneral((2, 3), use_bias=use_bias, **more),
        "conv 1d": lambda: nn.Conv(6, (3,), padding="VALID", use_bias=use_bias, **more),
        "conv": lambda: nn.Conv(6, (3, 2), strides=(2, 1), padding="VALID", use_bias=use_bias, **more),
        "grouped": lambda: nn.Conv(6, (3, 3), padding="VALID", feature_group_count=2, use_bias=use_bias, **more),
        "depthwise": lambda: nn.Conv(8, (3, 3), padding="VALID", feature_group_count=4, use_bias=use_bias, **more),
        "padded": lambda: nn.Conv(6, (3, 3), use_bias=use_bias, **more),
        "transposed": lambda: nn.ConvTranspose(6, (3, 3), strides=(2, 2), use_bias=use_bias, **more),
        "transposed kernel": lambda: nn.ConvTranspose(
            6, (3, 2), strides=(2, 2), transpose_kernel=True, use_bias=use_bias, **more
        ),
    }
    return kinds[kind]()


def inputs_for(kind):
    return normal(2, 7, 4) if kind in ("dense", "conv 1d", "dense over two") else normal(2, 7, 6, 4)


BEFORE = ["dense", "conv 1d", "conv", "grouped", "depthwise", "padded", "transposed", "transposed kernel"]


def check(model, without, x, into, stands):
    """Fold the one norm of `model`: `without` it gives the same, from a tree that is like its own."""
    variables = filled(model.init(jax.random.key(0), x))
    folded, report = fold(model.apply, variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert report.to_dict() == {"norm": ["norm"], "into": [into], "the layer stands": [stands], "why not": [None]}
    assert jax.tree.structure(folded) == jax.tree.structure(without.init(jax.random.key(0), x))
    close(without.apply(folded, x), model.apply(variables, x))
    return variables, folded


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


class Residual(nn.Module):
    """Expand, depthwise, project, add: the block of MobileNetV2, with wrappers, scopes and every norm foldable."""

    norm: type | None

    @nn.compact
    def __call__(self, x):
        def conv(x, features, kernel, name, groups=1, act=True):
            use_bias = self.norm is None
            x = nn.Conv(features, kernel, feature_group_count=groups, use_bias=use_bias, name=f"{name}_conv")(x)
            if self.norm is not None:
                x = self.norm(use_running_average=True, name=f"{name}_bn")(x)
            return nn.relu6(x) if act else x

        y = conv(x, 8, (1, 1), "expand")
        y = conv(y, 8, (3, 3), "depthwise", groups=8)
        return x + conv(y, 4, (1, 1), "project", act=False)


class Net(nn.Module):
    norm: type | None

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.remat(Residual)(self.norm)(x)
        return nn.Dense(3)(x.mean((1, 2)))


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


# --- what is refused


def bn(p, x):
    shape = (1,) * (x.ndim - 1) + (-1,)
    mean, var, scale, bias = (p[name].reshape(shape) for name in ("mean", "var", "scale", "bias"))
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


def conv(kernel, x, padding: str | list[tuple[int, int]] = "VALID", **more):
    return jax.lax.conv_general_dilated(x, kernel, (1,), padding, dimension_numbers=("NWC", "WIO", "NWC"), **more)


MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]), "d")


def scanned(p, x):
    def step(carry, _):
        return bn(p["bn"], carry), None

    return jax.lax.scan(step, x @ p["conv"]["kernel"][0], None, 2)[0]


def train(p, x):
    y, _ = jn.batch_norm(conv(p["conv"]["kernel"], x), jn.running_stats(c=3), scale=p["bn"]["scale"])
    return y


def of_another(p, x):
    b = p["bn"]
    return bn({**b, "scale": b["scale"] * p["conv"]["bias"]}, conv(p["conv"]["kernel"], x))


def own_bias_late(p, x):
    return jnp.exp(bn(p["bn"], conv(p["conv"]["kernel"], x)) + p["conv"]["bias"].reshape(1, 1, 3))


def cast(z, dtype):
    return z.astype(dtype).astype(jnp.float32)


def after(kernel, x, p):
    return conv(kernel, bn(p["bn"], jnp.sin(x)))


def with_penalty(p, x):
    return jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x))), jnp.sum(p["bn"]["scale"] ** 2)


def through_a_ref(p, x):
    y = conv(p["conv"]["kernel"], x)
    ref = jax.new_ref(jnp.zeros(y.shape))
    ref[...] = y
    return jnp.sin(bn(p["bn"], y)) + ref[...]


def around_a_ref(p, x):
    ref = jax.new_ref(jnp.zeros((3, 3, 3)))
    ref[...] = conv(p["conv"]["kernel"], x)
    return jnp.sin(bn(p["bn"], ref[...]))


ROUNDS = "its input is the output of `convert_element_type`"
COMPUTED = "its input is the output of `conv_general_dilated`, whose kernel is computed, by `"
TURNED = "whose kernel `conv` is reshaped across its axes, or reversed"
REFUSED = {
    "integers between": (lambda p, x: jnp.sin(bn(p["bn"], cast(conv(p["conv"]["kernel"], x), jnp.int32))), ROUNDS),
    "booleans between": (lambda p, x: jnp.sin(bn(p["bn"], cast(conv(p["conv"]["kernel"], x), bool))), ROUNDS),
    "float8 between": (
        lambda p, x: jnp.sin(bn(p["bn"], cast(conv(p["conv"]["kernel"], x), jnp.float8_e5m2))),
        ROUNDS,
    ),
    "integers after": (
        lambda p, x: conv(p["conv"]["kernel"], cast(bn(p["bn"], jnp.sin(x)), jnp.int32)),
        "its output goes to `convert_element_type`: no Dense, no Conv",
    ),
    "less precision between": (
        lambda p, x: jnp.sin(bn(p["bn"], jax.lax.reduce_precision(conv(p["conv"]["kernel"], x), 5, 2))),
        "its input is the output of `reduce_precision`",
    ),
    "integers in the norm": (
        lambda p, x: jnp.sin(
            cast(conv(p["conv"]["kernel"], x) - p["bn"]["mean"].reshape(1, 1, 3), jnp.int32)
            * jax.lax.rsqrt(p["bn"]["var"]).reshape(1, 1, 3)
        ),
        "it is used more than once, with `convert_element_type` between",
    ),
    "integer kernel": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(cast(p["conv"]["kernel"], jnp.int8), x))),
        COMPUTED + "convert_element_type`",
    ),
    "kernel of less precision": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(jax.lax.reduce_precision(p["conv"]["kernel"], 5, 2), x))),
        COMPUTED + "reduce_precision`",
    ),
    "outputs reversed": (lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"][..., ::-1], x))), TURNED),
    "outputs flipped": (lambda p, x: jnp.sin(bn(p["bn"], conv(jnp.flip(p["conv"]["kernel"], 2), x))), TURNED),
    "inputs reversed": (lambda p, x: after(p["conv"]["kernel"][:, ::-1], x, p), TURNED),
    "channels reversed": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x)[..., ::-1])),
        "`rev` reorders its channels, or mixes them with other axes",
    ),
    "bias reversed": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x) + p["conv"]["bias"][::-1].reshape(1, 1, 3))),
        "between `conv` and it stands `add`",
    ),
    "two biases": (
        lambda p, x: jnp.sin(
            bn(p["bn"], conv(p["conv"]["kernel"], x) + sum(p["conv"][k].reshape(1, 1, 3) for k in ("bias", "offset")))
        ),
        "between `conv` and it stands `add`",
    ),
    "two biases, one by one": (
        lambda p, x: jnp.sin(
            bn(
                p["bn"],
                (conv(p["conv"]["kernel"], x) + p["conv"]["bias"].reshape(1, 1, 3))
                + p["conv"]["offset"].reshape(1, 1, 3),
            )
        ),
        "between `conv` and it stands `add`",
    ),
    "box kernel": (
        lambda p, x: after(jnp.broadcast_to(p["conv"]["kernel"][None], (2, 2, 3, 3)).reshape(4, 3, 3), x, p),
        "whose kernel `conv` is broadcast",
    ),
    "kernel that a reshape transposes": (
        lambda p, x: after(jax.lax.reshape(p["conv"]["kernel"], (2, 3, 3), (0, 2, 1)), x, p),
        TURNED,
    ),
    "batch groups": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x, batch_group_count=3))),
        "its input is the output of `conv_general_dilated` of a kernel with a kernel",
    ),
    "penalty on the norm": (with_penalty, "the model also returns what `reduce_sum` makes of its variables"),
    "mapped constant": (
        lambda p, x: jnp.sin(
            bn(
                p["bn"] | {"scale": jax.shard_map(jnp.exp, mesh=MESH, in_specs=P(), out_specs=P())(p["bn"]["scale"])},
                conv(p["conv"]["kernel"], x),
            )
        ),
        "what `shard_map` makes of its variables cannot be computed alone",
    ),
    "kept in a Ref": (through_a_ref, "the output of `conv` is also one of the model"),
    "read from a Ref": (around_a_ref, "its input is the output of `get`"),
    "activation": (
        lambda p, x: jnp.sin(bn(p["bn"], jax.nn.relu(conv(p["conv"]["kernel"], x)))),
        "its input is the output of `max` (in `relu`); its output goes to `sin`: no Dense, no Conv",
    ),
    "argument": (
        lambda p, x: jnp.sin(bn(p["bn"], x)),
        "its input is an argument of the model; its output goes to `sin`: no Dense, no Conv",
    ),
    "output": (
        lambda p, x: bn(p["bn"], jnp.sin(x)),
        "its input is the output of `sin`; its output is one of the model",
    ),
    "kernel used twice": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], conv(p["conv"]["kernel"], x)))),
        "its input is the output of `conv_general_dilated`, and the kernel of `conv` is used 2 times; "
        "its output goes to `sin`: no Dense, no Conv",
    ),
    "layer used twice": (
        lambda p, x: (y := conv(p["conv"]["kernel"], x)) - jnp.sin(bn(p["bn"], y)),
        "the output of `conv` is also used by `sub`; its output goes to `sin`: no Dense, no Conv",
    ),
    "norm used by two": (
        lambda p, x: (y := bn(p["bn"], jnp.sin(x)))[:, 1:] + conv(p["conv"]["kernel"], y),
        "its input is the output of `sin`; its output is used 2 times: by `slice`, `conv_general_dilated`",
    ),
    "weight norm": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(jn.weight_standardization(p["conv"]["kernel"]), x))),
        "its input is the output of `conv_general_dilated`, whose kernel is computed, by `",
    ),
    "kernel of the input": (
        lambda p, x: jnp.sin(bn(p["bn"], x @ x[0, :3])),
        "its input is the output of `dot_general`, whose operands both depend on the input",
    ),
    "kernel outside": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(jnp.ones((2, 3, 3)), x))),
        "its input is the output of `conv_general_dilated`, whose kernel is",
    ),
    "padding": (
        lambda p, x: conv(p["conv"]["kernel"], bn(p["bn"], jnp.sin(x)), "SAME"),
        "its input is the output of `sin`; `conv` puts zeros between or around its output: they would need its bias",
    ),
    "dilation": (
        lambda p, x: conv(p["conv"]["kernel"], bn(p["bn"], jnp.sin(x)), [(0, 0)], lhs_dilation=(2,)),
        "`conv` puts zeros between or around its output: they would need its bias",
    ),
    "between": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x) + p["other"].reshape(1, 1, 3))),
        "between `conv` and it stands `add`",
    ),
    "bias along another axis": (  # as long as there are channels
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x) + p["conv"]["bias"].reshape(1, 3, 1))),
        "between `conv` and it stands `add`",
    ),
    "shard_map": (
        lambda p, x: jax.shard_map(
            lambda p, x: bn(p["bn"], conv(p["conv"]["kernel"], x)), mesh=MESH, in_specs=P(), out_specs=P()
        )(p, x),
        "it is inside a `shard_map`",
    ),
    "scale between": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x) * 2.0)),
        "its input is the output of `mul`",
    ),
    "scan": (scanned, "it is inside a `scan`: unroll it"),
    "used twice": (
        lambda p, x: bn(p["bn"], jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x)))),
        "it is used more than once, with `sin` between",
    ),
    "used in two places": (
        lambda p, x: bn(p["bn"], conv(p["conv"]["kernel"], x)) - bn(p["bn"], x[:, 1:]),
        "it is used more than once, with `sub` between",
    ),
    "unused": (lambda p, x: jnp.sin(conv(p["conv"]["kernel"], x)), "the model does not use it"),
    "training": (train, "the model does not read its mean and var: call it in evaluation mode"),
    "other axis": (
        lambda p, x: bn(p["bn"], conv(p["conv"]["kernel"], x).swapaxes(1, 2)),
        "its statistics do not lie along the output features of `conv`",
    ),
    "of another": (of_another, "parameters of another layer enter it, in `mul`"),
    "bias late": (own_bias_late, "['conv']['bias'] is not what is added to the output of `conv`"),
    "not affine": (
        lambda p, x: conv(p["conv"]["kernel"], x) ** p["bn"]["mean"].reshape(1, 1, 3) + p["bn"]["var"].reshape(1, 1, 3),
        "its parameters enter `pow`, which is no scale and bias along one axis",
    ),
    "negative variance": (
        lambda p, x: bn({**p["bn"], "var": -p["bn"]["var"]}, conv(p["conv"]["kernel"], x)),
        "its statistics are not finite, or var + epsilon is not positive",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    model, message = REFUSED[case]
    p = {
        "bn": {"scale": normal(3), "bias": normal(3), "mean": normal(3), "var": jnp.abs(normal(3)) + 0.1},
        "conv": {"kernel": normal(2, 3, 3)},
        "other": normal(3),
    }
    if "bias" in case or case == "of another":
        p["conv"] |= {"bias": normal(3), "offset": normal(3)}
    folded, report = fold(model, p, normal(3, 4, 3))
    assert report.title == "0 of 1 norms folded"
    assert message in report.rows[0]["why not"]
    assert jax.tree.structure(folded) == jax.tree.structure(p)
    jax.tree.map(np.testing.assert_array_equal, folded, p)


def test_zero_shift_passes_padding():
    """Zeros around the output of the norm stay zeros where its shift is 0."""
    p = {"bn": {"mean": jnp.zeros(3), "var": jnp.abs(normal(3)) + 0.1}}
    p["conv"] = {"kernel": normal(3, 3, 2), "bias": normal(2)}

    def model(p, x):
        x = jnp.sin(x)
        x = jn.normalize(x, jn.RunningStats(p["bn"]["mean"], p["bn"]["var"], jnp.array(0), ("c",))) if "bn" in p else x
        return conv(p["conv"]["kernel"], x, "SAME") + p["conv"]["bias"].reshape(1, 1, 2)

    x = normal(2, 5, 3)
    folded, report = fold(model, p, x)
    assert report.rows[0]["the layer stands"] == "after"
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


@pytest.mark.parametrize("var", [1e-12, 1e24])
def test_a_kernel_that_cannot_hold_it_is_refused(var):
    """It would be 1e9 or 1e-9: infinite or 0."""
    p = {"bn": {"mean": jnp.zeros(2), "var": jnp.full(2, var)}, "fc": {"kernel": jnp.full((2, 2), 1e3, jnp.float16)}}

    def model(p, x):
        y = (x @ p["fc"]["kernel"]).astype(jnp.float32)
        return jnp.sin((y - p["bn"]["mean"][None]) * jax.lax.rsqrt(p["bn"]["var"][None]))

    _, report = fold(model, p, jnp.ones((1, 2), jnp.float16))
    assert "['fc']['kernel'] in float16 cannot hold what it would become" in report.rows[0]["why not"]


# --- pairs


def torch_tree():
    tree = {"head.weight": normal(2, 4), "head.bias": normal(2)}
    for i, (o, n) in enumerate(((3, 5), (4, 3))):
        tree[f"blocks.{i}.conv.weight"] = normal(o, n, 1, 1)
        for name in ("weight", "bias", "running_mean", "running_var"):
            tree[f"blocks.{i}.bn.{name}"] = jnp.abs(normal(o)) + 0.1
        tree[f"blocks.{i}.bn.num_batches_tracked"] = jnp.array(3)
    return {name: np.asarray(value) for name, value in tree.items()}


@pytest.mark.parametrize("pattern", ["blocks/{i}/bn", "blocks.*.bn"])
def test_pairs_against_torch(pattern):
    torch = pytest.importorskip("torch")

    def net(norm):
        def block(n, o):
            parts = {"conv": torch.nn.Conv2d(n, o, 1, bias=not norm)}
            if norm:
                parts["bn"] = torch.nn.BatchNorm2d(o)
            return torch.nn.Sequential(torch.nn.modules.container.OrderedDict(parts))

        blocks = torch.nn.Sequential(block(5, 3), block(3, 4))
        pool = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
        parts = {"blocks": blocks, "pool": torch.nn.Sequential(*pool), "head": torch.nn.Linear(4, 2)}
        return torch.nn.Sequential(torch.nn.modules.container.OrderedDict(parts)).eval()

    def run(norm, tree):
        model = net(norm)
        model.load_state_dict({name: torch.tensor(value) for name, value in tree.items()})
        with torch.no_grad():
            return model(torch.tensor(x)).numpy()

    tree, x = torch_tree(), RNG.normal(size=(2, 5, 3, 3)).astype(np.float32)
    folded, report = fold_pairs(tree, {pattern: pattern.replace("bn", "conv")})
    assert report.to_dict()["into"] == ["blocks/0/conv", "blocks/1/conv"]
    assert all(isinstance(value, np.ndarray) for value in folded.values())
    close(run(False, folded), run(True, tree))


def test_pairs_of_flax_are_what_fold_finds():
    x = normal(2, 5, 5, 4)
    variables = filled(Net(nn.BatchNorm).init(jax.random.key(0), x))
    pairs = {"*/expand_bn": "*/expand_conv", "*/{name}_bn": "*/{name}_conv"}
    with pytest.raises(ArgumentError, match="the norm 'CheckpointResidual_0/expand_bn' has two pairs"):
        fold_pairs(variables, pairs)
    folded, _ = fold_pairs(variables, {"*/{name}_bn": "*/{name}_conv"})
    expected, _ = fold(Net(nn.BatchNorm).apply, variables, x)
    assert jax.tree.structure(folded) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), folded, expected)


def test_pairs_transposed_and_left_alone():
    kernel, one = normal(2, 3, 4), jnp.ones(3)
    stats = {"mean": normal(3), "var": one}
    tree = {"up": {"kernel": kernel}, "bn": stats, "other": {"mean": one, "var": one}}
    folded, report = fold_pairs(tree, {"bn": "up"}, epsilon=3.0, out_axis=-2)
    np.testing.assert_allclose(folded["up"]["kernel"], np.asarray(kernel) / 2, rtol=1e-6)
    np.testing.assert_allclose(folded["up"]["bias"], -np.asarray(stats["mean"]) / 2, rtol=1e-6)
    assert report.to_dict()["why not"] == [None, "it has no pair"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"blocks/*/norm": "blocks/*/conv"}, "'blocks/\\*/norm' matches no batch norm"),
        ({"blocks/*/bn": "blocks/*/cnov"}, "that has no kernel, weight, w. Did you mean 'blocks/0/conv'"),
        ({"blocks/*/bn": "blocks/{i}/conv"}, "'{i}' in 'blocks/{i}/conv' stands for nothing"),
        ({"blocks/*/bn": "blocks/0/conv"}, r"the layer 'blocks/0/conv' has two pairs|the norm has shape"),
        ({"blocks/1/bn": "blocks/0/conv"}, r"the norm has shape \(4,\), the weight \(3, 5, 1, 1\)"),
    ],
)
def test_pairs_that_do_not_fit(pairs, message):
    with pytest.raises(ArgumentError, match=message):
        fold_pairs(torch_tree(), pairs)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be a number, not negative, got -1.0"),
        ({"epsilon": float("inf")}, "epsilon must be a number, not negative, got inf"),
        ({"epsilon": "x"}, "epsilon must be a number, not negative, got 'x'"),
        ({"epsilon": {"blocks.0.bn": 1.0}}, "epsilon says none for 'blocks/1/bn'"),
        ({"epsilon": {"blocks.0.nb": 1.0}}, "epsilon is given for 'blocks/0/nb', .* Did you mean 'blocks/0/bn'"),
        ({"out_axis": "x"}, "out_axis must be an integer, got 'x'"),
        ({"out_axis": {"blocks.0.cnov": 1}}, "out_axis is given for 'blocks/0/cnov', .* Did you mean 'blocks/0/conv'"),
        ({"pairs": ["blocks/*/bn"]}, "pairs must be a mapping"),
        ({"pairs": {"blocks/*/bn": 0}}, "pairs must be a mapping"),
        ({"pairs": {"blocks/0/bn": "blocks/0/act"}}, r"its weight has shape \(3,\), and is no kernel"),
        ({"pairs": {"blocks/0/bn": "blocks/0/int"}}, r"\['blocks.0.int.weight'\] holds int8"),
        ({"tree": {"a": {"w": np.ones((2, 2)), "mean": np.ones(2), "moving_variance": np.ones(2)}}}, "say epsilon"),
    ],
)
def test_pairs_with_wrong_arguments(more, message):
    tree = torch_tree() | {"blocks.0.act.weight": np.ones(3), "blocks.0.int.weight": np.ones((3, 5), np.int8)}
    with pytest.raises(ArgumentError, match=message):
        fold_pairs(**({"tree": tree, "pairs": {"blocks/*/bn": "blocks/*/conv"}} | more))


def test_pairs_with_an_epsilon_each():
    """Given, or the framework's: Keras has 1e-3."""
    tree = torch_tree()
    folded, report = fold_pairs(tree, {"*.*.bn": "*.*.conv"}, epsilon={"blocks/0/bn": 0.5, "blocks.1.bn": 0})
    for i, epsilon in enumerate((0.5, 0.0)):
        scale = tree[f"blocks.{i}.bn.weight"] / np.sqrt(np.float64(tree[f"blocks.{i}.bn.running_var"]) + epsilon)
        expected = tree[f"blocks.{i}.conv.weight"] * scale[:, None, None, None]
        np.testing.assert_allclose(folded[f"blocks.{i}.conv.weight"], expected, rtol=1e-6)
    assert report.to_dict()["epsilon"] == [0.5, 0.0]
    kernel, var = np.ones((3, 2), np.float32), np.full(2, 1e-3, np.float32)
    keras = {"fc/kernel": kernel, "bn/moving_mean": 0 * var, "bn/moving_variance": var}
    folded, report = fold_pairs(keras, {"bn": "fc"})
    np.testing.assert_allclose(folded["fc/kernel"], kernel / np.sqrt(2e-3), rtol=1e-6)
    assert report.to_dict()["epsilon"] == [1e-3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pairs_of_torchs_tensors(dtype):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    conv, norm = torch.nn.ConvTranspose2d(3, 3, 2, bias=False), torch.nn.BatchNorm2d(3)
    model = torch.nn.Sequential(conv, norm).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, z in [("running_var", norm.running_var), *norm.named_parameters()]:
            z.uniform_(0.3, 2.0) if name != "bias" else z.normal_()
        norm.running_mean.normal_()
        _, report = fold_pairs(model.state_dict(), {"1": "0"})
        assert report.rows[0]["note"] == "as many inputs as outputs: a transposed convolution would need out_axis"
        folded, report = fold_pairs(model.state_dict(), {"1": "0"}, out_axis={"0": 1})
        assert report.rows[0]["note"] is None
        without = torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 3, 2)).to(getattr(torch, dtype))
        without.load_state_dict(folded)  # tensors, of the same names
        assert {z.dtype for z in folded.values()} == {getattr(torch, dtype)}
        x = torch.randn(2, 3, 4, 4, dtype=getattr(torch, dtype))
        close(without(x).float().numpy(), model(x).float().numpy(), 1e-5 if dtype == "float32" else 0.03)


def test_attributes_can_not_be_removed():
    rngs = nnx.Rngs(0)
    module = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, use_running_average=True, rngs=rngs))
    with pytest.raises(ArgumentError, match=r"is an attribute of an object.*nnx.state"):
        fold(lambda module, x: module(x), module, normal(2, 2))
