"""jaxnorm.tools.find: the norms of a tree, in every framework's words, and nothing that is none."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import equinox as eqx
import family_modules
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm as jn
import jaxnorm.linen

KEY = jax.random.key(0)
ONE, KERNEL = np.ones(4, np.float32), np.ones((4, 4), np.float32)


def kinds(tree, where=None):
    return {norm.path: (norm.kind, " ".join(norm.leaves)) for norm in jn.tools.find_norms(tree, where)}


@pytest.fixture(scope="module")
def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(7, 4)(x)
            x = nn.Dense(4)(x)
            x = jaxnorm.linen.BatchNorm(use_running_average=True)(x)
            x = nn.BatchNorm(use_scale=False, use_running_average=True)(x)
            x = nn.MultiHeadDotProductAttention(2, normalize_qk=True)(x)
            x = nn.WeightNorm(nn.Dense(4))(x)
            x = nn.RMSNorm()(x)
            return nn.GroupNorm(2)(x)

    with jax.numpy_rank_promotion("allow"):  # flax's
        return jax.eval_shape(Net().init, KEY, jnp.zeros((2, 3), jnp.int32))


REST = {
    "GroupNorm_0": ("scale and bias", "scale bias"),
    "MultiHeadDotProductAttention_0/key_ln": ("scale", "scale"),
    "MultiHeadDotProductAttention_0/query_ln": ("scale", "scale"),
    "RMSNorm_0": ("scale", "scale"),
    "WeightNorm_0/Dense_1/kernel": ("scale", "scale"),
}


def test_linen(linen):
    assert kinds(linen) == {
        "BatchNorm_0": ("batch", "scale bias mean var"), "BatchNorm_1": ("batch", "bias mean var"), **REST,
    }  # fmt: skip
    assert kinds(linen["params"]) == {"BatchNorm_0": ("scale and bias", "scale bias"), **REST}
    assert kinds(linen["batch_stats"]) == {
        "BatchNorm_0": ("batch", "mean var"), "BatchNorm_1": ("batch", "mean var"),
    }  # fmt: skip


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.linear = nnx.Embed(7, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.blocks = nnx.List([nnx.LayerNorm(4, rngs=rngs) for _ in range(11)])
        self.drop = nnx.Dropout(0.1, rngs=rngs)


def test_nnx_in_every_form():
    model = Model(nnx.Rngs(0))
    blocks = {f"blocks/{i}": ("scale and bias", "scale bias") for i in range(11)}
    whole = {**blocks, "norm": ("batch", "scale bias mean var")}
    state = nnx.state(model)
    for tree in (model, state, nnx.as_pure(state), nnx.to_pure_dict(state), nnx.split(model, nnx.Param, ...)[1:]):
        assert kinds(tree) == whole
    boxed = jax.tree.map(lambda leaf: {"value": leaf}, nnx.to_pure_dict(state))  # as orbax restores it
    assert kinds(boxed) == whole
    assert kinds(nnx.state(model, nnx.Param)) == {**blocks, "norm": ("scale and bias", "scale bias")}
    found = jn.tools.find_norms(state)
    assert found.paths == (*(f"blocks/{i}" for i in range(11)), "norm")  # 10 after 9
    for norm in found:
        assert [z.shape for z in jn.tools.find.get(state, *norm.leaves.values())] == [norm.shape] * len(norm.leaves)


def test_haiku():
    def net(x):
        x = hk.Linear(4)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, True)
        x = hk.LayerNorm(-1, True, True)(x)
        return hk.Linear(3)(hk.RMSNorm(-1)(x))

    with jax.numpy_rank_promotion("allow"):  # haiku's
        params, state = hk.transform_with_state(net).init(KEY, jnp.ones((2, 4)))
    rest = {"layer_norm": ("scale and bias", "scale bias"), "rms_norm": ("scale", "scale")}
    stats = "mean var num_updates mean_hidden var_counter var_hidden"
    whole = {"batch_norm": ("batch", f"scale bias {stats}"), **rest}
    assert kinds((params, state)) == kinds({"params": params, "state": state}) == whole
    assert kinds(params) == {"batch_norm": ("scale and bias", "scale bias"), **rest}
    (batch,) = jn.tools.find_norms((params, state), "batch_norm")
    assert {jax.tree_util.keystr(path) for path in batch.parameters} == {
        "[0]['batch_norm']['scale']", "[0]['batch_norm']['offset']",
    }  # fmt: skip


def test_keras():
    import keras

    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.BatchNormalization(name="bn")])
    net.add(keras.layers.LayerNormalization(name="ln"))
    named = {variable.path: variable.value for variable in net.variables}
    paths = {path.rsplit("/", 1)[0]: path for path in named}
    root = next(path for path in paths if path.endswith("bn"))[:-2]
    want = {f"{root}bn": ("batch", "scale bias mean var"), f"{root}ln": ("scale and bias", "scale bias")}
    assert kinds(named) == want
    trained = {variable.path for variable in net.trainable_variables}
    parts = {
        "trainable_variables": {path: z for path, z in named.items() if path in trained},
        "non_trainable_variables": {path: z for path, z in named.items() if path not in trained},
    }
    assert kinds(parts) == want


def test_torch():
    torch = pytest.importorskip("torch")
    layers = torch.nn
    net = layers.Sequential(
        layers.Conv2d(3, 4, 1), layers.BatchNorm2d(4), layers.LayerNorm([4, 5]), layers.Linear(4, 4),
        layers.Embedding(4, 4), layers.RMSNorm(4), layers.GroupNorm(2, 4), layers.MultiheadAttention(4, 2),
        layers.LSTM(4, 4), layers.Linear(1, 1), layers.Linear(4, 1, bias=False), layers.Sequential(layers.PReLU(4)),
    )  # fmt: skip
    state = net.state_dict()
    for tree in (dict(state), {name: z.numpy() for name, z in state.items()}):
        assert kinds(tree) == {
            "1": ("batch", "scale bias mean var num_updates"),
            "2": ("scale and bias", "scale bias"),
            "5": ("scale", "scale"),
            "6": ("scale and bias", "scale bias"),
            "11/0": ("scale", "scale"),  # documented: a vector alone is RMS norm's, or PReLU's
        }
    assert {n.path: n.shape for n in jn.tools.find_norms(dict(state))}["2"] == (4, 5)


def test_equinox():
    net = eqx.nn.Sequential(
        [
            eqx.nn.Linear(3, 4, key=KEY), eqx.nn.LayerNorm((4, 5)), eqx.nn.RMSNorm(4), eqx.nn.GroupNorm(2, 4),
            eqx.nn.Conv1d(1, 1, 1, key=KEY), eqx.nn.Embedding(3, 4, key=KEY), eqx.nn.Lambda(jnp.tanh),
        ]
    )  # fmt: skip
    affine = ("scale and bias", "scale bias")
    for tree in (net, eqx.filter(net, eqx.is_array)):
        assert kinds(tree) == {"layers/1": affine, "layers/2": affine, "layers/3": affine}


FAMILY = {  # what its parameters and state are, where that is not scale and bias
    "PartialRMSNorm": "scale", "ScaleNorm": "scale", "L2Norm": "scale", "GatedRMSNorm": "scale",
    "QKNorm": "query_scale key_scale", "DynamicTanh": "scale bias alpha", "DynamicErf": "scale bias alpha shift",
    "FilterResponseNorm": "scale bias threshold", "EvoNormB0": "scale bias v", "EvoNormS0": "scale bias v",
    "SwitchableNorm": "scale bias mean_logits var_logits",
    "BatchChannelNorm": "scale bias channel_scale channel_bias", "SPADE": "",
    "WeightNorm": "scale", "WeightStandardization": "scale", "ScaledWeightStandardization": "scale",
}  # fmt: skip
NONE = {  # without parameters and state of their own, or with those of a Dense
    "AdaptiveInstanceNorm", "AdaptiveLayerNorm", "FiLM", "PositionalNorm", "LocalResponseNorm", "SpectralNorm",
}  # fmt: skip


@pytest.mark.parametrize("case", family_modules.CASES, ids=lambda case: case.module)
def test_jaxnorm_family(case):
    module = case.build("linen")
    init = lambda x, *inputs: module.init(KEY, x, *inputs, **case.switch(False))  # noqa: E731
    variables = jax.eval_shape(init, jnp.asarray(family_modules.X), *case.inputs)
    found = jn.tools.find_norms(variables)
    assert len(found) == (case.module not in NONE)
    for norm in found:
        names = {path: name for name, path in norm.leaves.items()}
        assert sorted(names[path] for path in norm.parameters) == sorted(
            FAMILY.get(case.module, "scale bias").split()
        )  # fmt: skip
        assert set(norm.state) == {
            path for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0] if path[0].key == "batch_stats"
        }


@pytest.mark.parametrize(
    "tree",
    [
        {"kernel": KERNEL, "scale": ONE},  # a quantized Dense
        {"w": KERNEL, "b": ONE},
        {"weight": KERNEL, "bias": ONE},
        {"weight": KERNEL},
        {"bias": ONE},
        {"opt_state": {"bn": {"scale": ONE}}},
        {"train": {"opt_state": [{"bn": {"scale": ONE}}]}},
        {"optimizer": {"bn": {"scale": ONE}}},
        {"optimizer_state": {"bn": {"scale": ONE}}},
        {"optimizer_state_dict": {"state": [{"scale": ONE}]}},
        {"optimizer_states": [{"state": {"bn": {"scale": ONE}}}]},
        {"optimizer.bn.scale": ONE},
        {"mean": ONE},
        {"scale": 3.0},
        {},
        ONE,
    ],
    ids=lambda tree: " ".join(tree) if isinstance(tree, dict) else "array",
)  # fmt: skip
def test_no_norm(tree):
    whole = not isinstance(tree, dict) or any("opt" in name for name in tree)
    assert jn.tools.find_norms(tree if whole else {"layer": tree}) == ()


def test_a_layer_may_be_called_optimizer():
    assert kinds({"params": {"optimizer": {"scale": ONE}}}) == {"optimizer": ("scale", "scale")}


def test_what_lies_beside_a_scale_is_no_norms():
    (norm,) = jn.tools.find_norms({"scale": ONE, "position_embedding": KERNEL, "bias": ONE})
    assert list(norm.leaves) == ["scale", "bias"]


def test_lists_are_layers_and_tuples_are_parts():
    dense, norm = {"w": KERNEL, "b": ONE}, {"scale": ONE, "bias": ONE}
    assert kinds([dense, norm, norm]) == {"1": ("scale and bias", "scale bias"), "2": ("scale and bias", "scale bias")}
    assert kinds(({"bn": norm}, {"bn": {"mean": ONE, "var": ONE}})) == {"bn": ("batch", "scale bias mean var")}


def test_two_variables_of_one_name_are_an_error():
    with pytest.raises(ValueError, match=r"would both be 'scale' of 'bn'. Give one tree at a time"):
        jn.tools.find_norms(({"bn": {"scale": ONE}}, {"bn": {"scale": ONE}}))


TREE = {f"block{i}": {"bn": {"scale": ONE, "mean": ONE, "var": ONE}, "ln": {"scale": ONE}} for i in (1, 2, 10)}


@pytest.mark.parametrize(
    ("where", "want"),
    [
        ("block1/*", ["block1/bn", "block1/ln"]),
        (["*2/bn", "*10/*"], ["block2/bn", "block10/bn", "block10/ln"]),
        (lambda norm: norm.kind == "batch", ["block1/bn", "block2/bn", "block10/bn"]),
        (lambda norm: False, []),
        ("block1.*", ["block1/bn", "block1/ln"]),
        ("*bn", ["block1/bn", "block2/bn", "block10/bn"]),
        ("block10/bn", ["block10/bn"]),
        (None, [f"block{i}/{norm}" for i in (1, 2, 10) for norm in ("bn", "ln")]),
    ],
)
def test_where(where, want):
    assert list(jn.tools.find_norms(TREE, where).paths) == want


def test_where_that_finds_nothing_is_an_error():
    with pytest.raises(jn.errors.ArgumentError) as error:
        jn.tools.find_norms(TREE, ["block1/*", "blok2/bn"])
    assert str(error.value) == (
        "jaxnorm.tools.find_norms: where='blok2/bn' matches no norm. Did you mean 'block2/bn'? There are: block1/bn, "
        "block1/ln, block2/bn, block2/ln, block10/bn, block10/ln."
    )
    with pytest.raises(ValueError, match="where must be a pattern, several, or a function of NormLayer, got 3"):
        jn.tools.find_norms(TREE, [3])
    with pytest.raises(ValueError, match="several, or a function of NormLayer, got 5"):
        jn.tools.find_norms(TREE, 5)


def test_put_and_get():
    (norm,) = jn.tools.find_norms(TREE, "block2/ln")
    new = jn.tools.find.put(TREE, {norm.leaves["scale"]: 2 * ONE})
    assert new["block2"]["ln"]["scale"].tolist() == [2.0] * 4
    assert TREE["block2"]["ln"]["scale"].tolist() == [1.0] * 4
    assert new["block1"]["bn"]["scale"] is ONE
    assert jn.tools.find.get(new, *norm.parameters)[0].tolist() == [2.0] * 4
