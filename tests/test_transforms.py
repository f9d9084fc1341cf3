"""Both kinds of module under every transform of JAX and Flax: two training steps and an evaluation.

Each case is compared with the functions and with float64 NumPy: y, the running statistics after every call, and the
gradients by parameters and by x. A transform is a line of ROWS and means one of three things, `shared`, `apart` or
`layers`; what a module should then give is said by loops over `norm(x, parameters, state)`, once for both references.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx, traverse_util
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modules import CLOSE, EPSILON, KEY, KINDS, shapes

import jaxnorm as jn
import jaxnorm.linen as jl
import jaxnorm.nnx as jx

kinds = pytest.mark.parametrize("kind", KINDS)
MOMENTUM = 0.5
DEVICES, MEMBERS = 8, 4  # members of an ensemble, or layers
N, H, C = 2, 3, 4  # what each of them has
CALLS = (True, True, False)  # train, train, evaluate
SETTINGS = {"BatchNorm": {"momentum": MOMENTUM}, "GroupNorm": {"num_groups": 2}}
BY_OVER, BY_NAME = {"over": "... devices"}, {"axis_name": "devices"}  # two ways to say over which axis it synchronizes


# --- what it should be

NORMS = {
    "LayerNorm": (jn.layer_norm, "n h c", "c"),
    "RMSNorm": (jn.rms_norm, "n h c", "c"),
    "GroupNorm": (functools.partial(jn.group_norm, num_groups=2), "n h (g k)", "h k"),
    "InstanceNorm": (functools.partial(jn.instance_norm, over="h"), "n h c", "h"),
}
running = functools.partial(reference.running, momentum=MOMENTUM)


def function(kind, x, parameters, state, train):
    """The norm of x [n h c] as a function, and its new state."""
    if kind != "BatchNorm":
        return NORMS[kind][0](x, layout="n h c", **parameters), state
    if train:
        return jn.batch_norm(x, state, "n h c", "n h", momentum=MOMENTUM, **parameters)
    return jn.normalize(x, state, "n h c", features="c", **parameters), state


def plain(kind, x, parameters, batches, train):
    """The same in float64 NumPy. The state is the list of all (mean, var) so far."""
    if kind == "BatchNorm" and not train:
        return reference.normalize(x, *running(batches), ["c"], "n h c", features="c", **parameters), batches
    _, layout, over = NORMS.get(kind, (None, "n h c", "n h"))
    y, stats = reference.standardize(
        x, layout, over, features=layout[4:], sizes={"g": 2}, center=kind != "RMSNorm", epsilon=EPSILON[kind],
        **parameters,
    )  # fmt: skip
    return y, [*batches, (stats.mean, stats.var)]


def numbers(kind, states):
    """A module's state, from either kind of states: without a leading axis where there is one."""
    if kind != "BatchNorm":
        return {}
    pairs = [running(state) if isinstance(state, list) else (state.mean, state.var) for state in states]
    return {name: np.squeeze(np.stack(z)) for name, z in zip(("mean", "var"), zip(*pairs, strict=True), strict=True)}


def flat(*arrays):
    return (a.reshape(-1, H, C) for a in arrays)


def shared(norm, x, parameters, states):
    """One norm, whose batch is that of all members. Of x [members n h c]."""
    y, state = norm(*flat(x), parameters, states[0])
    return y.reshape(x.shape), [state]


def apart(norm, x, parameters, states):
    """Every member has parameters, statistics and a batch of its own."""
    found = [norm(x[i], {name: p[i] for name, p in parameters.items()}, states[i]) for i in range(MEMBERS)]
    return x.__array_namespace__().stack([y for y, _ in found]), [state for _, state in found]


def layers(norm, x, parameters, states):
    """As many norms one after the other, each on the whole batch."""
    (y,), after = flat(x), []
    for i in range(MEMBERS):
        y, state = norm(y, {name: p[i] for name, p in parameters.items()}, states[i])
        after.append(state)
    return y.reshape(x.shape), after


# A parameter's gradient is a sum of 48 terms, 70 in all: some roundings of 70 * 6e-8, and more where the terms come
# through four layers, each of which divides by a standard deviation.
TOLERANCE = {shared: CLOSE, apart: CLOSE, layers: {"rtol": 1e-4, "atol": 4e-5}}


def sample(how, kind):
    """Three batches, the weights of their losses, and parameters."""
    rng = np.random.default_rng(0)
    xs, ws = rng.normal(1.0, 2.0, (2, 3, DEVICES if how is shared else MEMBERS, N, H, C)).astype(np.float32)
    shape = (C,) if how is shared else (MEMBERS, C)
    parameters = {"scale": rng.uniform(0.5, 1.5, shape).astype(np.float32)}
    if kind != "RMSNorm":
        parameters["bias"] = rng.normal(size=shape).astype(np.float32)
    return xs, ws, parameters


@functools.cache
def expected(how, kind):
    """For each of the three calls: by the functions y, state and gradients; by NumPy y, state and a derivative.

    The derivative is that of the loss along one random direction of parameters and x together, by central differences.
    """
    xs, ws, parameters = sample(how, kind)
    rng, result = np.random.default_rng(1), []
    states, batches = ([start] * (1 if how is shared else MEMBERS) for start in (jn.running_stats(c=C), []))

    @functools.partial(jax.jit, static_argnums=4)
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradient(parameters, x, w, states, train):
        norm = jax.jit(functools.partial(function, kind, train=train))  # one program for all members
        y, states = how(norm, x, parameters, states)
        return jnp.sum(w * y), (y, states)

    for x, w, train in zip(xs, ws, CALLS, strict=True):
        (dparams, dx), (y, states) = gradient(parameters, x, w, states, train or kind != "BatchNorm")
        norm, before = functools.partial(plain, kind, train=train), batches
        exact, batches = how(norm, x, parameters, before)
        direction = jax.tree.map(lambda a: rng.normal(size=a.shape), (parameters, x))
        along = (jax.tree.map(lambda a, t, s=s: a + s * t, (parameters, x), direction) for s in (1e-5, -1e-5))
        up, down = (np.sum(w * how(norm, x, parameters, before)[0]) for parameters, x in along)
        by_functions = y, numbers(kind, states), dparams, dx
        result.append((by_functions, (exact, numbers(kind, batches), direction, (up - down) / 2e-5)))
    return result


# --- the transforms: how a step of one device, f(carried, x, w) -> (y, state, dparams, dx), is moved onto devices.
# linen carries its variables and takes jax's transforms, nnx carries the module and takes nnx's.


def jit(lib, f):
    f = lib.jit(f)
    return lambda carried, x, w: f(carried, *flat(x, w))


def jit_of_members(lib, f):
    return lib.jit(f)


def vmap(lib, f):
    """Out with None: JAX itself refuses state that is not the same for all."""
    return lib.jit(lib.vmap(f, in_axes=(None, 0, 0), out_axes=(0, None, None, 0), axis_name="devices"))


def pmap(lib, f):
    def same(a):
        np.testing.assert_array_equal(a, np.broadcast_to(a[:1], a.shape))
        return a[0]

    def call(carried, x, w):
        y, state, dparams, dx = run(carried, x, w)
        return y, *jax.tree.map(same, (state, dparams)), dx

    run = lib.pmap(f, in_axes=(None, 0, 0), axis_name="devices")
    return call


def shard_map(lib, f, devices, rows, **options):
    mesh = jax.make_mesh((devices,), ("devices",), axis_types=(AxisType.Auto,))
    f = lib.shard_map(f, mesh=mesh, in_specs=(P(), rows, rows), out_specs=(rows, P(), P(), rows), **options)
    return lib.jit(f)


def shard_map_of_batch(lib, f, **options):
    f = shard_map(lib, f, DEVICES, P("devices"), **options)
    return lambda carried, x, w: f(carried, *flat(x, w))


# Every member's batch is cut in two, one example a device.
shard_map_of_members = functools.partial(shard_map, devices=N, rows=P(None, "devices"))
unchecked = functools.partial(shard_map_of_batch, check_vma=False)


STACKED = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
ONE = {"variable_axes": {"params": None, "batch_stats": None}, "split_rngs": {"params": False}, "axis_name": "devices"}


class Layers(nn.Module):
    kind: str
    settings: dict

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(lambda norm, x: (norm(x), None), **STACKED, length=MEMBERS)
        return scan(getattr(jl, self.kind)(**self.settings), x)[0]


LIFTS = {
    "": lambda kind, settings: getattr(jl, kind)(**settings),
    "nn.remat": lambda kind, settings: nn.remat(getattr(jl, kind))(**settings),
    "nn.scan": Layers,
    "nn.vmap, shared": lambda kind, settings: nn.vmap(getattr(jl, kind), **ONE)(**settings),
    "nn.vmap, apart": lambda kind, settings: nn.vmap(getattr(jl, kind), **STACKED)(**settings),
}


def linen(lift, outer, kind, x, parameters, settings):
    """call(x, w, train) -> (y, state, dparams, dx), carrying the variables along."""

    def module(evaluate):
        return LIFTS[lift](kind, settings | ({"use_running_average": evaluate} if kind == "BatchNorm" else {}))

    @functools.cache
    def step(evaluate):
        def local(variables, x, w):
            def loss(params, x):
                y, state = module(evaluate).apply({**variables, "params": params}, x, mutable=["batch_stats"])
                return jnp.sum(w * y), (y, state)

            (dparams, dx), (y, state) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
            return y, state, jn.reduce_gradients(dparams, "devices?"), dx

        return outer(jax, local)

    x = x if lift.startswith("nn.vmap") else x.reshape(-1, H, C)
    variables = jax.jit(module(evaluate=False).init)(KEY, x)
    params = jax.tree_util.tree_map_with_path(lambda path, _: parameters[path[-1].key], variables["params"])
    assert shapes(params) == shapes(variables["params"])
    variables = {**variables, "params": params}

    def leaves(tree):
        return {path[-1]: value for path, value in traverse_util.flatten_dict(tree).items()}

    def call(x, w, train):
        nonlocal variables
        y, state, dparams, dx = step(not train and kind == "BatchNorm")(variables, x, w)
        variables = {**variables, **state}
        return y, leaves(state), leaves(dparams), dx

    return call


FORWARD = {
    "": lambda f: f,
    "nnx.remat": nnx.remat,
    "nnx.scan": nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry),
    "nnx.vmap, apart": nnx.vmap,
}


def of_nnx(lift, outer, kind, x, parameters, settings):
    """As `linen`; the module carries itself, and train() and eval() are said to it."""

    def statistics(norm):
        return nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat))

    def create(rngs):
        return getattr(jx, kind)(C, rngs=rngs, **settings)

    rngs = nnx.Rngs(0)
    norm = nnx.vmap(create)(rngs.split(MEMBERS)) if parameters["scale"].ndim > 1 else create(rngs)
    for name, value in parameters.items():
        assert getattr(norm, name).shape == value.shape
        getattr(norm, name).set_value(jnp.asarray(value))
    forward = FORWARD[lift](lambda norm, x: norm(x))

    def local(norm, x, w):
        def loss(norm, x):
            y = forward(norm, x)
            return jnp.sum(w * y), y

        (dparams, dx), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(norm, x)
        return y, statistics(norm), jn.reduce_gradients(nnx.to_pure_dict(dparams), "devices?"), dx

    step = outer(nnx, local)

    def call(x, w, train):
        norm.train() if train else norm.eval()
        y, state, *gradients = step(norm, x, w)
        jax.tree.map(np.testing.assert_array_equal, state, statistics(norm))  # what came out is what it keeps
        return y, state, *gradients

    return call


# name: (host, what it means, lift, transform around the step, how BatchNorm names the axis where one is bound)
ROWS = {
    "jax.jit": (linen, shared, "", jit, {}),
    "jax.vmap": (linen, shared, "", vmap, BY_NAME),
    "jax.pmap": (linen, shared, "", pmap, BY_NAME),
    "jax.shard_map": (linen, shared, "", shard_map_of_batch, BY_OVER),
    "jax.shard_map, check_vma=False": (linen, shared, "", unchecked, BY_NAME),
    "nn.remat": (linen, shared, "nn.remat", jit, {}),
    "nn.vmap, shared statistics": (linen, shared, "nn.vmap, shared", jit_of_members, BY_OVER),
    "nn.vmap, ensemble": (linen, apart, "nn.vmap, apart", jit_of_members, {}),
    "nn.scan over layers": (linen, layers, "nn.scan", jit, {}),
    "nnx.jit": (of_nnx, shared, "", jit, {}),
    "nnx.vmap, shared statistics": (of_nnx, shared, "", vmap, BY_OVER),
    "nnx.pmap": (of_nnx, shared, "", pmap, BY_OVER),
    "nnx.shard_map": (of_nnx, shared, "", shard_map_of_batch, BY_NAME),
    "nnx.shard_map, check_vma=False": (of_nnx, shared, "", unchecked, BY_OVER),
    "nnx.remat": (of_nnx, shared, "nnx.remat", jit, {}),
    "nnx.vmap, ensemble": (of_nnx, apart, "nnx.vmap, apart", jit_of_members, {}),
    "nnx.scan over layers": (of_nnx, layers, "nnx.scan", jit, {}),
}
# Two at a time, for the norm whose statistics cross the one while the other is around it.
NESTED = {
    "nn.remat in jax.shard_map": (linen, shared, "nn.remat", shard_map_of_batch, BY_OVER),
    "nn.scan in jax.shard_map": (linen, layers, "nn.scan", shard_map_of_batch, BY_OVER),
    "nn.vmap, ensemble in jax.shard_map": (linen, apart, "nn.vmap, apart", shard_map_of_members, BY_NAME),
    "nnx.remat in nnx.shard_map": (of_nnx, shared, "nnx.remat", shard_map_of_batch, BY_NAME),
    "nnx.scan in nnx.shard_map": (of_nnx, layers, "nnx.scan", shard_map_of_batch, BY_NAME),
    "nnx.vmap, ensemble in nnx.shard_map": (of_nnx, apart, "nnx.vmap, apart", shard_map_of_members, BY_OVER),
}
SAME = ("jax.vmap", "jax.shard_map, check_vma=False", "nnx.shard_map, check_vma=False")  # for norms that cross nothing
CASES = [(row, kind) for row in ROWS for kind in KINDS if kind == "BatchNorm" or row not in SAME]


@pytest.mark.parametrize(("row", "kind"), [*CASES, *((row, "BatchNorm") for row in NESTED)])
def test_two_training_steps_and_an_evaluation(row, kind):
    host, how, lift, outer, named = (ROWS | NESTED)[row]
    xs, ws, parameters = sample(how, kind)
    call = host(lift, outer, kind, xs[0], parameters, SETTINGS.get(kind, {}) | (named if kind == "BatchNorm" else {}))
    close = functools.partial(np.testing.assert_allclose, **TOLERANCE[how])
    for x, w, train, (ours, exact) in zip(xs, ws, CALLS, expected(how, kind), strict=True):
        y, *rest, dx = call(x, w, train)
        found = y.reshape(x.shape), *rest, dx.reshape(x.shape)
        jax.tree.map(close, found, ours)
        jax.tree.map(close, found[:2], exact[:2])
        terms = jax.tree.map(lambda g, t: (g * np.float64(t)).ravel(), found[2:], exact[2])
        terms = np.concatenate(jax.tree.leaves(terms))
        np.testing.assert_allclose(terms.sum(), exact[3], atol=1e-6 * abs(terms).sum())  # rounded one by one


@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row][-1] and "pmap" not in row and "False" not in row])
def test_shared_state_needs_synchronized_statistics(row):
    """With the name left out every member has its own state, and JAX says so where it can tell."""
    host, how, lift, outer, _ = ROWS[row]
    (x, *_), (w, *_), parameters = sample(how, "BatchNorm")
    call = host(lift, outer, "BatchNorm", x, parameters, {})
    with pytest.raises(ValueError, match=r"out_axes is None|out_specs which require replication"):
        call(x, w, True)


# --- shapes without arrays: of 32 GiB each, so that none is made on the way unseen. Then a checkpoint is put in.

HUGE = jax.ShapeDtypeStruct((1 << 20, 1 << 11, C), jnp.float32)  # and 2^31 elements in one statistic


def checkpoint(kind):
    """Parameters and statistics after two steps, the third batch, and its y in evaluation."""
    xs, _, parameters = sample(shared, kind)
    (_, (_, stats, *_)), (_, (y, *_)) = expected(shared, kind)[1:]
    return parameters | {name: value.astype(np.float32) for name, value in stats.items()}, xs[2], y


@kinds
def test_eval_shape_of_linen(kind):
    settings = SETTINGS.get(kind, {}) | ({**BY_OVER, "use_running_average": False} if kind == "BatchNorm" else {})
    module = getattr(jl, kind)(**settings)
    variables = jax.eval_shape(module.init, KEY, HUGE)
    train = jax.vmap(lambda v, x: module.apply(v, x, mutable="batch_stats"), (None, 0), (0, None), axis_name="devices")
    xs = jax.ShapeDtypeStruct((2, *HUGE.shape), HUGE.dtype)
    y, state = jax.eval_shape(train, variables, xs)
    assert y == xs
    assert {**variables, **state} == variables

    stored, x, should = checkpoint(kind)
    restored = jax.tree_util.tree_map_with_path(lambda path, _: stored[path[-1].key], variables)
    assert shapes(restored) == shapes(variables)
    evaluate = {"use_running_average": True} if kind == "BatchNorm" else {}
    y = module.clone(**evaluate).apply(restored, x.reshape(-1, H, C))
    np.testing.assert_allclose(y.reshape(x.shape), should, **CLOSE)


@kinds
def test_eval_shape_of_nnx(kind):
    def create(features):
        return getattr(jx, kind)(features, rngs=nnx.Rngs(0), **SETTINGS.get(kind, {}))

    assert nnx.eval_shape(lambda: create(1 << 36)).scale.shape == (1 << 36,)
    norm = nnx.eval_shape(lambda: create(C))
    before = nnx.to_pure_dict(nnx.state(norm))
    y, after = nnx.eval_shape(lambda norm, x: (norm(x), nnx.state(norm)), norm, HUGE)
    assert y == HUGE
    assert nnx.to_pure_dict(nnx.state(norm)) == nnx.to_pure_dict(after) == before

    stored, x, should = checkpoint(kind)
    assert shapes(stored) == shapes(before)
    for name, value in stored.items():
        getattr(norm, name).set_value(jnp.asarray(value))
    norm.eval()
    np.testing.assert_allclose(norm(x.reshape(-1, H, C)).reshape(x.shape), should, **CLOSE)
