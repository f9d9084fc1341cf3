"""What only flax.linen has: initialisation, boxed parameters, lifted transforms, its own arguments."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modules import CLOSE, KEY, KINDS, build, rules_of, run, shapes

import jaxnorm as jn
import jaxnorm.linen as jl

kinds = pytest.mark.parametrize("kind", KINDS)
X = np.random.default_rng(0).normal(1.0, 2.0, (3, 2, 4)).astype(np.float32)


def built(library, kind, **settings):
    """A module that may be called without saying more."""
    return build(library, kind, **settings, **({"use_running_average": False} if kind == "BatchNorm" else {}))


def init(module, x=X):
    with rules_of(module):
        return jax.jit(lambda z: module.init_with_output(KEY, z))(x)


# --- initialisation


OVER = {"BatchNorm": "...", "LayerNorm": "c", "RMSNorm": "c", "GroupNorm": "... c", "InstanceNorm": "..."}


@kinds
@pytest.mark.parametrize("by", ["axis_name", "over"])
def test_initialisation_touches_no_mapped_axis(by, kind):
    """Where the axis is bound nowhere, and where it is; and it updates nothing."""
    named = {"over": f"{OVER[kind]} devices"} if by == "over" else {}
    named = named or {"axis_name": "devices", "axis_index_groups": ((0, 1), (2,))}
    plain, norm = built(jl, kind), built(jl, kind, **named)
    expected, variables = init(plain)
    y, same = init(norm)
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    if kind == "BatchNorm":
        np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(4))
        np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(4))

    xs = np.stack([X, 3 * X, X - 1])
    mapped, _ = jax.vmap(lambda z: norm.init_with_output(KEY, z), axis_name="devices")(xs)
    apart, _ = jax.vmap(lambda z: plain.init_with_output(KEY, z))(xs)
    np.testing.assert_array_equal(mapped, apart)
    trained = jax.vmap(lambda z: norm.apply(variables, z, mutable="batch_stats")[0], axis_name="devices")(xs)
    assert abs(trained - apart).max() > 0.1  # the name does something afterwards


def test_evaluation_touches_no_mapped_axis():
    for settings in ({"axis_name": "devices"}, {"over": "... devices"}):
        norm = jl.BatchNorm(**settings)
        variables = norm.init(KEY, X, use_running_average=True)
        y = norm.apply(variables, X, use_running_average=True)
        np.testing.assert_allclose(y, X / np.sqrt(1 + 1e-5), rtol=1e-6)


@kinds
def test_a_seed_gives_the_same_parameters(kind):
    normal = nn.initializers.normal()
    settings = {"scale_init": normal} if kind == "RMSNorm" else {"scale_init": normal, "bias_init": normal}

    class Model(nn.Module):
        library: object

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4)(built(self.library, kind, **settings, name="a")(x))
            return built(self.library, kind, **settings, name="b")(x)

    ours, theirs = (init(Model(library))[1] for library in (jl, nn))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert float(abs(ours["params"]["b"]["scale"]).min()) > 0


@kinds
def test_boxed_parameters(kind):
    """Metadata of nn.with_partitioning passes through, as in Flax."""
    settings = {"scale_init": nn.with_partitioning(nn.initializers.ones, ("model",))}
    ours, theirs = (built(library, kind, **settings) for library in (jl, nn))
    variables = ours.init(KEY, X)
    specs = nn.get_partition_spec(variables)
    assert specs == nn.get_partition_spec(theirs.init(KEY, X))
    assert specs["params"]["scale"] == P("model")
    boxed, bare = (
        ours.apply(v, X, mutable="batch_stats")[0] for v in (variables, {**variables, **nn.meta.unbox(variables)})
    )
    np.testing.assert_array_equal(boxed, bare)


# --- arguments


def test_positional_arguments():
    for ours, theirs in [
        (jl.BatchNorm(None, 0, 0.5, 1e-3), nn.BatchNorm(None, 0, 0.5, 1e-3)),
        (jl.GroupNorm(None, 2, 1e-3), nn.GroupNorm(None, 2, 1e-3)),
        (jl.LayerNorm(1e-3, jnp.float16, jnp.float32, False), nn.LayerNorm(1e-3, jnp.float16, jnp.float32, False)),
    ]:
        (y, stats), (their_y, their_stats) = run(ours, X), run(theirs, X)
        assert shapes((y, stats)) == shapes((their_y, their_stats))
        np.testing.assert_allclose(y, their_y, rtol=1e-3 if y.dtype == jnp.float16 else 1e-5, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), stats, their_stats)


def test_force_float32_reductions():
    """Off, the state has param_dtype as in Flax. The statistics are float32 all the same."""
    x = np.random.default_rng(0).normal(1000.0, 1.0, (64, 2)).astype(np.float32)
    settings = {"param_dtype": jnp.bfloat16, "force_float32_reductions": False}
    ours, theirs = (built(library, "BatchNorm", **settings) for library in (jl, nn))
    (y, variables), (_, their_variables) = init(ours, x), init(theirs, x)
    assert shapes(variables) == shapes(their_variables)
    assert variables["batch_stats"]["mean"].dtype == jnp.bfloat16
    np.testing.assert_allclose(y, reference.standardize(x, "n c", "n")[0], **CLOSE)
    _, after = jax.jit(lambda v: ours.apply(v, x, mutable="batch_stats"))(variables)
    assert shapes(after["batch_stats"]) == shapes(variables["batch_stats"])  # a legal scan carry


def test_use_running_average_is_said_once():
    for library in (jl, nn):
        for norm, said in ((library.BatchNorm(), None), (library.BatchNorm(True), True)):
            with pytest.raises(ValueError, match="use_running_average"):
                norm.init(KEY, X, use_running_average=said)


def test_state_that_is_not_mutable():
    for library in (jl, nn):
        norm = built(library, "BatchNorm")
        with pytest.raises(flax.errors.ModifyScopeVariableError):
            norm.apply(norm.init(KEY, X), X)


def test_a_mapped_axis_that_is_not_bound():
    """PEERS.md, row 21: Flax's NameError names neither layer nor layout. test_dropin.py has our message."""
    for library, error in ((jl, jn.AxisError), (nn, NameError)):
        norm = built(library, "BatchNorm", axis_name="devices")
        with pytest.raises(error, match="devices"):
            norm.apply(norm.init(KEY, X), X, mutable="batch_stats")


# --- what runs around a module


def test_lifted_transforms():
    """nn.vmap with one state over a named axis, and nn.remat: as in Flax."""
    x = np.random.default_rng(0).normal(1.0, 2.0, (4, 3, 2)).astype(np.float32)
    found = []
    for library in (jl, nn):
        shared = nn.vmap(
            library.BatchNorm, variable_axes={"params": None, "batch_stats": None}, split_rngs={"params": False},
            axis_name="devices",
        )(axis_name="devices", use_running_average=False)  # fmt: skip
        again = nn.remat(library.BatchNorm)(use_running_average=False)
        for module in (shared, again):
            variables = init(module, x)[1]

            def loss(z, m=module, v=variables):
                y, state = m.apply(v, z, mutable="batch_stats")
                return (y**3).sum(), state

            found.append(jax.jit(jax.grad(loss, has_aux=True))(x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found[:2], found[2:])
    moments = reference.moments(x, "d n c", "d n")
    np.testing.assert_allclose(found[0][1]["batch_stats"]["mean"], 0.01 * moments.mean, **CLOSE)


def test_flax_own_test_of_large_means_expects_a_rounded_mean():
    """Two of Flax's tests fail with our modules: at mean 1e6 they expect Flax's own error, as much as 0.04.

    test_layer_norm and test_instance_norm with use_fast_variance=False compare with x - x.mean() in float32, whose mean
    is rounded to 1/16. float64 says that y is right.
    """
    x = jax.random.normal(KEY, (2, 3, 4)) + 1e6
    expected, _ = reference.standardize(np.asarray(x), "n t c", "c", epsilon=1e-5)
    y, their_y = (run(m.LayerNorm(epsilon=1e-5, use_fast_variance=False), x)[0] for m in (jl, nn))
    np.testing.assert_allclose(y, expected, **CLOSE)
    assert abs(their_y - expected).max() > 1e-3


def test_group_norm_of_sharded_channels():
    """PEERS.md, row 13: under explicit sharding."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    x = np.random.default_rng(0).normal(size=(4, 3, 8)).astype(np.float32)
    expected, _ = reference.standardize(x, "n h (g k)", "h k", sizes={"g": 4}, epsilon=1e-6)
    variables = jl.GroupNorm(4).init(KEY, x)
    with jax.set_mesh(mesh):
        z = jax.device_put(x, NamedSharding(mesh, P("data", None, "model")))
        y = jax.jit(jl.GroupNorm(4).apply)(variables, z)
        assert y.sharding.spec == P("data", None, "model")
        np.testing.assert_allclose(y, expected, **CLOSE)
        with pytest.raises(ValueError, match=r"jnp\.repeat"):
            jax.jit(nn.GroupNorm(4).apply)(variables, z)
