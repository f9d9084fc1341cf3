"""The modules hand out the moments of what they see: when asked, in training and in evaluation, at no other cost."""

import functools
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
import jaxnorm.linen as jl
import jaxnorm.nnx as jx

N, H, C = 8, 3, 4
RNG = np.random.default_rng(0)
MASK = RNG.random((N, H)) < 0.7
X = np.where(MASK[..., None], RNG.normal(3, 2, (N, H, C)), np.nan).astype(np.float32)
WEIGHTS = RNG.uniform(0.5, 2, (N, H)).astype(np.float32)
LABELS, PLACES = np.arange(N) % 3, np.ones((N, H, C), np.float32)
# name: settings, further inputs, whether the call takes weights
GIVE = {
    "BatchNorm": ({}, (), True),
    "GhostBatchNorm": ({"num_ghosts": 2}, (), True),
    "BatchRenorm": ({}, (), True),
    "StreamingNorm": ({}, (), True),
    "SwitchableNorm": ({}, (), True),
    "BatchChannelNorm": ({"num_groups": 2}, (), False),
    "ConditionalBatchNorm": ({"num_classes": 3}, (LABELS,), True),
    "SPADE": ({}, (PLACES, PLACES), True),
    "EvoNormB0": ({}, (), True),
}  # fmt: skip
KEEP = {
    "FrozenBatchNorm": ({}, ()),
    "SplitBatchNorm": ({}, ("clean",)),
    "DecorrelatedBatchNorm": ({"group_size": 2}, ()),
    "LayerNorm": ({}, ()),
}


def run(host, name, settings, inputs, train, **call):
    """What `name` hands out, or None."""
    switch = {} if name == "LayerNorm" else {"use_running_average": not train}
    if host == "linen":
        module = getattr(jl, name)(**settings, **switch)
        variables = module.init(jax.random.key(0), X, *inputs, **call)
        _, new = module.apply(variables, X, *inputs, **call, mutable=["moments", "batch_stats"])
        assert "moments" not in variables
        return new.get("moments", {}).get("moments")
    module = getattr(jx, name)(C, **settings, **switch, rngs=nnx.Rngs(0))
    before = set(vars(module))
    _, seen = nnx.capture(module, jx.BatchMoments)(X, *inputs, **call)
    assert set(vars(module)) == before
    return seen["moments"].get_value() if "moments" in seen else None


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", GIVE)
@pytest.mark.parametrize("host", ["linen", "nnx"])
def test_what_is_handed_out(host, name, train):
    settings, inputs, weighted = GIVE[name]
    call = {"mask": MASK[..., None], **({"weights": WEIGHTS[..., None]} if weighted else {})}
    seen = run(host, name, settings, inputs, train, **call)
    assert isinstance(seen, jn.Moments)
    rows, w = X[MASK].astype(np.float64), (WEIGHTS if weighted else np.ones_like(WEIGHTS))[MASK].astype(np.float64)
    mean = w @ rows / w.sum()
    np.testing.assert_allclose(seen.count, np.full(C, w.sum()), rtol=1e-6)
    np.testing.assert_allclose(seen.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(seen.m2, w @ (rows - mean) ** 2, rtol=1e-5)


@pytest.mark.parametrize("name", KEEP)
@pytest.mark.parametrize("host", ["linen", "nnx"])
def test_what_has_no_moments_of_this_batch_gives_none(host, name):
    settings, inputs = KEEP[name]
    assert run(host, name, settings, inputs, train=True) is None


def test_only_when_asked_by_name():
    norm = jl.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), X)
    # mutable=True asks for whatever there is, and what it gives back is the next call's variables
    for mutable in (True, ["batch_stats"], nn.DenyList("params")):
        _, new = norm.apply(variables, X, mutable=mutable)
        assert "moments" not in new
    norm = jx.BatchNorm(C, rngs=nnx.Rngs(0))
    _, seen = nnx.capture(norm, nnx.Intermediate)(X)
    norm(X)
    assert not jax.tree.leaves(seen)
    assert not hasattr(norm, "moments")


def test_statistics_lie_as_the_state_does():
    """Features in another order than the layout, and ones that are averaged over, too."""
    norm = jl.BatchNorm(layout="a b n", over="n", features="b a", use_running_average=True)
    x = RNG.normal(size=(2, 3, 5)).astype(np.float32)
    variables = norm.init(jax.random.key(0), x)
    _, new = norm.apply(variables, x, mutable=["moments"])
    assert new["moments"]["moments"].mean.shape == variables["batch_stats"]["mean"].shape == (3, 2)
    np.testing.assert_allclose(new["moments"]["moments"].mean, x.astype(np.float64).mean(2).T, rtol=1e-5, atol=1e-6)


def test_inside_of_transformations():
    """scan over layers stacks them as it stacks the state; remat and jit let them out; nnx.jit too."""
    x = np.where(np.isnan(X), 0, X)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return 2 * jl.BatchNorm(use_running_average=True, epsilon=0.0)(x), None

    axes = {"params": 0, "batch_stats": 0, "moments": 0}
    scanned = nn.scan(nn.jit(nn.remat(Block)), variable_axes=axes, split_rngs={"params": True}, length=3)()
    variables = scanned.init(jax.random.key(0), x, None)
    _, new = scanned.apply(variables, x, None, mutable=["moments"])
    (seen,) = jax.tree.leaves(new, is_leaf=lambda z: isinstance(z, jn.Moments))
    mean = x.astype(np.float64).mean((0, 1))
    np.testing.assert_allclose(seen.mean, np.stack([mean, 2 * mean, 4 * mean]), rtol=1e-5)

    norm = jx.BatchNorm(C, use_running_average=True, rngs=nnx.Rngs(0))
    capture = nnx.jit(lambda norm, x: nnx.capture(norm, jx.BatchMoments)(x)[1])
    np.testing.assert_allclose(capture(norm, x)["moments"].get_value().mean, mean, rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_what_it_costs(train):
    """In training no collective and no pass over x more; in evaluation one collective, and none where nobody asks."""
    norm = jl.BatchNorm(layout="n c", over="n devices", use_running_average=not train)
    x = np.ones((16, C), np.float32)
    variables = norm.clone(over="n").init(jax.random.key(0), x)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))

    def collectives(*collections):
        apply = functools.partial(norm.apply, mutable=[*collections, "batch_stats"])
        out = (P("devices"), P())
        mapped = jax.shard_map(apply, mesh=mesh, in_specs=(P(), P("devices")), out_specs=out)
        text = jax.jit(mapped).lower(variables, x).as_text()
        return len(re.findall(r"stablehlo\.(all_gather|all_reduce)", text))

    assert [collectives(), collectives("moments")] == ([1, 1] if train else [0, 1])


def test_over_an_axis_that_is_not_bound():
    norm = jl.BatchNorm(layout="n c", over="n devices", use_running_average=True)
    variables = norm.init(jax.random.key(0), np.ones((2, 3), np.float32))
    norm.apply(variables, np.ones((2, 3), np.float32))
    with pytest.raises(jn.AxisError, match="'devices' in over"):
        norm.apply(variables, np.ones((2, 3), np.float32), mutable=["moments"])
