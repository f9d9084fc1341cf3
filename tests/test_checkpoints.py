"""Checkpoints of Flax's modules load into ours and back, and come back from disk as the same bits."""

import flax
import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx, serialization
from modules import KEY, build

import jaxnorm.linen
import jaxnorm.nnx

X = np.random.default_rng(0).normal(1.0, 2.0, (8, 4, 6)).astype(np.float32)
NORMS = {"BatchNorm": {}, "LayerNorm": {}, "RMSNorm": {}, "GroupNorm": {"num_groups": 3}, "InstanceNorm": {}}


class Linen(nn.Module):
    """A model with every norm in it, of one library or the other."""

    library: object

    @nn.compact
    def __call__(self, x, train=True):
        for kind, settings in NORMS.items():
            extra = {"use_running_average": not train} if kind == "BatchNorm" else {}
            x = nn.Dense(6)(getattr(self.library, kind)(**settings, **extra)(x))
        return x


class Nnx(nnx.Module):
    def __init__(self, library):
        self.norms = nnx.data({kind: build(library, kind, 6, **settings) for kind, settings in NORMS.items()})

    def __call__(self, x):
        for norm in self.norms.values():
            x = norm(x)
        return x


def trained(library):
    """Variables after initialisation with random scales and one step of running statistics."""
    model = Linen(library)
    with jax.numpy_rank_promotion("allow"):
        variables = jax.jit(model.init)(KEY, X)
        _, state = jax.jit(lambda v: model.apply(v, X, mutable="batch_stats"))(variables)
    return noisy({**variables, **state})


def noisy(tree):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda a: (a + rng.uniform(0, 0.5, a.shape)).astype(a.dtype), tree)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def evaluate(library, variables):
    with jax.numpy_rank_promotion("allow"):
        return jax.jit(lambda v: Linen(library).apply(v, X, train=False))(variables)


@pytest.fixture(scope="module", params=["Flax's", "ours"])
def variables(request):
    return trained(flax.linen if request.param == "Flax's" else jaxnorm.linen)


def test_variables_of_one_run_in_the_other(variables):
    for library in (jaxnorm.linen, flax.linen):
        with jax.numpy_rank_promotion("allow"):
            blank = jax.eval_shape(Linen(library).init, KEY, X)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), blank) == jax.tree.map(
            lambda a: (a.shape, a.dtype), variables
        )
    ours, theirs = (evaluate(library, variables) for library in (jaxnorm.linen, flax.linen))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)  # five layers, values up to 20


def test_msgpack(variables):
    data = serialization.to_bytes(variables)
    for library in (jaxnorm.linen, flax.linen):
        restored = serialization.from_bytes(trained(library), data)
        same(restored, variables)
    assert serialization.to_bytes(restored) == data


def test_orbax(variables, tmp_path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "model", jax.tree.map(np.zeros_like, trained(jaxnorm.linen)))
    same(restored, variables)


@pytest.mark.parametrize("settings", [{"momentum": None}, {"debias": True}], ids=str)
def test_num_updates_comes_back(settings, tmp_path):
    """State that Flax does not have: the count of updates."""
    norm = jaxnorm.linen.BatchNorm(use_running_average=False, **settings)
    variables = norm.init(KEY, X)
    for _ in range(3):
        variables = {**variables, **norm.apply(variables, X, mutable="batch_stats")[1]}
    assert variables["batch_stats"]["num_updates"] == 3
    same(serialization.from_bytes(norm.init(KEY, X), serialization.to_bytes(variables)), variables)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "norm", variables)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "norm", norm.init(KEY, X)), variables)


def test_nnx_state_both_ways(tmp_path):
    ours, theirs = Nnx(jaxnorm.nnx), Nnx(flax.nnx)
    for source, target in ((theirs, ours), (ours, theirs)):
        with jax.numpy_rank_promotion("allow"):
            source(X)
        nnx.update(source, noisy(nnx.state(source)))
        state = nnx.state(source)
        assert jax.tree.structure(state) == jax.tree.structure(nnx.state(target))
        nnx.update(target, state)
        same(nnx.to_pure_dict(nnx.state(target)), nnx.to_pure_dict(state))

        pure = nnx.to_pure_dict(state)
        data = serialization.msgpack_serialize(jax.tree.map(np.asarray, pure))
        same(serialization.msgpack_restore(data), jax.tree.map(np.asarray, pure))
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            path = tmp_path / type(source.norms["BatchNorm"]).__module__
            checkpointer.save(path, pure)
            checkpointer.wait_until_finished()
            same(checkpointer.restore(path, jax.tree.map(np.zeros_like, pure)), pure)

        for model in (source, target):
            model.eval()
        with jax.numpy_rank_promotion("allow"):
            np.testing.assert_allclose(source(X), target(X), rtol=1e-4, atol=1e-4)
        for model in (source, target):
            model.train()


def test_linen_checkpoint_into_nnx():
    """scale, bias, mean and var have the same names and shapes in both, so a pure dict goes from one to the other."""
    for kind, settings in NORMS.items():
        linen = build(jaxnorm.linen, kind, 6, **settings)
        said = {"use_running_average": True} if kind == "BatchNorm" else {}
        variables = noisy(linen.init(KEY, X, **said))
        module = build(jaxnorm.nnx, kind, 6, **settings)
        state = nnx.state(module)
        nnx.replace_by_pure_dict(state, {**variables.get("params", {}), **variables.get("batch_stats", {})})
        nnx.update(module, state)
        np.testing.assert_array_equal(module(X, **said), linen.apply(variables, X, **said))
