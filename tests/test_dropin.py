"""What both kinds of module share: signatures, the translation of Flax's arguments, mapped axes, errors."""

import functools
import inspect

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax.linen.dtypes import canonicalize_dtype
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modules import CLOSE, HOSTS, KINDS, build, pure, run

import jaxnorm as jn
from jaxnorm import dropin, linen
from jaxnorm.modules import result_dtype

hosts = pytest.mark.parametrize("host", HOSTS)


# --- the signatures


@hosts
@pytest.mark.parametrize("kind", KINDS)
def test_signatures(kind, host):
    """Every argument of Flax's stands in its place with its default; what is added is keyword-only."""
    added = {"__init__": {"layout", "over", "features", "sizes"}, "__call__": {"weights", "scale", "bias", "features"}}
    added["__init__"] |= {"BatchNorm": {"debias", "unbiased"}, "RMSNorm": {"scale_offset"}}.get(kind, set())
    for method, new in added.items():
        mine, its = (inspect.signature(getattr(getattr(library, kind), method)).parameters for library in HOSTS[host])
        assert list(mine)[: len(its)] == list(its), method
        for name, parameter in its.items():
            assert mine[name].kind == parameter.kind, name
            assert mine[name].default == parameter.default, name
        assert set(mine) - set(its) == new
        assert all(mine[name].kind == inspect.Parameter.KEYWORD_ONLY for name in new)


# --- the translation


@pytest.mark.parametrize(
    ("axes", "ndim", "expected"),
    [(-1, 3, (2,)), (0, 1, (0,)), ((-1, 0), 3, (0, 2)), ([1, -2], 3, (1,)), ((), 2, ()), (np.int64(-2), 4, (2,))],
)
def test_positions(axes, ndim, expected):
    assert dropin.positions(axes, ndim) == expected
    # what Flax's parameters are laid out by: the shape of a scale along these axes
    x = np.zeros([size + 2 for size in range(ndim)])
    scale = flax.linen.LayerNorm(feature_axes=axes).init(jax.random.key(0), x)["params"]["scale"]
    assert scale.shape == tuple(x.shape[axis] for axis in expected)


def row(module, shape, sync=True):
    found = module._row(shape, sync)
    return " ".join(found.layout), " ".join(found.over), found.features, found.groups


def test_rows_of_flax_arguments():
    shape = (2, 3, 4, 6)
    assert row(linen.BatchNorm(), shape) == ("d0 d1 d2 d3", "d0 d1 d2", ("d3",), None)
    sync = linen.BatchNorm(axis=1, axis_name="devices", axis_index_groups=[[0, 1], [2, 3]])
    assert row(sync, shape) == ("d0 d1 d2 d3", "d0 d2 d3 devices", ("d1",), {"devices": ((0, 1), (2, 3))})
    assert row(sync, shape, sync=False) == ("d0 d1 d2 d3", "d0 d2 d3", ("d1",), None)
    both = linen.LayerNorm(axis_name=("data", "model"))
    assert row(both, shape)[1] == "d3 data model"
    group = linen.GroupNorm(3, reduction_axes=(1, -1))
    assert row(group, shape)[:3] == ("d0 d1 d2 (d3_group d3_member)", "d1 d3_member", "(d3_group d3_member)")
    assert group._row(shape).sizes == {"d3_group": 3}
    assert row(linen.InstanceNorm(), (2, 6)) == ("d0 d1", "nothing?", ("d1",), None)
    optional = linen.BatchNorm(axis_name="devices?", axis_index_groups=((0, 1),))
    assert row(optional, (2, 6)) == ("d0 d1", "d0 devices?", ("d1",), {"devices": ((0, 1),)})


def test_generated_names_avoid_mapped_axes():
    norm = linen.BatchNorm(use_running_average=False, axis_name="d0")
    assert row(norm, (2, 6))[:2] == ("d_0 d_1", "d_0 d0")
    x = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    norm = linen.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x[0])

    def train(z):
        return norm.apply(variables, z, mutable="batch_stats")[0]

    np.testing.assert_array_equal(jax.vmap(train, axis_name="d1")(x), jax.vmap(train)(x))


def test_rows_of_names():
    """What is left out is completed as Flax's defaults would: features last, and the norm's own over."""
    for module, expected in [
        (linen.BatchNorm(layout="n h w c"), ("n h w", "c")),
        (linen.BatchNorm(layout="n c h w", features="c"), ("n h w", "c")),
        (linen.BatchNorm(layout="n c h w", over="n h w devices"), ("n h w devices", ("c",))),
        (linen.BatchNorm(over="... devices?"), ("... devices?", ("c",))),
        (linen.LayerNorm(layout="n h w c"), ("c", ("c",))),
        (linen.LayerNorm(layout="n h w c", over="h w c"), ("h w c", ("h", "w", "c"))),
        (linen.LayerNorm(layout="n h w c", over="h w", features="c"), ("h w", "c")),
        (linen.RMSNorm(over="c model"), ("c model", ("c",))),
        (linen.InstanceNorm(layout="n h w c"), ("h w", "c")),
        (linen.InstanceNorm(layout="n c h w", features="c"), ("h w", "c")),
        (linen.GroupNorm(2, layout="n c h w", features="c"), ("h w c_member", "(c_group c_member)")),
        (linen.GroupNorm(2, layout="n t h w c", over="h w c"), ("h w c_member", "(c_group c_member)")),
    ]:
        found = module._row((2, 4, 4, 4, 4)[: len(module.layout.split()) if module.layout else 4])
        over = found.over if isinstance(found.over, str) else " ".join(found.over)
        assert (over, found.features) == expected, module


def test_result_dtype():
    """Flax's own function is the oracle; ours gives the same dtype while JAX is strict."""
    dtypes = [jnp.int32, jnp.bool_, jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64]
    for dtype in (None, *dtypes[2:]):
        for x_dtype in dtypes:
            for p_dtype in (None, *dtypes[2:]):
                arrays = (jnp.ones(2, x_dtype), None if p_dtype is None else jnp.ones(2, p_dtype), None)
                with jax.numpy_dtype_promotion("standard"):
                    expected = canonicalize_dtype(*arrays, dtype=dtype)
                assert result_dtype(dtype, *arrays) == expected, (dtype, x_dtype, p_dtype)


@hosts
def test_equal_modules_trace_once(host):
    traces = []
    library = HOSTS[host][0]
    names = {"layout": "(m n) c", "over": "n devices?", "features": "c", "sizes": {"m": 2}}
    x = np.ones((4, 2), np.float32)
    for settings in (names, {"axis_name": "devices?", "axis_index_groups": [[0, 1], [2, 3]]}):
        modules = [build(library, "BatchNorm", 2, momentum=None, **settings) for _ in range(3)]
        statics = modules if host == "linen" else [flax.nnx.graphdef(module) for module in modules]

        @functools.partial(jax.jit, static_argnums=0)
        def call(static, x):
            traces.append(static)
            return x

        for static in statics:
            call(static, x)
        assert len(traces) == 1
        assert len(set(statics)) == 1
        traces.clear()


# --- over devices


SHARDS = np.random.default_rng(5).normal(1.0, 2.0, (4, 3, 2)).astype(np.float32)  # four devices, three examples, c
MESH = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))


def by_shard_map(step, variables, x, check_vma):
    def local(v, z):
        return jax.tree.map(lambda a: a[None], step(v, z[0]))

    specs = {"in_specs": (P(), P("devices")), "out_specs": P("devices"), "check_vma": check_vma}
    return jax.jit(jax.shard_map(local, mesh=MESH, **specs))(variables, x)


MAPS = {
    "vmap": lambda step, v, x: jax.jit(jax.vmap(step, (None, 0), axis_name="devices"))(v, x),
    "pmap": lambda step, v, x: jax.pmap(step, "devices", in_axes=(None, 0))(v, x),
    "shard_map": functools.partial(by_shard_map, check_vma=True),
    "shard_map, unchecked": functools.partial(by_shard_map, check_vma=False),
}
SYNCED = {
    "axis_name": {"axis_name": "devices"},
    "over": {"over": "n devices", "layout": "n c"},
    "over, optional": {"over": "... devices?"},
    "groups": {"axis_name": "devices", "axis_index_groups": [[0, 2], [1, 3]]},  # PEERS.md, row 7
}


@hosts
@pytest.mark.parametrize("by", MAPS)
@pytest.mark.parametrize("how", SYNCED)
def test_synchronized(how, by, host):
    step, variables = pure(build(HOSTS[host][0], "BatchNorm", 2, momentum=0.0, **SYNCED[how]), SHARDS[0])
    y, after = MAPS[by](step, variables, SHARDS)
    for group in SYNCED[how].get("axis_index_groups", [[0, 1, 2, 3]]):
        expected, moments = reference.standardize(SHARDS[group], "d n c", "d n")
        np.testing.assert_allclose(np.asarray(y)[group], expected, **CLOSE)
        for i in group:
            np.testing.assert_allclose(after["batch_stats"]["mean"][i], moments.mean, **CLOSE)
            np.testing.assert_allclose(after["batch_stats"]["var"][i], moments.var, **CLOSE)


@hosts
@pytest.mark.parametrize("check_vma", [True, False])
def test_synchronized_state_is_replicated(check_vma, host):
    function, variables = pure(build(HOSTS[host][0], "BatchNorm", 2, axis_name="devices"), SHARDS[0])
    specs = {"in_specs": (P(), P("devices")), "out_specs": P(), "check_vma": check_vma}
    step = jax.shard_map(lambda v, z: function(v, z[0])[1], mesh=MESH, **specs)
    stats = jax.jit(step)(variables, SHARDS)["batch_stats"]
    moments = reference.moments(SHARDS, "d n c", "d n")
    np.testing.assert_allclose(stats["mean"], 0.01 * moments.mean, **CLOSE)
    np.testing.assert_allclose(stats["var"], 0.99 + 0.01 * moments.var, **CLOSE)


@hosts
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("settings", [{"over": "c model"}, {"axis_name": "model"}], ids=str)
def test_features_over_devices(settings, kind, host):
    x = np.random.default_rng(0).normal(1.0, 2.0, (3, 8)).astype(np.float32)
    parts = x.reshape(3, 4, 2).transpose(1, 0, 2)
    if host == "linen" and "axis_name" in settings:  # Flax's linen fails here, at initialisation
        with pytest.raises(NameError, match="model"):
            pure(build(HOSTS[host][1], kind, **settings), parts[0])
    function, variables = pure(build(HOSTS[host][0], kind, 2, **settings), parts[0])
    y, _ = jax.jit(jax.vmap(function, (None, 0), axis_name="model"))(variables, parts)
    expected, _ = reference.standardize(x, "n c", "c", epsilon=1e-6, center=kind == "LayerNorm")
    np.testing.assert_allclose(y.transpose(1, 0, 2).reshape(3, 8), expected, **CLOSE)


# --- the errors


def wrong(host, kind, num_features=4, **settings):
    """Build a module and train it for a step on an x of shape (2, 3, 4)."""
    return run(build(HOSTS[host][0], kind, num_features, **settings), np.ones((2, 3, 4), np.float32))


# an error, the start of its message, and the module and settings that raise it
WRONG = {
    "axes said twice": (
        jn.LayoutError,
        "axis=1 and layout='n c h' are two ways to say the axes: Flax's by number, jaxnorm's by name. Use one; with "
        "names, a mapped axis stands in over.",
        "BatchNorm", {"axis": 1, "layout": "n c h"},
    ),
    "a mapped axis said twice": (
        jn.LayoutError, "axis_name='devices' and over='c devices' are two ways", "LayerNorm",
        {"axis_name": "devices", "over": "c devices"},
    ),
    "an axis x lacks": (
        jn.LayoutError, "axis 3 is out of range: x has 3 dimensions.", "BatchNorm", {"axis": 3},
    ),
    "features the layout lacks": (
        jn.LayoutError,
        "features names 'chanels', which the layout lacks. Did you mean 'channels'?\n"
        '  features "h chanels"\n              ^^^^^^^\n  layout "n h channels"',
        "LayerNorm", {"layout": "n h channels", "features": "h chanels"},
    ),
    "an unreadable layout": (
        jn.LayoutError, "layout cannot be read: '(' is never closed.", "LayerNorm", {"layout": "n (g k"},
    ),
    "the layout of another x": (
        jn.LayoutError, "the layout names 2 dimensions, x has 3.", "LayerNorm", {"layout": "n c"},
    ),
    "the batch axis as channels": (
        jn.LayoutError,
        "The channel axes cannot include the leading dimension as this is assumed to be the batch axis.",
        "InstanceNorm", {"feature_axes": (0, 2)},
    ),
    "groups that do not divide": (
        jn.LayoutError, "num_groups=3 does not divide the 4 channels.", "GroupNorm", {"num_groups": 3},
    ),
    "group sizes that do not divide": (
        jn.LayoutError, "group_size=3 does not divide the 4 channels.", "GroupNorm",
        {"num_groups": None, "group_size": 3},
    ),
    "groups said twice": (
        ValueError, "give num_groups or group_size, and None for the other: got num_groups=32, group_size=2.",
        "GroupNorm", {"group_size": 2},
    ),
    "groups without their channels": (
        jn.LayoutError,
        "GroupNorm averages over parts of 'd2', so over (Flax: reduction_axes) must include it.\n"
        '  over "d0 d1", layout "d0 d1 d2"',
        "GroupNorm", {"num_groups": 2, "reduction_axes": (0, 1)},
    ),
    "a composed axis split again": (
        jn.LayoutError, "features='(g k)' must be one plain axis of the layout \"n h (g k)\"", "GroupNorm",
        {"num_groups": 2, "layout": "n h (g k)", "sizes": {"g": 2}},
    ),
    "groups of two mapped axes": (
        jn.LayoutError, "axis_index_groups cuts one mapped axis, axis_name=('a', 'b') are several.", "LayerNorm",
        {"axis_name": ("a", "b"), "axis_index_groups": [[0, 1]]},
    ),
    "a dtype that cannot hold y": (
        ValueError, "dtype must be a floating or complex one, got int32.", "LayerNorm", {"dtype": jnp.int32},
    ),
    "a mapped axis that is not bound": (
        jn.AxisError, "'devices' in over is neither a dimension of the layout nor a mapped axis.", "BatchNorm",
        {"axis_name": "devices"},
    ),
    "names that no dimension of the default layout has": (
        jn.LayoutError, 'over="n h w" names no dimension of the layout', "BatchNorm", {"over": "n h w"},
    ),
    "examples that are not first": (
        jn.LayoutError, "group norm leaves the first name of the layout apart", "GroupNorm",
        {"num_groups": 2, "layout": "... c"},
    ),
    "an empty over": (jn.AxisError, "over is empty", "LayerNorm", {"over": ()}),
}  # fmt: skip


@hosts
@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name, host):
    error, text, kind, settings = WRONG[name]
    with pytest.raises(error) as found:
        wrong(host, kind, **settings)
    assert str(found.value).startswith(f"jaxnorm.{host}.{kind}: {text}"), str(found.value)


@hosts
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("slots", "text"),
    [
        (
            {"mask": np.ones((2, 3, 4), np.float32)},
            "mask has dtype float32: pass how much an element counts as weights=",
        ),
        ({"mask": np.ones(2, bool)}, "mask of shape (2,) does not broadcast to x."),
        ({"weights": np.ones((2, 3, 4), np.complex64)}, "weights have dtype complex64: they must be real"),
    ],
    ids=["float mask", "mask of another shape", "complex weights"],
)
def test_wrong_slots(slots, text, kind, host):
    module, x = build(HOSTS[host][0], kind), np.ones((2, 3, 4), np.float32)
    with pytest.raises(jn.LayoutError) as found:
        run(module, x, **slots)
    assert str(found.value).startswith(f"jaxnorm.{host}.{kind}: {text}"), str(found.value)


def test_num_features_of_another_x():
    for kind in KINDS:
        with pytest.raises(jn.LayoutError, match=rf"jaxnorm\.nnx\.{kind}: .*\(6,\)"):
            wrong("nnx", kind, num_features=6)


def test_errors_name_the_layer():
    class Block(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=False, axis_name="devics", name="norm_1")(x)

    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            return Block(name="encoder")(x)

    x = jnp.ones((2, 3, 4))
    variables = Model().init(jax.random.key(0), x)
    with pytest.raises(jn.AxisError) as found:
        jax.vmap(lambda z: Model().apply(variables, z, mutable="batch_stats"), axis_name="devices")(x)
    text = str(found.value)
    assert text.startswith("jaxnorm.linen.BatchNorm 'encoder/norm_1': 'devics' in over is neither")
    for part in ("Did you mean 'devices'?", 'over "d0 devics"', "mapped axes bound here: devices"):
        assert part in text


@hosts
def test_groups_without_a_mapped_axis_are_ignored_as_in_flax(host):
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for library in HOSTS[host]:
        plain, grouped = (run(build(library, "BatchNorm", 3, **kw), x)[0] for kw in ({}, {"axis_index_groups": [[0]]}))
        np.testing.assert_array_equal(plain, grouped)
