"""Modules around a layer: the norms of weights in both hosts, and cross-iteration batch norm."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_modules import CASES, C, X, build, dense, pure, same
from flax import nnx
from modules import HOSTS, KEY

import jaxnorm as jn
from jaxnorm import linen

hosts = pytest.mark.parametrize("host", HOSTS)


def block(host):
    """Two kernels, running statistics, and noise."""
    if host == "linen":

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.BatchNorm(use_running_average=False)(nn.Dense(C)(x))
                return nn.Dropout(0.5, deterministic=False)(nn.Dense(C)(x))

        return Block()

    class Block(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(C, C, rngs=rngs) for _ in range(2)])
            self.norm, self.dropout = nnx.BatchNorm(C, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.layers[1](self.norm(self.layers[0](x))))

    return Block()


@hosts
def test_12_the_scales_of_weight_norm_are_trained(host):
    """PEERS.md: nnx's are no parameters (flax issue 5577). A wrapped layer starts as it is without."""
    function, variables = pure(build(host, "WeightNorm", dense), X)
    kernel, bias = (variables["params"]["layer"][name] for name in ("kernel", "bias"))
    same(function(variables, X)[0], X @ kernel + jnp.broadcast_to(bias, X.shape))

    def loss(params):
        return (function({**variables, "params": params}, X)[0] ** 2).mean()

    gradient = jax.grad(loss)(variables["params"])
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
    assert loss(stepped) < loss(variables["params"])
    assert abs(gradient["norm"]["kernel"]["scale"]).min() > 0
    # the direction alone: the gradient of a kernel is orthogonal to it
    same((gradient["layer"]["kernel"] * kernel).sum(0), np.zeros(C))
    if host == "nnx":
        theirs = nnx.WeightNorm(dense(host), rngs=nnx.Rngs(0))
        # fixed in flax 0.12.12, where "scales" are parameters too
        assert set(nnx.to_pure_dict(nnx.state(theirs, nnx.Param))) - {"scales"} == {"layer_instance"}


@hosts
@pytest.mark.parametrize("case", [case for case in CASES if case.inside is dense], ids=lambda case: case.module)
def test_12_the_wrapped_kernel_stays(case, host):
    """PEERS.md: nnx's wrappers overwrite it, even in evaluation."""
    module = case.build(host)
    function, variables = pure(module, X, **case.switch(True))
    variables = jax.tree.map(lambda a: 3 * a, variables)
    for train in (True, False):
        _, after = function(variables, X, **case.switch(train))
        same(after["params"], variables["params"], rtol=0)
        if host == "nnx":
            before = np.asarray(module.layer.kernel[...])
            module(X, **case.switch(train))
            np.testing.assert_array_equal(module.layer.kernel[...], before)
            jax.jit(lambda x: module(x, **case.switch(False)))(X)  # closed over: nothing may be written
    if host == "nnx" and case.module in ("WeightNorm", "SpectralNorm"):
        theirs = getattr(nnx, case.module)(dense(host), rngs=nnx.Rngs(0))
        before = np.asarray(theirs.layer_instance.kernel[...])
        theirs(X, **({"update_stats": False} if case.module == "SpectralNorm" else {}))
        assert abs(theirs.layer_instance.kernel[...] - before).max() > 0.01


@hosts
def test_a_wrapped_block_lives_as_without(host):
    """Its running statistics and its noise go on, its parameters are its own; every kernel in it is normalized."""
    if host == "linen":
        keys = {"params": KEY, "dropout": KEY}
        wrapped, plain = build(host, "WeightNorm", block), block(host)
        variables, others = (m.init(keys, X) for m in (wrapped, plain))
        inner = {name: variables[name]["layer"] for name in ("params", "batch_stats")}
        same(jax.tree.map(jnp.shape, inner), jax.tree.map(jnp.shape, others), rtol=0)
        y, after = wrapped.apply(variables, X, mutable="batch_stats", rngs=keys)
        scales = variables["params"]["norm"]
        mean = after["batch_stats"]["layer"]["BatchNorm_0"]["mean"]
        hidden = X @ inner["params"]["Dense_0"]["kernel"]
        assert list(jax.tree.map(jnp.shape, scales)) == ["Dense_0", "Dense_1"]
    else:
        wrapped = build(host, "WeightNorm", block)
        y, again = wrapped(X), wrapped(X)
        assert ((y == 0) != (again == 0)).any()
        assert set(wrapped.norm["layers"]) == {"0", "1"}
        mean, hidden = wrapped.layer.norm.mean[...] / 1.99, X @ wrapped.layer.layers[0].kernel[...]
    assert 0.2 < (y == 0).mean() < 0.8
    same(mean, 0.01 * hidden.mean((0, 1)))


@hosts
def test_which_kernels(host):
    first = {"linen": ("Dense_0", "kernel"), "nnx": ("layers", "0", "kernel")}[host]
    module = build(host, "WeightNorm", block, where=lambda path, leaf: path == first)
    keys = {"params": KEY, "dropout": KEY}
    held = module.init(keys, X)["params"]["norm"] if host == "linen" else module.norm
    for name in first:
        assert list(held) == [name]
        held = held[name]

    def run():
        module = build(host, "SpectralNorm", dense, where="weight")
        return module.init(KEY, X, use_running_average=False) if host == "linen" else module(X)

    with pytest.raises(ValueError, match=f"{host}.SpectralNorm: no parameter of the layer is where='weight' asks"):
        run()


@hosts
def test_wrappers_inside_wrappers(host):
    module = build(host, "SpectralNorm", lambda host: build(host, "WeightStandardization", dense), num_steps=30)
    function, variables = pure(module, X, use_running_average=False)
    y, after = function(variables, X, use_running_average=False)
    own = variables["params"]["layer"]["layer"]
    # the kernel in the middle is what is kept; it goes to singular value 1, then to mean 0 and variance 1
    same(y, X @ jn.weight_standardization(own["kernel"] / np.linalg.norm(own["kernel"], 2)), rtol=1e-3, atol=1e-3)
    same(after["batch_stats"]["norm"]["layer"]["kernel"]["sigma"], np.linalg.norm(own["kernel"], 2), rtol=1e-3)


class Gate(nn.Module):
    """A kernel of its own before that of the module it is given."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(x @ self.param("kernel", nn.initializers.lecun_normal(), (C, C)))


def dense_of(width=C):
    return nn.Dense(width, use_bias=False)


INSIDE = {
    "a layer with a layer of its parent": (lambda: Gate(dense_of()), lambda norm, k: norm(k[0]) @ norm(k[1])),
    "a wrapper": (
        lambda: linen.WeightStandardization(dense_of()), lambda norm, k: jn.weight_standardization(norm(k[0])),
    ),
    "layers in a row": (lambda: nn.Sequential([dense_of(), dense_of()]), lambda norm, k: norm(k[0]) @ norm(k[1])),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("made", ["alone", "compact", "setup"])
def test_where_linen_makes_what_is_inside(name, made):
    """Every kernel is normalized, and by its own norm, wherever flax puts it: here all go to unit columns."""
    layer, formula = INSIDE[name]

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.WeightNorm(layer(), use_scale=False)(x)

    class Setup(nn.Module):
        def setup(self):
            self.norm = linen.WeightNorm(layer(), use_scale=False)

        def __call__(self, x):
            return self.norm(x)

    module = {"alone": linen.WeightNorm(layer(), use_scale=False), "compact": Compact(), "setup": Setup()}[made]
    variables = module.init(KEY, X)
    kernels = sorted(jax.tree_util.tree_leaves_with_path(variables["params"]), key=lambda leaf: str(leaf[0]))
    kernels = [leaf for _, leaf in kernels]
    if name == "a layer with a layer of its parent":  # the gate's own kernel has the shorter path, or the later name
        kernels.sort(key=lambda k: not np.allclose(k, gate_of(variables["params"])))
    y, gradients = module.apply(variables, X), jax.grad(lambda p: (module.apply({"params": p}, X) ** 2).sum())
    same(y, X @ formula(jn.weight_norm, kernels), rtol=1e-4, atol=1e-4)
    assert all(g.any() for g in jax.tree.leaves(gradients(variables["params"])))
    again = module.init(KEY, X)
    same(jax.tree.leaves(again), jax.tree.leaves(variables), rtol=0)


def gate_of(params):
    """The kernel that Gate has itself."""
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return next(leaf for path, leaf in flat.items() if "inner" not in path and "Dense" not in path)


def test_initialisation_runs_the_layer_once():
    """A layer that counts its calls, or makes a cache of the right size in the first, starts as it does without."""
    attention = nn.MultiHeadDotProductAttention(2, decode=True)
    x = jnp.ones((1, 5, 8))
    layout = lambda path, _: "... o" if path[0] == "out" else "... h d"  # noqa: E731
    wrapped = linen.WeightNorm(attention, layout=layout).init(KEY, x)
    plain = attention.init(KEY, x)
    same(jax.tree.leaves(wrapped["cache"]["layer"]), jax.tree.leaves(plain["cache"]), rtol=0)
    assert wrapped["params"]["norm"]["query"]["kernel"]["scale"].shape == (2, 4)  # a length for each head and entry
    assert wrapped["params"]["norm"]["out"]["kernel"]["scale"].shape == (8,)


def test_what_is_missing_is_said():
    layer = linen.WeightNorm(nn.Sequential([dense_of(), dense_of()]))
    params = layer.init(KEY, X)["params"]
    first = next(iter(params["norm"]))
    for norm in {first: params["norm"][first]}, {}:
        with pytest.raises(ValueError, match="nothing is held of the kernel"):
            layer.apply({"params": {**params, "norm": norm}}, X)
    with pytest.raises(ValueError, match="an instance of flax"):
        linen.WeightNorm(nn.Dense)
    spectral = linen.SpectralNorm(dense_of(), use_running_average=True)
    params = spectral.init(KEY, X)["params"]
    with pytest.raises(flax.errors.ScopeCollectionNotFound):
        spectral.apply({"params": params}, X)


@hosts
def test_evaluation_reaches_what_is_inside(host):
    """Nothing moves in a spectral norm within a spectral norm that is evaluated."""
    module = build(host, "SpectralNorm", lambda host: build(host, "SpectralNorm", dense))
    function, variables = pure(module, X, use_running_average=False)
    _, trained = function(variables, X, use_running_average=False)
    _, after = function(trained, X, use_running_average=True)
    same(jax.tree.leaves(after["batch_stats"]), jax.tree.leaves(trained["batch_stats"]), rtol=0)
    pairs = zip(*(jax.tree.leaves(z["batch_stats"]) for z in (trained, variables)), strict=True)
    assert sum(bool((a != b).any()) for a, b in pairs) >= 3  # and both moved in training


@hosts
def test_cross_iteration_wants_a_bare_layer(host):
    def run():
        module = build(host, "CrossIterationBatchNorm", dense)
        return module.init(KEY, X, use_running_average=False)

    with pytest.raises(ValueError, match=f"{host}.CrossIterationBatchNorm: it goes around a layer with a kernel"):
        run()


def test_shared_layers_of_linen():
    """A layer made in the parent keeps its name there, whatever goes around it."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(C, name="mine")
            return build("linen", "WeightNorm", lambda _: layer)(x) - layer(x)

    y, variables = Model().init_with_output(KEY, X)
    assert set(variables["params"]) == {"mine", "WeightNorm_0"}
    same(y, np.zeros(X.shape))
