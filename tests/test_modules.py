"""Both kinds of module beside Flax's, where Flax is right; and what is added to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from modules import CASES, CLOSE, EPSILON, HOSTS, KINDS, Case, build, pure, run, shapes

import jaxnorm as jn

hosts = pytest.mark.parametrize("host", HOSTS)
kinds = pytest.mark.parametrize("kind", KINDS)
ROWS = [(host, case) for case in CASES for host in HOSTS if host == "linen" or case.nnx]
rows = pytest.mark.parametrize(("host", "case"), ROWS, ids=str)


# --- the numbers of Flax


@rows
def test_numbers(host, case):
    x, parameters, mask = case.sample()
    ours, theirs = (case.build(library) for library in HOSTS[host])
    (_, variables), (_, their_variables) = pure(ours, x), pure(theirs, x)
    jax.tree.map(np.testing.assert_array_equal, variables, their_variables)
    assert shapes(variables) == shapes(their_variables)

    y, stats = run(ours, x, parameters, mask=mask)
    their_y, their_stats = run(theirs, x, parameters, mask=mask)
    expected, moments = case.reference(x, parameters, mask)
    np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_allclose(their_y, expected, **CLOSE)
    assert (shapes(y), shapes(stats)) == (shapes(their_y), shapes(their_stats))
    if case.kind == "BatchNorm":
        momentum = case.settings.get("momentum", 0.99)
        for name, start, batch in (("mean", 0, moments.mean), ("var", 1, moments.var)):
            after = momentum * start + (1 - momentum) * batch
            np.testing.assert_allclose(stats[name], after, **CLOSE)
            np.testing.assert_allclose(their_stats[name], after, **CLOSE)


@pytest.mark.parametrize(
    ("host", "case"), [(h, c) for h, c in ROWS if c.kind == "BatchNorm" and c.mask is None], ids=str
)
def test_evaluation(host, case):
    x, parameters, _ = case.sample()
    ours, theirs = (case.build(library) for library in HOSTS[host])
    rng = np.random.default_rng(0)
    before = pure(ours, x)[1]["batch_stats"]
    before = {"mean": rng.normal(size=before["mean"].shape), "var": rng.uniform(0.5, 2, before["var"].shape)}
    before = {name: value.astype(np.float32) for name, value in before.items()}
    y, after = run(ours, x, parameters, before, train=False)
    their_y, _ = run(theirs, x, parameters, before, train=False)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    expected = reference.normalize(
        x, before["mean"], before["var"], case.features.split(), case.layout, features=case.features, **parameters
    )
    np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_allclose(their_y, expected, **CLOSE)


@hosts
@kinds
def test_dtypes(kind, host):
    """y, parameters and state have Flax's dtypes."""
    half = [jnp.float16, jnp.bfloat16, None]
    real = [(x, dtype) for x in (jnp.int32, jnp.float16, jnp.bfloat16, jnp.float32) for dtype in half]
    complex_ = [(jnp.complex64, None), (jnp.complex64, jnp.complex64)]
    for x_dtype, dtype in real + complex_ * ((host, kind) != ("nnx", "BatchNorm")):  # for that one see test_nnx.py
        for param_dtype in (jnp.float16, jnp.float32):
            found = []
            for library in HOSTS[host]:
                module = build(library, kind, param_dtype=param_dtype, dtype=dtype)
                x = jax.ShapeDtypeStruct((6, 4), x_dtype)
                function, variables = pure(module, np.zeros(x.shape, x.dtype))
                y, after = jax.eval_shape(function, variables, x)
                found.append((y.dtype, shapes(variables), shapes(after)))
            assert found[0] == found[1], (x_dtype, param_dtype, dtype)


@hosts
@kinds
def test_y_is_rounded_once(kind, host):
    """In half precision y is the float32 result, rounded; neither x nor the statistics are rounded before."""
    x = np.random.default_rng(0).normal(30.0, 2.0, (8, 4)).astype(np.float32)
    for x_dtype, dtype in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float16), (jnp.float16, None)):
        z = jnp.asarray(x, x_dtype)
        y, stats = run(build(HOSTS[host][0], kind, dtype=dtype), z)
        exact, same = run(build(HOSTS[host][0], kind, dtype=jnp.float32), z)
        assert y.dtype == (dtype or jnp.float32)
        np.testing.assert_array_equal(y, exact.astype(y.dtype))
        jax.tree.map(np.testing.assert_array_equal, stats, same)


@hosts
@kinds
def test_complex_and_integer_x(kind, host):
    rng = np.random.default_rng(1)
    z = (rng.normal(size=(6, 4)) + 1j * rng.normal(1.0, 2.0, (6, 4))).astype(np.complex64)
    for x in (rng.integers(-9, 9, (6, 4)), z.real > 0, z):
        if host == "nnx" and kind == "BatchNorm" and x is z:
            continue  # see test_nnx.py
        (y, stats), (their_y, their_stats) = (run(build(library, kind), jnp.asarray(x)) for library in HOSTS[host])
        np.testing.assert_allclose(y, their_y, rtol=1e-5, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), stats, their_stats)


# --- where Flax is wrong: the numbers are those of the list of defects in PEERS.md


# Two devices with four slots each. They hold 0 1 2 3 and 4, or 0 1 2 3 and nothing.
TWO = np.array([[0, 1, 2, 3], [4, 100, 100, 100]], np.float32)[..., None]


@hosts
@pytest.mark.parametrize("valid", [1, 0])
def test_1_2_masks_over_devices(valid, host):
    mask = np.array([[True] * 4, [i < valid for i in range(4)]])[..., None]
    values = np.arange(4.0 + valid)
    mean, var = values.mean(), values.var()
    found = []
    for library in HOSTS[host]:
        step, variables = pure(build(library, "BatchNorm", 1, axis_name="devices", momentum=0.0), TWO[0])
        y, after = jax.vmap(lambda z, m, f=step, v=variables: f(v, z, mask=m), axis_name="devices")(TWO, mask)
        found.append((y, after["batch_stats"]))
    (y, stats), (_, theirs) = found
    np.testing.assert_allclose(stats["mean"], np.full((2, 1), mean), rtol=1e-6)
    np.testing.assert_allclose(stats["var"], np.full((2, 1), var), rtol=1e-6)
    np.testing.assert_allclose(y, (TWO - mean) / np.sqrt(var + 1e-5), rtol=1e-5, atol=1e-6)
    assert theirs["mean"].tolist() == [[2.75]] * 2 if valid else np.isnan(theirs["mean"]).all()


@hosts
@pytest.mark.parametrize(("kind", "over"), [("BatchNorm", "n"), ("LayerNorm", "c")])
def test_3_large_means(kind, over, host):
    x = np.random.default_rng(0).normal(1e4, 1.0, (64, 8)).astype(np.float32)
    expected, _ = reference.standardize(x, "n c", over, epsilon=EPSILON[kind])
    y, their_y = (run(build(library, kind, 8), x)[0] for library in HOSTS[host])
    np.testing.assert_allclose(y, expected, **CLOSE)
    assert abs(their_y - expected).max() > 0.3


@hosts
@kinds
def test_8_nan_in_masked_slots(kind, host):
    """It reaches no number and no gradient."""
    rng = np.random.default_rng(2)
    x, mask = rng.normal(size=(3, 5, 4)).astype(np.float32), rng.random((3, 5, 4)) < 0.7

    def gradient(library, poison):
        function, variables = pure(build(library, kind), x)

        def loss(z):
            return (jnp.where(mask, function(variables, z, mask=mask)[0], 0) ** 3).sum()

        return jax.jit(jax.value_and_grad(loss))(np.where(mask, x, np.float32(poison)))

    ours, theirs = HOSTS[host]
    (loss, grad), (same, expected) = gradient(ours, np.nan), gradient(ours, 0.0)
    assert loss == same
    np.testing.assert_array_equal(grad, expected)
    assert (np.asarray(grad)[~mask] == 0).all()
    assert np.linalg.norm(grad) > 0.1
    assert np.isnan(np.asarray(gradient(theirs, np.nan)[1])[mask]).any()


@hosts
def test_9_everything_masked(host):
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    before = {"mean": np.array([1, 2, 3], np.float32), "var": np.array([4, 5, 6], np.float32)}
    (y, stats), (_, theirs) = (
        run(build(library, "BatchNorm", 3), x, stats=before, mask=np.zeros((4, 1), bool)) for library in HOSTS[host]
    )
    jax.tree.map(np.testing.assert_array_equal, stats, before)
    assert np.isfinite(y).all()
    assert np.isnan(theirs["var"]).all()


@hosts
def test_13_group_norm_takes_every_broadcastable_mask(host):
    rng = np.random.default_rng(0)
    x, (ours, theirs) = rng.normal(size=(2, 5, 6)).astype(np.float32), HOSTS[host]
    for shape in ((2, 5, 1), (5, 1), (6,), (1, 1, 6)):
        mask = rng.random(shape) < 0.7
        whole = np.broadcast_to(mask, x.shape)
        expected, moments = reference.standardize(x, "n h (g k)", "h k", sizes={"g": 2}, epsilon=1e-6, mask=whole)
        assert (moments.count > 1).all()
        np.testing.assert_allclose(run(build(ours, "GroupNorm", 6), x, mask=mask)[0], expected, **CLOSE)
        if shape[-1] == 1:
            with pytest.raises((TypeError, ValueError), match="reshape"):
                run(build(theirs, "GroupNorm", 6), x, mask=mask)


def test_14_float_masks():
    """Flax counts every weight that is not 0 as 1. Here `weights` takes them, and `mask` does not."""
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    weights = np.array([[1.0], [0.5], [0.25], [0]], np.float32)
    ours, theirs = (build(library, "BatchNorm", momentum=0.0) for library in HOSTS["linen"])
    expected = reference.moments(x, "n c", "n", weights=weights)
    np.testing.assert_allclose(run(ours, x, weights=weights)[1]["mean"], expected.mean, **CLOSE)
    with pytest.raises(jn.LayoutError, match="pass how much an element counts as weights=, not mask="):
        run(ours, x, mask=weights)
    np.testing.assert_allclose(run(theirs, x, mask=weights)[1]["mean"], x[:3].mean(0), **CLOSE)


@hosts
def test_18_vmap_with_and_without_a_name(host):
    """Under vmap an example is a batch of one unless the mapped axis is named. Flax gives 0; we say what to name."""
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    ours, theirs = HOSTS[host]
    expected, _ = reference.standardize(x, "n c", "n")

    def mapped(module):
        function, variables = pure(module, x[0])
        return jax.vmap(lambda z: function(variables, z), axis_name="devices")(x)[0]

    np.testing.assert_allclose(mapped(build(ours, "BatchNorm", 3, over="... devices")), expected, **CLOSE)
    np.testing.assert_array_equal(mapped(build(theirs, "BatchNorm", 3)), np.zeros_like(x))
    with pytest.raises(ValueError, match=r"of one element(?s:.*)bound here: devices\n.*name the mapped axis"):
        mapped(build(ours, "BatchNorm", 3))


@hosts
def test_19_group_norm_of_video(host):
    """Flax merges the frames, and so does a drop-in; names leave them apart."""
    x = np.random.default_rng(0).normal(np.arange(3).reshape(3, 1, 1, 1), 1.0, (2, 3, 2, 2, 4)).astype(np.float32)
    ours, theirs = HOSTS[host]
    apart = build(ours, "GroupNorm", layout="b t h w c", over="h w c")
    for norm, over in (
        (build(ours, "GroupNorm"), "t h w k"),
        (build(theirs, "GroupNorm"), "t h w k"),
        (apart, "h w k"),
    ):
        expected, _ = reference.standardize(x, "b t h w (g k)", over, sizes={"g": 2}, epsilon=1e-6)
        np.testing.assert_allclose(run(norm, x)[0], expected, **CLOSE)


@hosts
@kinds
def test_20_kept_for_the_backward_pass(kind, host):
    """Of the size of x: x alone and in its own dtype, 2 bytes an element of bfloat16, although y is float32."""
    x = jax.ShapeDtypeStruct((4, 64, 128), jnp.bfloat16)

    def kept(library):
        function, variables = pure(build(library, kind, 128), np.zeros(x.shape, x.dtype))

        def backward(params, z):
            return jax.vjp(lambda p, z: function({**variables, "params": p}, z)[0], params, z)[1]

        back = jax.eval_shape(backward, variables["params"], x)
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(back) if a.size >= x.size) / x.size

    ours, theirs = HOSTS[host]
    assert kept(ours) == 2
    assert kept(theirs) >= 4


# --- one core


FUNCTIONS = {
    "BatchNorm": lambda x, running, **kw: jn.batch_norm(x, running, "n h w c", "n h w", **kw),
    "LayerNorm": lambda x, running, **kw: (jn.layer_norm(x, "n h w c", "c", **kw), running),
    "RMSNorm": lambda x, running, **kw: (jn.rms_norm(x, "n h w c", "c", **kw), running),
    "GroupNorm": lambda x, running, **kw: (jn.group_norm(x, 2, "n h w c", **kw), running),
    "InstanceNorm": lambda x, running, **kw: (jn.instance_norm(x, "n h w c", "h w", **kw), running),
}


def bits(a):
    return np.asarray(a).view(np.uint32)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@kinds
def test_linen_nnx_and_the_functions_give_the_same_bits(kind, masked):
    rng = np.random.default_rng(3)
    case = Case(kind, {}, (4, 5, 3, 6), "n h w c", "", "c")
    x = rng.normal(1.0, 2.0, case.shape).astype(np.float32)
    mask = rng.random(x.shape) < 0.75 if masked else None
    parameters = {name: rng.uniform(0.5, 1.5, 6).astype(np.float32) for name in case.parameters()}
    # the state is an argument: XLA rounds 0.99 * 1 + 0.01 * var otherwise where the 1 is a constant
    function = jax.jit(lambda z, running, p: FUNCTIONS[kind](z, running, mask=mask, **p))
    expected, running = function(x, jn.running_stats(c=6), parameters)
    for host in HOSTS:
        y, stats = run(case.build(HOSTS[host][0]), x, parameters, mask=mask)
        np.testing.assert_array_equal(bits(y), bits(expected))
        for name in stats:
            np.testing.assert_array_equal(bits(stats[name]), bits(getattr(running, name)))
    assert (len(stats) == 2) == (kind == "BatchNorm")


# --- what is added


@rows
def test_names_are_flax_numbers(host, case):
    """Every case of the table said by name: the very same program."""
    ours, x = HOSTS[host][0], np.zeros(case.shape, np.float32)
    mask = None if case.mask is None else np.ones(case.mask, bool)
    layout, over, features = case.layout, case.over or "nothing?", case.features
    if case.kind == "GroupNorm":
        layout, over, features = layout.replace("(g k)", "c"), over.replace("k", "c"), "c"
    numbers = ("axis", "reduction_axes", "feature_axes")
    settings = {name: value for name, value in case.settings.items() if name not in numbers}
    named = dataclasses.replace(case, settings=settings).build(ours, layout=layout, over=over, features=features)
    programs = []
    for module in (case.build(ours), named):
        function, variables = pure(module, x)
        programs.append(str(jax.make_jaxpr(functools.partial(function, mask=mask))(variables, x)))
    assert programs[0] == programs[1]


@hosts
def test_ghost_batch_norm(host):
    x = np.random.default_rng(0).normal(1.0, 2.0, (6, 2, 3)).astype(np.float32)
    names = {"layout": "(m n) h c", "over": "n h", "features": "c", "sizes": {"m": 2}}
    y, stats = run(build(HOSTS[host][0], "BatchNorm", 3, momentum=0.0, **names), x)
    np.testing.assert_allclose(y, reference.standardize(x, "(m n) h c", "n h", sizes={"m": 2})[0], **CLOSE)
    whole = reference.moments(x, "n h c", "n h")
    np.testing.assert_allclose(stats["mean"], whole.mean, **CLOSE)
    np.testing.assert_allclose(stats["var"], whole.var, **CLOSE)


@hosts
@pytest.mark.parametrize("kind", KINDS)
def test_weights(kind, host):
    rng = np.random.default_rng(0)
    x, weights = (a.astype(np.float32) for a in (rng.normal(1.0, 2.0, (3, 6, 4)), rng.uniform(0, 2, (3, 6, 4))))
    layout, over = {
        "GroupNorm": ("n h (g k)", "h k"),
        "InstanceNorm": ("n h c", "h"),
        "BatchNorm": ("n h c", "n h"),
    }.get(kind, ("n h c", "c"))
    expected, _ = reference.standardize(
        x, layout, over, weights=weights, center=kind != "RMSNorm", epsilon=EPSILON[kind], sizes={"g": 2},
    )  # fmt: skip
    np.testing.assert_allclose(run(build(HOSTS[host][0], kind), x, weights=weights)[0], expected, **CLOSE)


@hosts
@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize(
    "settings", [{"momentum": 0.9}, {"momentum": 0.5, "debias": True}, {"momentum": None}], ids=str
)
def test_running_statistics(settings, unbiased, host):
    batches = np.random.default_rng(1).normal(1.0, 2.0, (4, 5, 2)).astype(np.float32)
    module = build(HOSTS[host][0], "BatchNorm", 2, unbiased=unbiased, **settings)
    function, variables = pure(module, batches[0])
    counts = settings != {"momentum": 0.9}
    assert set(variables["batch_stats"]) == {"mean", "var"} | ({"num_updates"} if counts else set())
    variables, _ = jax.jit(lambda v, xs: jax.lax.scan(lambda v, x: function(v, x)[::-1], v, xs))(variables, batches)
    moments = [reference.moments(batch, "n c", "n") for batch in batches]
    pairs = [(m.mean, m.var_unbiased if unbiased else m.var) for m in moments]
    mean, var = reference.running(pairs, settings["momentum"], debias=settings.get("debias", False))
    np.testing.assert_allclose(variables["batch_stats"]["mean"], mean, **CLOSE)
    np.testing.assert_allclose(variables["batch_stats"]["var"], var, **CLOSE)
    assert not counts or variables["batch_stats"]["num_updates"] == 4


@hosts
def test_flax_update_to_the_bit(host):
    """Given the same statistics, mean and var after three updates are Flax's bits. Whole numbers make them the same."""
    batches = np.array([[[0], [4]], [[6], [8]], [[-2], [0]]], np.float32)
    bitwise = []
    for library in HOSTS[host]:
        module = build(library, "BatchNorm", 1)
        function, variables = pure(module, batches[0])
        for batch in batches:
            _, variables = jax.jit(function)(variables, batch)
        bitwise.append(jax.tree.map(bits, variables["batch_stats"]))
    jax.tree.map(np.testing.assert_array_equal, *bitwise)
