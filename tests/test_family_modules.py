"""The Flax modules of every norm beyond the five, in both hosts: the numbers of their functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_modules import CASES, RESIDUAL, RNG, C, N, X, build, pure, random, same
from flax import nnx
from modules import HOSTS, KEY, shapes

import jaxnorm as jn

hosts = pytest.mark.parametrize("host", HOSTS)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.module)


def test_no_module_is_missing():
    assert sorted(case.module for case in CASES) == sorted(row.module for row in jn.norms()[5:])
    for library, _ in HOSTS.values():
        assert set(library.__all__) == {row.module for row in jn.norms()}
        assert all(getattr(library, name).__doc__ for name in library.__all__)


def sample(variables):
    """Parameters and a state that are neither what they start with nor alike."""

    def moved(path, leaf):
        name, noise = path[-1].key, RNG.normal(size=leaf.shape)
        if name == "num_updates":
            return jnp.int32(9000)  # amid the schedule of batch renorm
        if name == "past_counted":
            return jnp.ones(leaf.shape)
        if name == "cov":
            noise = 0.1 * (noise + np.swapaxes(noise, -1, -2))
        return jnp.asarray(abs(leaf + noise) if name.endswith(("var", "sigma")) else leaf + 0.3 * noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(moved, variables)


@every_case
def test_the_numbers_of_the_function(case):
    """Outputs, state and gradients, in training and in evaluation. Both hosts have the same variables."""
    inputs = (X, *case.inputs)
    found = {host: pure(case.build(host), *inputs, **case.switch(True)) for host in HOSTS}
    functions, (variables, others) = {host: f for host, (f, _) in found.items()}, [v for _, v in found.values()]
    assert shapes(variables) == shapes(others)
    assert " ".join(sorted(variables["batch_stats"])) == " ".join(sorted(case.state.split()))
    check_start(variables, case)
    check_start(others, case)
    functions["function"] = None
    variables = sample(variables)

    def call(name, params, train):
        if name == "function":
            return case.function(params, variables["batch_stats"], *inputs, train=train)
        outputs, after = functions[name]({**variables, "params": params}, *inputs, **case.switch(train))
        return outputs, after["batch_stats"]

    def loss(params, name, train):
        leaves = [z for z in jax.tree.leaves(call(name, params, train)[0]) if jnp.issubdtype(z.dtype, jnp.floating)]
        return sum(jnp.vdot(z, jnp.cos(jnp.arange(z.size, dtype=z.dtype)).reshape(z.shape)) for z in leaves)

    @jax.jit
    def everything(params):
        return {
            (name, train): (*call(name, params, train), jax.grad(loss)(params, name, train))
            for name in functions for train in ((True, False) if case.state else (False,))
        }  # fmt: skip

    results = everything(variables["params"])
    for (name, train), result in results.items():
        if name != "function":
            same(result, results["function", train])
            assert shapes(result[1:]) == shapes((variables["batch_stats"], variables["params"]))
            gradients = jax.tree.leaves(result[2])
            assert all(np.isfinite(g).all() and (g.any() != (case.module == "FrozenBatchNorm")) for g in gradients)
    if case.state:
        same(results["linen", False][1], variables["batch_stats"], rtol=0)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), results["linen", True][1], variables["batch_stats"])
        assert any(jax.tree.leaves(moved)) == (case.module != "FrozenBatchNorm")


def check_start(variables, case):
    """What is held before any step."""
    params = dict(jax.tree_util.tree_leaves_with_path(variables["params"]))
    kernels = [path for path in params if path[0].key == "layer" and path[-1].key == "kernel"]
    start = dict(jax.tree_util.tree_leaves_with_path(case.start))
    assert set(params) - set(kernels) == set(start)
    for path, value in start.items():
        if case.module == "WeightNorm" and path[0].key == "norm":
            value = np.linalg.norm(params[kernels[0]], axis=0)
        np.testing.assert_allclose(params[path], np.broadcast_to(value, params[path].shape), rtol=1e-6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["batch_stats"]):
        name, shape = path[-1].key, leaf.shape
        if name == "u":
            np.testing.assert_allclose(np.linalg.norm(leaf), 1, rtol=1e-5)
        else:
            start = {"var": 1, "sigma": 1, "cov": np.eye(shape[-1]) if name == "cov" else 0}.get(name, 0)
            np.testing.assert_array_equal(leaf, np.broadcast_to(start, shape))


# --- where it lies


@hosts
@pytest.mark.parametrize("case", [case for case in CASES if case.over], ids=lambda case: case.module)
def test_mapped_axes(case, host):
    """Initialisation and evaluation touch none, training merges the statistics of all devices."""
    inputs, train, evaluate = (X, *case.inputs), case.switch(True), case.switch(False)
    module = case.build(host, over=f"{case.over} devices")
    function, variables = pure(module, *inputs, **train)
    check_start(variables, case)
    if not case.state:
        if host == "linen":
            with pytest.raises(jn.AxisError, match=f"jaxnorm.linen.{case.module}: 'devices' in over is neither"):
                function(variables, *inputs, **train)
        return
    jax.eval_shape(lambda v: function(v, *inputs, **evaluate), variables)
    if case.module == "FrozenBatchNorm":
        return
    alone = pure(case.build(host), *inputs, **train)[0]
    halves = jax.tree.map(lambda a: np.asarray(a).reshape(2, -1, *a.shape[1:]), inputs)

    @jax.jit
    def both(variables):
        whole = alone(variables, *inputs, **train)[1]["batch_stats"]
        step = jax.vmap(lambda half: function(variables, *half, **train)[1]["batch_stats"], axis_name="devices")
        return whole, step(halves)

    whole, parts = both(variables)
    for name in {"mean", "var", "cov"} & set(whole):
        same(parts[name], np.stack([whole[name]] * 2))


@hosts
def test_scale_and_bias_of_the_call(host):
    """For every example, where the norm is affine at its end; the same numbers as parameters of the module."""
    s, b, names = random(N, C, mean=1.0), random(N, C), {"use_scale": False, "use_bias": False}
    five = {"layout": "n h c"}
    free = {
        **dict.fromkeys(("BatchNorm", "LayerNorm", "InstanceNorm"), five), "GroupNorm": {**five, "num_groups": 2},
        "BatchRenorm": {"layout": "n ... c", "over": "n ..."}, "StreamingNorm": {"layout": "n ... c", "over": "n ..."},
        "SwitchableNorm": {},
        "PartialRMSNorm": five, "L2Norm": five, "DynamicTanh": five,
    }  # fmt: skip
    for kind, settings in free.items():
        module = build(host, kind, **settings, **names)
        train = {"use_running_average": False} if hasattr(module, "use_running_average") else {}
        function, variables = pure(module, X, **train)
        plain, _ = function(variables, X, **train)
        y, _ = function(variables, X, scale=s, bias=b, features="n c", **train)
        same(y, plain * s[:, None, :] + b[:, None, :])
        y, _ = function(variables, X, scale=s[0], bias=b[0], **train)
        same(y, plain * s[0].reshape(1, 1, C) + b[0].reshape(1, 1, C))
    for kind, settings in {"GlobalResponseNorm": {}, "DecorrelatedBatchNorm": {"group_size": 4}}.items():
        train = {"use_running_average": False} if settings else {}
        own, bare = build(host, kind, **settings), build(host, kind, **settings, **names)
        (f, variables), (g, none) = pure(own, X, **train), pure(bare, X, **train)
        y, _ = f({**variables, "params": {"scale": s[0], "bias": b[0]}}, X, **train)
        same(y, g(none, X, scale=s[0], bias=b[0], **train)[0], rtol=1e-6, atol=1e-6)
        with pytest.raises(jn.LayoutError, match=f'{kind}: scale and bias of this norm lie along "c", not along "n c"'):
            g(none, X, scale=s, bias=b, features="n c", **train)


@hosts
def test_scale_and_bias_are_given_once(host):
    for kind in ("LayerNorm", "L2Norm"):
        function, variables = pure(build(host, kind), X)
        with pytest.raises(ValueError, match=f"{kind}: scale is given in the call, and is a parameter too.*use_sc"):
            function(variables, X, scale=np.ones(C, np.float32))
        function, variables = pure(build(host, kind, layout="n h c", use_scale=False, use_bias=True), X)
        with pytest.raises(ValueError, match=f'{kind}: features="n c" is of a scale and a bias given in the call'):
            function(variables, X, scale=np.ones((N, C), np.float32), features="n c")
    function, variables = pure(build(host, "RMSNorm", use_scale=False), X)
    with pytest.raises(jn.LayoutError, match="needs names for the dimensions: give the module its layout"):
        function(variables, X, scale=np.ones((N, C), np.float32), features="n c")


@hosts
def test_scale_offset(host):
    """Gemma stores scale - 1."""
    function, variables = pure(build(host, "RMSNorm", scale_offset=1.0, scale_init=jax.nn.initializers.zeros), X)
    y, _ = function(variables, X)
    same(y, jn.rms_norm(X), rtol=1e-6)
    scale = random(C)
    y, _ = function({**variables, "params": {"scale": scale}}, X)
    same(y, jn.rms_norm(X) * (1 + scale).reshape(1, 1, C))


@hosts
@pytest.mark.parametrize("case", [case for case in CASES if not case.inside], ids=lambda case: case.module)
def test_dtypes(case, host):
    """y has `dtype`, or that of x; it is rounded to it once."""
    call = case.switch(True)
    for x_dtype, dtype in [(jnp.bfloat16, None), (jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)]:
        x = X.astype(x_dtype)
        function, variables = pure(case.build(host, dtype=dtype), x, *case.inputs, **call)
        y = jax.tree.leaves(jax.eval_shape(lambda v, f=function, x=x: f(v, x, *case.inputs, **call)[0], variables))[0]
        assert (y.dtype, y.shape) == (dtype or x_dtype, X.shape)
        assert {a.dtype.name for a in jax.tree.leaves(variables)} <= {"float32", "int32"}
    if case.module in ("LocalResponseNorm", "EvoNormS0"):
        exact, rounded = (pure(case.build(host, dtype=d), X)[0](variables, X)[0] for d in (None, jnp.bfloat16))
        np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="dtype must be a floating or complex one, got int32"):
        pure(case.build(host, dtype=jnp.int32), X, *case.inputs, **call)[0](variables, X, *case.inputs, **call)


# --- what single norms promise


@hosts
def test_sets(host):
    """By name, by index, by a traced index; each set is debiased by its own updates."""
    module = build(host, "SplitBatchNorm", sets=("a", "b", "c"), debias=True)
    function, variables = pure(module, X, "a", use_running_average=False)
    assert variables["batch_stats"]["num_updates"].shape == (3,)
    step = jax.jit(lambda v, which: function(v, X, which, use_running_average=False)[1])
    after = step(step(variables, 2), 0)
    named = function(function(variables, X, "c", use_running_average=False)[1], X, "a", use_running_average=False)[1]
    same(after, named)
    batch = jn.moments(X)
    same(after["batch_stats"]["mean"], np.stack([batch.mean, np.zeros(C, np.float32), batch.mean]))
    assert after["batch_stats"]["num_updates"].tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="SplitBatchNorm: there is no set 'd', only 'a', 'b', 'c'"):
        function(variables, X, "d", use_running_average=False)


@hosts
def test_18_a_batch_of_one(host):
    """PEERS.md: batch norm gives zeros, and its running variance falls to 0. Ours says so, but at initialisation."""
    more = {"DecorrelatedBatchNorm": {"group_size": 4}, "IterativeNorm": {"group_size": 4}}
    more |= {"BatchChannelNorm": {"num_groups": 2}, "GhostBatchNorm": {"num_ghosts": 2}}
    one = ["BatchNorm", "BatchRenorm", "StreamingNorm", "SwitchableNorm", "EvoNormB0", "SplitBatchNorm"]
    for kind in (*one, *more):
        settings = more.get(kind, {})
        which = ("clean",) * (kind == "SplitBatchNorm")
        x = X[: settings.get("num_ghosts", 1), 0]
        function, variables = pure(build(host, kind, **settings), x, *which, use_running_average=False)
        with pytest.raises(ValueError, match=f"{kind}: every statistic would be of one element"):
            function(variables, x, *which, use_running_average=False)
        function(variables, x, *which, use_running_average=True)
        y, _ = function(variables, X[:1], *which, use_running_average=False) if "num_ghosts" not in settings else (X, 0)
        assert np.isfinite(y).all()  # one example with places to average over


@hosts
def test_frozen_batch_norm_takes_a_checkpoint_of_batch_norm(host):
    trained, variables = pure(build(host, "BatchNorm"), X, use_running_average=False)
    variables = sample(variables)
    y, _ = trained(variables, X, use_running_average=True)
    frozen, _ = pure(build(host, "FrozenBatchNorm"), X)
    same(frozen(variables, X)[0], y, rtol=1e-6, atol=1e-6)
    same(frozen(variables, X, use_running_average=False)[0], y, rtol=1e-6, atol=1e-6)


@hosts
def test_qk_norm_in_attention(host):
    """Flax's attention with it is attention of what `qk_norm` gives, mask and all."""
    flax, seen = HOSTS[host][1], []

    def attend(query, key, value, mask=None, **options):
        seen.append(mask)
        query, key = jn.qk_norm(query, key)
        return flax.dot_product_attention(query, key, value, mask=mask)

    def attention(attention_fn):
        if host == "linen":
            return nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention_fn)
        return nnx.MultiHeadAttention(2, C, decode=False, attention_fn=attention_fn, rngs=nnx.Rngs(0))

    mask = flax.make_causal_mask(X[..., 0])
    function, variables = pure(attention(build(host, "QKNorm", num_features=C // 2)), X, mask=mask)
    scales = variables["params"].pop("attention_fn")
    assert jax.tree.map(jnp.shape, scales) == {"query_scale": (C // 2,), "key_scale": (C // 2,)}
    expected, _ = pure(attention(attend), X, mask=mask)[0](variables, X, mask=mask)
    y, _ = function({**variables, "params": {**variables["params"], "attention_fn": scales}}, X, mask=mask)
    same(y, expected)
    assert seen[-1] is not None
    free, _ = function({**variables, "params": {**variables["params"], "attention_fn": scales}}, X)
    assert abs(free - y).max() > 0.01


@hosts
def test_add_norm_passes_on_what_its_norm_takes(host):
    module = build(host, "AddNorm", lambda host: build(host, "BatchNorm"))
    function, variables = pure(module, X, RESIDUAL, use_running_average=False)
    (_, total), after = function(variables, X, RESIDUAL, use_running_average=False)
    same(after["batch_stats"]["norm"]["mean"], 0.01 * jn.moments(X + RESIDUAL).mean)
    same(total, X + RESIDUAL, rtol=0)


def test_modes_and_views_of_nnx():
    norm = build("nnx", "StreamingNorm")
    norm.eval()
    same(norm(X), X / np.sqrt(np.float32(1 + 1e-5)))
    nnx.view(norm, use_running_average=False)(X)
    same(norm.mean[...], jn.moments(X).mean)
    assert "use_running_average: bool | None = None" in nnx.view_info(norm)
    with pytest.raises(ValueError, match="use_running_average is needed"):
        build("nnx", "StreamingNorm", use_running_average=None)(X)


def test_lifted_linen_modules():
    """nn.remat, captured intermediates, and boxed parameters."""
    boxed = nn.with_partitioning(nn.initializers.ones, ("model",))
    for kind in ("L2Norm", "DynamicTanh"):
        norm = build("linen", kind, scale_init=boxed)
        variables = norm.init(KEY, X)
        assert nn.get_partition_spec(variables)["params"]["scale"] == jax.sharding.PartitionSpec("model")
        y, state = norm.apply(variables, X, capture_intermediates=True, mutable=["intermediates"])
        same(state["intermediates"]["__call__"][0], y, rtol=0)
        again = nn.remat(type(norm))(scale_init=boxed)
        same(jax.grad(lambda x, m=again, v=variables: (m.apply(v, x) ** 3).sum())(X),
             jax.grad(lambda x, m=norm, v=variables: (m.apply(v, x) ** 3).sum())(X))  # fmt: skip


WRONG = {
    "ghosts": ("GhostBatchNorm", {"num_ghosts": 3}, "num_ghosts=3 does not divide the 4 entries along 'n'"),
    "groups": ("EvoNormS0", {"num_groups": 3}, "num_groups=3 does not divide the 8 entries along 'c'"),
    "group size": ("IterativeNorm", {"group_size": 3}, "group_size=3 does not divide the 8 channels"),
    "features": ("L2Norm", {"features": "d"}, "features names 'd', which the layout lacks"),
    "a layout": ("EvoNormB0", {"layout": "n [c]"}, "layout cannot be read: '[' is not a name"),
    "rank": ("GlobalResponseNorm", {"layout": "n c", "over": ()}, "the layout names 2 dimensions, x has 3"),
}


@hosts
@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_module(name, host):
    kind, settings, text = WRONG[name]

    def run():
        module = build(host, kind, **settings)
        train = {"use_running_average": False} if hasattr(module, "use_running_average") else {}
        return module(X, **train) if host == "nnx" else module.init(KEY, X, **train)

    with pytest.raises(jn.LayoutError) as found:
        run()
    assert str(found.value).startswith(f"jaxnorm.{host}.{kind}: {text}"), str(found.value)
