"""jaxnorm.tools.fold_pairs: a checkpoint without its model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folding import RNG, Net, close, filled, normal

from jaxnorm.errors import ArgumentError
from jaxnorm.tools.fold import fold, fold_pairs


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
