"""Modules around a layer: the norms of weights in both hosts, and cross-iteration batch norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_modules import CASES, C, X, build, dense, pure, same
from flax import nnx
from modules import HOSTS, KEY

import jaxnorm as jn

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
        assert set(nnx.to_pure_dict(nnx.state(theirs, nnx.Param))) == {"layer_instance"}


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
        assert set(scales) == {"Dense_0/kernel", "Dense_1/kernel"}
    else:
        wrapped = build(host, "WeightNorm", block)
        y, again = wrapped(X), wrapped(X)
        assert ((y == 0) != (again == 0)).any()
        assert set(wrapped.norm) == {"layers/0/kernel", "layers/1/kernel"}
        mean, hidden = wrapped.layer.norm.mean[...] / 1.99, X @ wrapped.layer.layers[0].kernel[...]
    assert 0.2 < (y == 0).mean() < 0.8
    same(mean, 0.01 * hidden.mean((0, 1)))


@hosts
def test_which_kernels(host):
    first = {"linen": ("Dense_0", "kernel"), "nnx": ("layers", "0", "kernel")}[host]
    module = build(host, "WeightNorm", block, where=lambda path, leaf: path == first)
    keys = {"params": KEY, "dropout": KEY}
    held = module.init(keys, X)["params"]["norm"] if host == "linen" else module.norm
    assert set(held) == {"/".join(first)}

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
    same(after["batch_stats"]["norm"]["layer/kernel"]["sigma"], np.linalg.norm(own["kernel"], 2), rtol=1e-3)


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
