"""Collectives counted in compiled HLO: what a synced norm sends, forward, and forward and backward."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm.linen import BatchNorm
from jaxnorm.rule import STATS_NAME

DEVICES, C = 8, 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(512, C)).astype(np.float32)
MASK = RNG.random((512, 1)) < 0.5
SCALE = np.linspace(0.5, 1.5, C, dtype=np.float32)
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def mesh_of(kind=AxisType.Auto, shape=(DEVICES,), names=("devices",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def count(f, *arrays):
    return len(COLLECTIVE.findall(jax.jit(f).lower(*arrays).compile().as_text()))


def layer(over, x, mask):
    return jn.standardize(x, "n c", over, mask=mask)[0]


def forward(norm, x, mask):
    return norm(x, mask)


def backward(norm, x, mask):
    """A loss that needs the forward pass too, so that neither pass is left out."""
    return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(norm(x, mask))))(x)[1]


def pmapped(program):
    rows = X.reshape(DEVICES, -1, C), MASK.reshape(DEVICES, -1, 1)
    return jax.pmap(functools.partial(program, functools.partial(layer, "n devices")), "devices"), *rows


def vmapped(program):
    rows = X.reshape(DEVICES, -1, C), MASK.reshape(DEVICES, -1, 1)
    return jax.vmap(functools.partial(program, functools.partial(layer, "n devices")), axis_name="devices"), *rows


def by_mesh(program, names="devices", wrap=lambda f: f, **options):
    mesh = mesh_of() if names == "devices" else mesh_of(shape=(4, 2), names=("a", "b"))
    axes = tuple(names.split())
    local = wrap(functools.partial(program, functools.partial(layer, f"n {names}")))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P(axes), out_specs=P(axes), **options)
    return mapped, *(jax.device_put(z, NamedSharding(mesh, P(mesh.axis_names))) for z in (X, MASK))


def sharded(program, kind):
    put = [jax.device_put(z, NamedSharding(mesh_of(kind), P("devices"))) for z in (X, MASK)]
    return functools.partial(program, functools.partial(layer, "n")), *put


def in_scan(f):
    return lambda *data: lax.scan(lambda c, _: (c, f(*data)), 0, length=2)[1][1]


CONTEXTS = {
    "vmap, one device": (vmapped, 0),
    "pmap": (pmapped, 1),
    "shard_map": (by_mesh, 1),
    "shard_map, check_vma=False": (functools.partial(by_mesh, check_vma=False), 1),
    "shard_map, two mesh axes": (functools.partial(by_mesh, names="a b"), 1),
    "shard_map, inside scan": (functools.partial(by_mesh, wrap=in_scan), 1),
    "shard_map, inside remat": (functools.partial(by_mesh, wrap=jax.checkpoint), 1),
    "jit, Auto, under jax.set_mesh": (functools.partial(sharded, kind=AxisType.Auto), 1),
    "jit, Explicit": (functools.partial(sharded, kind=AxisType.Explicit), 1),
    # one over the axis that has a name, and one over the axis that is left to the compiler
    "shard_map, one axis to the compiler": (functools.partial(by_mesh, names="a", axis_names={"a"}), 2),
}


UNDER = "jit, Auto, under jax.set_mesh"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("context", "each"), CONTEXTS.values(), ids=CONTEXTS)
def test_one_forward_and_one_more_backward(context, each, masked):
    for program, times in ((forward, 1), (backward, 2)):
        mapped, x, mask = context(program)
        with jax.set_mesh(mesh_of()) if context is CONTEXTS[UNDER][0] else contextlib.nullcontext():
            got = count(mapped, x, mask) if masked else count(lambda x: mapped(x, None), x)  # noqa: B023
        assert got == times * each


def stack(over, policy, x):
    """Three layers with parameters, each recomputed backward where a policy says what may be kept."""

    def one(x):
        return jnp.sin(jn.standardize(x, "n c", over, scale=SCALE, bias=SCALE)[0])

    for _ in range(3):
        x = (one if policy is None else jax.checkpoint(one, policy=policy))(x)
    return x


KEEP = jax.checkpoint_policies.save_only_these_names(STATS_NAME)


@pytest.mark.parametrize("policy", [None, KEEP], ids=["plain", "remat that keeps jaxnorm_stats"])
@pytest.mark.parametrize("kind", ["shard_map", AxisType.Auto, AxisType.Explicit])
def test_three_layers_send_three_times_as_much(kind, policy):
    """With a policy that keeps the reduced statistics by their name: jax 0.12 repeats the forward collective without.

    Under jit the one sum that goes backward holds the gradients of scale and bias as well.
    """
    net = functools.partial(stack, "n devices" if kind == "shard_map" else "n", policy)

    def dx(x):
        return jax.grad(lambda x: jnp.sum(net(x)))(x)

    x = jax.device_put(X, NamedSharding(mesh_of(AxisType.Auto if kind == "shard_map" else kind), P("devices")))
    if kind == "shard_map":
        mapped = [jax.shard_map(f, mesh=mesh_of(), in_specs=P("devices"), out_specs=P("devices")) for f in (net, dx)]
        assert [count(f, x) for f in mapped] == [3, 6]
        return

    def with_parameters(x, scale):
        def loss(x, scale):
            for _ in range(3):
                x = jnp.sin(jn.standardize(x, "n c", "n", scale=scale, bias=scale)[0])
            return jnp.sum(x)

        return jax.grad(loss, (0, 1))(x, scale)

    with jax.set_mesh(mesh_of(kind)):
        assert [count(net, x), count(dx, x), count(with_parameters, x, SCALE)] == [3, 6, 6]


def test_remat_repeats_nothing_in_a_scan_over_layers():
    """The usual deep net: scan over layers of which each is recomputed. Counted once for each body, not each step."""

    def local(x):
        def one(x, _):
            return stack("n devices", KEEP, x), None

        return jax.grad(lambda x: jnp.sum(lax.scan(one, x, length=2)[0]))(x)

    assert count(jax.shard_map(local, mesh=mesh_of(), in_specs=P("devices"), out_specs=P("devices")), X) == 6


@pytest.mark.parametrize("norm", [jn.layer_norm, jn.rms_norm])
@pytest.mark.parametrize("kind", ["shard_map", AxisType.Explicit])
def test_features_that_lie_apart(norm, kind):
    over = "c devices" if kind == "shard_map" else "c"

    def dx(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(norm(x, "n c", over))))(x)

    programs, spec = [lambda x: norm(x, "n c", over), dx], P(None, "devices")
    mesh = mesh_of(AxisType.Auto if kind == "shard_map" else kind)
    if kind == "shard_map":
        programs = [jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec) for f in programs]
    x = jax.device_put(X, NamedSharding(mesh, spec))
    assert [count(f, x) for f in programs] == [1, 2]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_ghosts_of_a_sharded_batch_send_nothing(kind):
    """`(devices n)` with statistics over n: y, and its gradient, stay where they are under plain jit."""
    x = jax.device_put(X, NamedSharding(mesh_of(kind), P("devices")))

    def y(x):
        running = jn.running_stats(c=C)
        return jn.batch_norm(x, running, "(devices n) c", "n", features="c", sizes={"devices": DEVICES})[0]

    assert [count(y, x), count(lambda x: jax.grad(lambda x: jnp.sum(jnp.sin(y(x))))(x), x)] == [0, 0]
    parts = X.reshape(DEVICES, -1, C).astype(np.float64)
    want = (parts - parts.mean(1, keepdims=True)) / np.sqrt(parts.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(jax.jit(y)(x), want.reshape(X.shape), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("rows", [24, 960])
def test_auto_axes_without_a_mesh_leave_it_to_the_compiler(rows):
    """Two of channels, one after the other, and never of x: nothing is guessed. On six of eight devices."""
    mesh = jax.make_mesh((6,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:6])
    x = jax.device_put(np.ones((rows, C), np.float32), NamedSharding(mesh, P("devices")))
    text = jax.jit(lambda x: layer("n", x, None)).lower(x).compile().as_text()
    assert COLLECTIVE.findall(text) == ["all-reduce"] * 2
    with jax.set_mesh(mesh):
        assert count(lambda x: layer("n", x, None), x) == 1


def test_evaluation_and_initialisation_send_nothing():
    module = BatchNorm(over="... devices")

    def initialise(x):
        return jax.tree.leaves(module.init(jax.random.key(0), x, use_running_average=False))

    def evaluate(x):
        return module.apply(module.init(jax.random.key(0), x, use_running_average=True), x, use_running_average=True)

    programs = (initialise, P()), (evaluate, P("devices"))
    for program, out in programs:
        assert count(jax.shard_map(program, mesh=mesh_of(), in_specs=P("devices"), out_specs=out), X) == 0


def test_gradients_of_many_parameters_cross_together():
    """reduce_gradients: nothing under check_vma=True beyond what JAX sent itself, one all-reduce under False."""
    params = {f"w{i}": np.ones((3, C), np.float32) for i in range(4)}

    def local(reduce, params, x):
        def loss(params):
            return sum(jnp.sum(jnp.sin(x[:, None] * w[None])) for w in params.values())

        return reduce(jax.grad(loss)(params))

    def collectives(reduce, **options):
        mapped = jax.shard_map(
            functools.partial(local, reduce), mesh=mesh_of(), in_specs=(P(), P("devices")), out_specs=P(), **options
        )
        return count(mapped, params, X)

    assert collectives(jn.reduce_gradients) == collectives(lambda grads: grads)
    assert collectives(jn.reduce_gradients, check_vma=False) == 1
