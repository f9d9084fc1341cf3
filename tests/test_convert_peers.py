"""Keras, Haiku, Equinox and ONNX: what is imported goes on as it would have, and goes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from converting import BATCHES, blank, close, evaluated, net, trained

import jaxnorm as jn
from jaxnorm.errors import ArgumentError

convert = jn.tools.convert
RNG = np.random.default_rng(2)
# Keras's variables in NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture(autouse=True)
def relaxed():
    """Peers promote dtypes and ranks without a word."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# --- Keras


@pytest.fixture(scope="module")
def keras():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        yield pytest.importorskip("keras", reason="keras is not installed")


@pytest.fixture(scope="module")
def keras_net(keras):
    """After two batches; with the weights then, for tests that go on from there."""
    layers = keras.layers
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = keras.Sequential(
            [
                keras.Input((5, 5, 3)), layers.Conv2D(4, 3, name="conv"),
                layers.BatchNormalization(momentum=0.8, epsilon=2e-3, name="bn"), layers.ReLU(),
                layers.GroupNormalization(2, name="gn"), layers.GlobalAveragePooling2D(),
                layers.LayerNormalization(name="ln"), layers.Dense(2, name="fc"),
            ]
        )  # fmt: skip
        for x in BATCHES[:2]:
            model(x, training=True)
    return model, model.get_weights()


KERAS = {"momentum": 0.8, "epsilon": 2e-3, "unbiased": False, "debias": False}


@pytest.mark.parametrize("form", ["model", "net.keras", "net.h5", "net.weights.h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_keras(keras_net, form, tmp_path):
    peer, weights = keras_net
    peer.set_weights(weights)
    source = peer
    if form != "model":
        source = tmp_path / form
        (peer.save_weights if "weights" in form else peer.save)(source)
    bare = form == "net.weights.h5"  # has no config: batch norm's settings are the user's to say
    given = {name: KERAS[name] for name in ("momentum", "epsilon")} if bare else None
    model = net(1e-3, **KERAS)
    variables, report = convert(source, blank(model), settings=given)
    assert report.settings == KERAS
    whence = dict(zip(*(report.to_dict()[name] for name in ("target", "settings")), strict=True))
    assert (whence["bn"], whence["gn"]) == (("default given", "given") if bare else ("source", "source"))
    close(evaluated(model, variables), peer(BATCHES[0], training=False))
    after = trained(model, variables, rate=0.0)
    for x in BATCHES[2:]:
        peer(x, training=True)
    close(evaluated(model, after), peer(BATCHES[0], training=False))
    close(after["batch_stats"]["bn"]["var"], peer.get_layer("bn").moving_variance)


def test_keras_there_and_back(keras_net):
    peer, _ = keras_net
    variables, _ = convert(peer, blank(net(1e-3)))
    tree, report = convert(variables, peer, settings={"momentum": 0.7})
    assert report.settings == {"momentum": 0.7, "epsilon": 1e-5}
    for variable in peer.weights:
        np.testing.assert_array_equal(tree[variable.path], variable)


def test_keras_layers_of_other_shapes(keras, tmp_path):
    """Without scale, without bias, depthwise, transposed; in a model inside a model, and inside a layer of ours."""
    layers = keras.layers

    @keras.saving.register_keras_serializable("jaxnorm")
    class Own(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.norm = layers.BatchNormalization(name="inside")

        def call(self, x):
            return self.norm(x)

    inner = keras.Sequential([keras.Input((3, 3, 6)), layers.LayerNormalization(center=False, name="ln")], name="inner")
    outer = keras.Sequential(
        [
            keras.Input((5, 5, 3)), layers.DepthwiseConv2D(3, depth_multiplier=2, name="dw"), inner,
            layers.BatchNormalization(scale=False, name="bn"), Own(name="own"), layers.Dropout(0.5),
            layers.Conv2DTranspose(2, 3, name="up"),
        ]
    )  # fmt: skip
    outer.set_weights([RNG.random(w.shape) for w in outer.get_weights()])
    vector = {name: np.zeros(6, np.float32) for name in ("scale", "bias", "mean", "var")}
    target = {
        "dw": {"kernel": np.zeros((3, 3, 1, 6)), "bias": vector["bias"]}, "inner": {"ln": {"scale": vector["scale"]}},
        "bn": {name: vector[name] for name in ("bias", "mean", "var")}, "own": {"inside": dict(vector)},
        "up": {"kernel": np.zeros((3, 3, 6, 2)), "bias": np.zeros(2)},
    }  # fmt: skip
    outer.save(tmp_path / "net.keras")
    trees = [convert(source, target).variables for source in (outer, tmp_path / "net.keras")]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    tree = trees[0]
    np.testing.assert_array_equal(tree["bn"]["bias"], outer.get_layer("bn").beta)
    np.testing.assert_array_equal(tree["own"]["inside"]["var"], outer.get_layer("own").norm.moving_variance)

    import flax.linen as nn

    dw = nn.Conv(6, (3, 3), padding="VALID", feature_group_count=3)
    close(dw.apply({"params": tree["dw"]}, BATCHES[0]), outer.get_layer("dw")(BATCHES[0]))
    x = RNG.normal(size=(2, 3, 3, 6)).astype(np.float32)
    up = nn.ConvTranspose(2, (3, 3), padding="VALID")
    close(up.apply({"params": tree["up"]}, x), outer.get_layer("up")(x))
    back, _ = convert(tree, outer)
    for variable in outer.weights:
        np.testing.assert_array_equal(back[variable.path], variable)
    outer.save_weights(tmp_path / "net.weights.h5")
    with pytest.raises(ArgumentError, match=r"layer 'bn' has 3 vectors without names.*Give the .keras file"):
        jn.tools.read(tmp_path / "net.weights.h5")


# --- Haiku


DECAY = {"momentum": 0.9, "epsilon": 1e-5, "unbiased": False, "debias": True}


def haiku_net():
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")

    def run(x, train):
        x = hk.Conv2D(4, 3, padding="VALID", name="conv")(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9, name="bn")(x, train))
        x = jnp.mean(hk.GroupNorm(2, name="gn")(x), (1, 2))
        return hk.Linear(2, name="fc")(hk.LayerNorm(-1, True, True, name="ln")(x))

    made = hk.without_apply_rng(hk.transform_with_state(run))
    params, state = jax.jit(made.init, static_argnums=2)(jax.random.key(0), BATCHES[0], True)
    params = jax.tree.map(lambda z: z + 0.1 * RNG.normal(size=z.shape).astype(np.float32), params)
    apply = jax.jit(made.apply, static_argnums=3)
    for x in BATCHES[:2]:
        _, state = apply(params, state, x, True)
    return apply, params, state


def test_haiku():
    """A debiased average: ours is that of Adam, so it goes on to the digit."""
    apply, params, state = haiku_net()
    model = net(1e-5, **DECAY)
    variables, report = convert((params, state), blank(model), settings={"momentum": 0.9})
    assert report.settings == DECAY
    assert int(variables["batch_stats"]["bn"]["num_updates"]) == 2
    close(evaluated(model, variables), apply(params, state, BATCHES[0], False)[0])

    # there and back
    (params2, state2), report = convert(variables, (params, state), settings=report.settings)
    assert report.settings == {"decay_rate": 0.9, "eps": 1e-5}
    jax.tree.map(np.testing.assert_array_equal, params2, params)
    for name, average in state.items():
        np.testing.assert_array_equal(state2[name]["average"], average["average"])
        np.testing.assert_array_equal(state2[name]["counter"], average["counter"])
        close(state2[name]["hidden"], average["hidden"], rtol=1e-6, atol=1e-7)

    after = trained(model, variables, rate=0.0)
    for x in BATCHES[2:]:
        state = apply(params, state, x, True)[1]
        state2 = apply(params2, state2, x, True)[1]
    close(evaluated(model, after), apply(params, state, BATCHES[0], False)[0])
    for name in ("mean", "var"):
        average = state[f"bn/~/{name}_ema"]["average"].reshape(-1)
        close(after["batch_stats"]["bn"][name], average)
        close(state2[f"bn/~/{name}_ema"]["average"].reshape(-1), average)


def test_into_haiku_without_a_count():
    """Flax's average of no debiasing goes on in Haiku as it would have."""
    apply, params, state = haiku_net()
    model = net(1e-5, momentum=0.9)
    variables = jax.tree.map(lambda leaf: RNG.uniform(0.5, 1, leaf.shape).astype(np.float32), blank(model))
    (params, state), report = convert(variables, (params, state))
    assert "no longer debiased" in dict(zip(report.to_dict()["target"], report.to_dict()["changes"], strict=True))["bn"]
    after = trained(model, variables, rate=0.0)
    for x in BATCHES[2:]:
        state = apply(params, state, x, True)[1]
    for name in ("mean", "var"):
        close(after["batch_stats"]["bn"][name], state[f"bn/~/{name}_ema"]["average"].reshape(-1))


def test_haiku_needs_its_decay_rate():
    _, params, state = haiku_net()
    with pytest.raises(ArgumentError, match="decay_rate is not in its state: give settings="):
        convert((params, state), blank(net(1e-5, **DECAY)))
    with pytest.raises(ArgumentError, match="num_updates is 2, and the target keeps none: give its norm debias=True"):
        convert((params, state), blank(net(1e-5)), settings={"momentum": 0.9})
    # a flax tree does not say its momentum either, and what Haiku stores depends on it
    variables, _ = convert((params, state), blank(net(1e-5, **DECAY)), settings={"momentum": 0.9})
    with pytest.raises(ArgumentError, match="depends on the decay_rate"):
        convert(variables, (params, state), settings={"debias": True})


# --- Equinox


def equinox_net(mode):
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        bn: eqx.nn.BatchNorm
        gn: eqx.nn.GroupNorm
        ln: eqx.nn.LayerNorm
        fc: eqx.nn.Linear

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(3, 4, 3, key=key)
            self.bn = eqx.nn.BatchNorm(4, "batch", eps=1e-3, momentum=0.7, mode=mode)
            self.gn, self.ln = eqx.nn.GroupNorm(2, 4, eps=1e-4), eqx.nn.LayerNorm(4, eps=1e-4)
            self.fc = eqx.nn.Linear(4, 2, key=key)

        def __call__(self, x, state, inference):
            x, state = self.bn(self.conv(x), state, inference=inference)
            x = jnp.mean(self.gn(jax.nn.relu(x)), (1, 2))
            return self.fc(self.ln(x)), state

    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))

    @eqx.filter_jit
    def apply(model, state, x, inference):
        run = jax.vmap(model, (0, None, None), (0, None), axis_name="batch")
        return run(jnp.moveaxis(x, -1, 1), state, inference)

    return apply, model, state


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_equinox(mode):
    """Its settings are fields of the layers, its statistics lie in the state."""
    apply, peer, state = equinox_net(mode)
    if mode == "ema":
        with pytest.raises(ArgumentError, match="'bn' has seen no batch"):
            convert((peer, state), blank(net(1e-4)))
    for x in BATCHES[:2]:
        state = apply(peer, state, x, False)[1]
    said = {"momentum": 0.7, "epsilon": 1e-3, "unbiased": False, "debias": mode == "batch"}
    model = net(1e-4, **said)
    variables, report = convert((peer, state), blank(model))
    assert report.settings == pytest.approx(said)
    assert report.layers["gn"] == {"epsilon": 1e-4}
    close(evaluated(model, variables), apply(peer, state, BATCHES[0], True)[0])

    (peer2, state2), _ = convert(variables, (peer, state), settings=said)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(peer), jax.tree.leaves(peer2))
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(state2), strict=True):
        close(right, left, rtol=1e-6, atol=1e-7)
        assert left.dtype == right.dtype

    after = trained(model, variables, rate=0.0)
    for x in BATCHES[2:]:
        state = apply(peer, state, x, False)[1]
        state2 = apply(peer2, state2, x, False)[1]
    close(evaluated(model, after), apply(peer, state, BATCHES[0], True)[0])
    close(apply(peer2, state2, BATCHES[0], True)[0], apply(peer, state, BATCHES[0], True)[0])
    mean, var = state.get(peer.bn.ema_state_index if mode == "ema" else peer.bn.batch_state_index)
    scale = 1 if mode == "ema" else 1 - 0.7**7  # seven updates: batch mode stores what is still to be debiased
    close(after["batch_stats"]["bn"]["mean"], mean / scale)
    close(after["batch_stats"]["bn"]["var"], var / scale)


@pytest.mark.parametrize("library", ["haiku", "equinox"])
def test_transposed_convolutions_that_run_forwards(library):
    import flax.linen as nn

    peer = pytest.importorskip(library, reason=f"{library} is not installed")
    x = BATCHES[0][:2]
    if library == "haiku":
        made = peer.transform(lambda x: peer.Conv2DTranspose(4, 3, 2, padding="VALID", name="up")(x))
        source = made.init(jax.random.key(0), x)
        expected, flags = made.apply(source, None, x), "up"
    else:

        class Net(peer.Module):
            up: peer.nn.ConvTranspose2d

        source, flags = Net(peer.nn.ConvTranspose2d(3, 4, 3, 2, key=jax.random.key(0))), ()
        expected = jnp.moveaxis(jax.vmap(source.up)(jnp.moveaxis(x, -1, 1)), 1, -1)
    model = nn.ConvTranspose(4, (3, 3), (2, 2), padding="VALID")
    template = {"up": jax.eval_shape(model.init, jax.random.key(0), x)["params"]}
    tree, _ = convert(source, {"params": template}, transposed=flags)
    close(model.apply({"params": tree["params"]["up"]}, x), expected)
    back, _ = convert(tree, source, transposed=flags)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(back), jax.tree.leaves(source))


# --- ONNX


@pytest.fixture(scope="module")
def onnx():
    return pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.mark.parametrize("names", ["torch's", "numbers"])
def test_onnx(onnx, names, tmp_path):
    """A graph in training mode, by ONNX's own reference evaluator, fed with its own statistics."""
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    plain = names == "torch's"
    arrays = {
        "conv.weight": RNG.normal(size=(4, 3, 3, 3)), "conv.bias": RNG.normal(size=4),
        **{f"{at}.{name}": RNG.uniform(0.5, 1, 4) for at in ("bn", "gn", "ln") for name in ("weight", "bias")},
        "bn.running_mean": RNG.normal(size=4), "bn.running_var": RNG.uniform(0.5, 1, 4),
        "fc.weight": RNG.normal(size=(2, 4) if plain else (4, 2)), "fc.bias": RNG.normal(size=2),
    }  # fmt: skip
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    called = dict(zip(arrays, arrays if plain else map(str, range(100)), strict=False))

    def graph(training, opset=21):
        def node(op, x, at, leaves, out, **said):
            return helper.make_node(op, [x, *(called[f"{at}.{leaf}"] for leaf in leaves.split())], out, at, **said)

        statistics = ["y1", "mean", "var"] if training else ["y1"]
        dense = [node("Gemm", "y5", "fc", "weight bias", ["y"], transB=1)] if plain else [
            node("MatMul", "y5", "fc", "weight", ["y6"]), helper.make_node("Add", ["y6", called["fc.bias"]], ["y"]),
        ]  # fmt: skip
        nodes = [
            node("Conv", "x", "conv", "weight bias", ["y0"]),
            node("BatchNormalization", "y0", "bn", "weight bias running_mean running_var", statistics, momentum=0.6,
                 epsilon=1e-3, training_mode=int(training)),
            helper.make_node("Relu", ["y1"], ["y2"]),
            node("GroupNormalization", "y2", "gn", "weight bias", ["y3"], num_groups=2),
            helper.make_node("ReduceMean", ["y3", "axes"], ["y4"], keepdims=0),
            node("LayerNormalization", "y4", "ln", "weight bias", ["y5"], epsilon=1e-4),
            *dense,
        ]  # fmt: skip
        info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y", "mean", "var")]
        held = [numpy_helper.from_array(value, called[name]) for name, value in arrays.items()]
        held.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
        made = helper.make_graph(nodes, "net", info[:1], info[1:] if training else info[1:2], held)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)])

    def run(x, training):
        return ReferenceEvaluator(graph(training)).run(None, {"x": x.transpose(0, 3, 1, 2)})

    onnx.save(graph(False), tmp_path / "net.onnx")
    model = net(1e-5, momentum=0.6, epsilon=1e-3)
    variables, report = convert(tmp_path / "net.onnx", blank(model))
    assert report.settings == {"momentum": 0.6, "epsilon": 1e-3, "unbiased": False, "debias": False}
    assert (report.layers["gn"], report.layers["ln"]) == ({"epsilon": 1e-5}, {"epsilon": 1e-4})
    after = trained(model, variables, rate=0.0)
    for x in BATCHES[2:]:
        _, arrays["bn.running_mean"], arrays["bn.running_var"] = run(x, True)
    for name in ("mean", "var"):
        close(after["batch_stats"]["bn"][name], arrays[f"bn.running_{name}"])
