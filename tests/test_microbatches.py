"""Gradient accumulation: running statistics once per optimizer step, and the recipe that equals the big batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

MICRO, ROWS, C = 4, 8, 3
RNG = np.random.default_rng(0)
X = RNG.normal(np.arange(MICRO)[:, None, None], 1, (MICRO, ROWS, C)).astype(np.float32)  # microbatches that differ
VALID = np.arange(MICRO * ROWS).reshape(MICRO, ROWS, 1) < MICRO * ROWS - 3  # the last one is three rows short
PARAMS = {"scale": np.linspace(0.5, 1.5, C, dtype=np.float32), "bias": np.linspace(-1, 1, C, dtype=np.float32)}
WHOLE = X.reshape(-1, C)[: MICRO * ROWS - 3].astype(np.float64)


def loss(params, x, valid):
    """The mean over all rows that count, of this microbatch's part of them; and its moments."""
    y, stats = jn.standardize(x, "n c", "n", mask=valid, **params)
    return jnp.sum(jnp.sin(y), where=valid) / len(WHOLE), stats


def micro_gradients():
    """In float64, with every microbatch's own statistics, written out: see tests/test_norms.py for the formula."""
    total = {"scale": np.zeros(C), "bias": np.zeros(C)}
    for x, valid in zip(X, VALID, strict=True):
        x = x[valid[:, 0]].astype(np.float64)
        xh = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        g = np.cos(xh * PARAMS["scale"] + PARAMS["bias"]) / len(WHOLE)
        total = {"scale": total["scale"] + (g * xh).sum(0), "bias": total["bias"] + g.sum(0)}
    return total


def accumulate(params, running, xs, valid, empty):
    """Gradients summed and moments merged over the microbatches; one update of the running statistics."""

    def one(carry, batch):
        grads, seen = carry
        more, stats = jax.grad(loss, has_aux=True)(params, *batch)
        return (jax.tree.map(jnp.add, grads, more), jn.merge(seen, stats)), None

    start = jax.tree.map(jnp.zeros_like, params), empty
    (grads, seen), _ = lax.scan(one, start, (xs, valid))
    return grads, jn.update(running, seen, momentum=0.9)


def test_in_a_scan():
    step = jax.jit(accumulate)
    grads, running = step(PARAMS, jn.running_stats(c=C), X, VALID, jn.empty_moments("c", c=C))
    np.testing.assert_allclose(running.mean, 0.1 * WHOLE.mean(0), rtol=1e-6)
    np.testing.assert_allclose(running.var, 0.9 + 0.1 * WHOLE.var(0), rtol=1e-6)  # with the part between microbatches
    assert running.num_updates == 1
    for name, want in micro_gradients().items():
        np.testing.assert_allclose(grads[name], want, atol=1e-6)


def test_in_a_scan_on_devices():
    """Microbatches of synced statistics: every device merges the same moments, so the state is replicated."""
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))

    def local(xs, running):
        def one(seen, x):
            return jn.merge(seen, jn.standardize(x, "n c", "n devices")[1]), None

        return jn.update(running, lax.scan(one, jn.empty_moments("c", c=C), xs)[0], momentum=0.9)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(None, "devices"), P()), out_specs=P())
    running = jax.jit(mapped)(X, jn.running_stats(c=C))
    np.testing.assert_allclose(running.var, 0.9 + 0.1 * X.reshape(-1, C).astype(np.float64).var(0), rtol=1e-6)


@jax.numpy_dtype_promotion("standard")  # MultiSteps itself mixes int32 and float32
def test_with_optax_multisteps():
    """The running statistics move when the parameters do, after every fourth microbatch, by the moments of all four."""
    optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=MICRO)

    @jax.jit
    def step(params, opt_state, running, seen, x, valid):
        grads, stats = jax.grad(loss, has_aux=True)(params, x, valid)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        seen = jn.merge(seen, stats)
        done = optimizer.has_updated(opt_state)
        running, seen = jax.tree.map(
            lambda new, old: jnp.where(done, new, old),
            (jn.update(running, seen, momentum=0.9), jn.empty_moments("c", c=C)),
            (running, seen),
        )
        return optax.apply_updates(params, updates), opt_state, running, seen

    params = jax.tree.map(jnp.asarray, PARAMS)
    state = params, optimizer.init(params), jn.running_stats(c=C), jn.empty_moments("c", c=C)
    updates = []
    for x, valid in zip([*X, *X], [*VALID, *VALID], strict=True):
        state = step(*state, x, valid)
        updates.append(int(state[2].num_updates))
        if len(updates) == MICRO:
            first = state
    assert updates == [0, 0, 0, 1, 1, 1, 1, 2]
    np.testing.assert_allclose(first[2].var, 0.9 + 0.1 * WHOLE.var(0), rtol=1e-6)
    for name, want in micro_gradients().items():  # MultiSteps takes the mean of the microbatches' gradients
        np.testing.assert_allclose(first[0][name], PARAMS[name] - 0.1 * want / MICRO, atol=1e-6)
    np.testing.assert_allclose(state[2].mean, (0.1 + 0.09) * WHOLE.mean(0), rtol=1e-6)


# ---------------------------------------------------------------------------------------- exactly as one big batch

DEPTH = 2
NET = [RNG.normal(size=(C, C)).astype(np.float32) for _ in range(DEPTH)]


def forward(net, stats, x, depth):
    """What the norm number `depth` is given, with the statistics of those before it."""
    for weights, moments in zip(net, stats, strict=False):
        x = jnp.tanh(jn.normalize(x @ weights, moments, "n c"))
    return x @ net[depth] if depth < len(net) else x


def whole_batch_loss(net, xs, valid):
    """Statistics of the whole batch first, one norm after the other; then each microbatch with all of them.

    Differentiated as it stands, the gradient goes through the statistics to every microbatch. `jax.checkpoint` keeps
    one microbatch's activations at a time. L norms take L + 1 passes, each deeper than the one before.
    """
    stats, count = (), jnp.sum(valid, dtype=jnp.float32)
    for depth in range(len(net)):

        @jax.checkpoint
        def one(seen, batch, stats=stats, depth=depth):
            x, valid = batch
            z = forward(net, stats, x, depth)
            return jn.merge(seen, jn.moments(z, "n c", "n", mask=valid)), None

        stats += (lax.scan(one, jn.empty_moments("c", c=net[depth].shape[1]), (xs, valid))[0],)

    @jax.checkpoint
    def last(total, batch):
        x, valid = batch
        y = forward(net, stats, x, len(net))
        return total + jnp.sum(jnp.sin(y + x), where=valid) / count, None

    return lax.scan(last, jnp.zeros(()), (xs, valid))[0]


def big_batch_loss(net, x):
    """Plain autodiff of the formula on all rows at once, in float64."""
    y = x
    for weights in net:
        z = y @ weights
        mean = z.mean(0, keepdims=True)
        y = jnp.tanh((z - mean) / jnp.sqrt(((z - mean) ** 2).mean(0, keepdims=True) + 1e-5))
    return jnp.mean(jnp.sin(y + x).sum(1))


@pytest.mark.parametrize("split", [1, 2, 4], ids=lambda k: f"{k} microbatches")
def test_the_exact_mode_equals_the_big_batch(split):
    with jax.enable_x64(True):
        want, want_grads = jax.value_and_grad(big_batch_loss)([w.astype(np.float64) for w in NET], jnp.asarray(WHOLE))
        want, want_grads = float(want), [np.asarray(g) for g in want_grads]
    xs, valid = X.reshape(split, -1, C), VALID.reshape(split, -1, 1)
    value, grads = jax.jit(jax.value_and_grad(whole_batch_loss))(NET, xs, valid)
    np.testing.assert_allclose(value, want, rtol=2e-6)
    for ours, theirs in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_the_exact_mode_keeps_one_microbatch():
    """Temporaries of the gradient: eight microbatches need less than a third of the memory of one batch of all rows."""
    rows, width = 4096, 64
    net = [RNG.normal(size=(width, width)).astype(np.float32) / 8 for _ in range(DEPTH)]

    def bytes_of(split):
        x = np.zeros((split, rows // split, width), np.float32)

        valid = np.ones((*x.shape[:2], 1), bool)
        return jax.jit(jax.grad(whole_batch_loss)).lower(net, x, valid).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(8) < bytes_of(1) / 3
