"""Running statistics: what one update, two and ten of them leave, by closed formulas, and what leaves them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxnorm as jn

RNG = np.random.default_rng(7)
BATCHES = RNG.normal(2.0, 3.0, (10, 6, 2)).astype(np.float32)  # ten batches of six samples with two channels
# Up to ten updates, each of which rounds a float32 number of size 1 to 10 to 6e-8 of itself.
ROUNDING = {"rtol": 5e-7, "atol": 5e-7}


def moments(batch, **kw):
    return jn.moments(batch, "n c", "n", **kw)


def fresh():
    return jn.running_stats("c", c=2)


def after(batches, *args, **kw):
    running = fresh()
    for batch in batches:
        running = jn.update(running, moments(batch), *args, **kw)
    return running


def statistics(batches):
    """Mean and biased variance of every batch, in float64."""
    return [(b.mean(0), b.var(0)) for b in batches.astype(float)]


def unchanged(running, before):
    assert running.axes == before.axes
    jax.tree.map(np.testing.assert_array_equal, running, before)


# --- the start


def test_the_start():
    running = fresh()
    assert running.mean.tolist() == [0.0, 0.0]
    assert running.var.tolist() == [1.0, 1.0]
    assert running.num_updates == 0
    assert running.num_updates.dtype == jnp.int32
    assert running.num_updates.shape == ()
    assert running.axes == ("c",)
    wide = jn.running_stats("h c", c=3, h=2)
    assert wide.mean.shape == wide.var.shape == (2, 3)
    assert wide.axes == ("h", "c")


def test_mean_and_var_are_two_buffers():
    # donating a state whose arrays share a buffer raises in JAX
    step = jax.jit(lambda running, x: jn.update(running, moments(x)), donate_argnums=0)
    running = fresh()
    for batch in BATCHES[:2]:
        running = step(running, batch)
    expected = reference.running(statistics(BATCHES[:2]), 0.99)
    np.testing.assert_allclose(running.mean, expected[0], **ROUNDING)


# --- the rules


def test_flax_rule_to_the_bit():
    m = np.float32(0.9)
    running = after(BATCHES[:1], 0.9)
    running = jn.update(running, moments(BATCHES[1]), 0.9)
    mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    for batch in BATCHES[:2]:
        stats = moments(batch)
        # momentum * old + (1 - momentum) * new, where 1 - momentum is a Python number, as in flax.linen
        mean = m * mean + np.float32(1 - 0.9) * np.asarray(stats.mean)
        var = m * var + np.float32(1 - 0.9) * np.asarray(stats.var)
    np.testing.assert_array_equal(running.mean, mean)
    np.testing.assert_array_equal(running.var, var)
    assert running.num_updates == 2


@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0, 1.0])
def test_the_default_rule(momentum, count):
    running = after(BATCHES[:count], momentum)
    expected = reference.running(statistics(BATCHES[:count]), momentum)
    np.testing.assert_allclose(running.mean, expected[0], **ROUNDING)
    np.testing.assert_allclose(running.var, expected[1], **ROUNDING)
    assert running.num_updates == count


@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0])
def test_debias(momentum, count):
    running = after(BATCHES[:count], momentum, debias=True)
    expected = reference.running(statistics(BATCHES[:count]), momentum, debias=True)
    np.testing.assert_allclose(running.mean, expected[0], **ROUNDING)
    np.testing.assert_allclose(running.var, expected[1], **ROUNDING)
    if count == 1:  # the first update is the batch itself, to the bit
        np.testing.assert_array_equal(running.mean, moments(BATCHES[0]).mean)
        np.testing.assert_array_equal(running.var, moments(BATCHES[0]).var)


def test_debias_after_very_many_updates_is_the_default_rule():
    # 1 - momentum^T is 1 to the last bit long before num_updates could overflow the warm-up
    late = jn.RunningStats(jnp.ones(2), jnp.ones(2), jnp.int32(2**31 - 2), ("c",))
    stats = moments(BATCHES[0])
    np.testing.assert_allclose(jn.update(late, stats, debias=True).mean, jn.update(late, stats).mean, rtol=1e-6)


@pytest.mark.parametrize("momentum", [1.0, 1])
def test_debias_needs_a_momentum_below_one(momentum):
    with pytest.raises(ValueError, match="momentum"):
        jn.update(fresh(), moments(BATCHES[0]), momentum, debias=True)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, 99])
def test_momentum_is_a_part(momentum):
    with pytest.raises(ValueError, match="momentum"):
        jn.update(fresh(), moments(BATCHES[0]), momentum)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_momentum_none_is_the_plain_average(count):
    running = after(BATCHES[:count], None)
    expected = reference.running(statistics(BATCHES[:count]), None)
    np.testing.assert_allclose(running.mean, expected[0], **ROUNDING)
    np.testing.assert_allclose(running.var, expected[1], **ROUNDING)


def test_momentum_may_be_traced():
    traced = jax.jit(lambda momentum: jn.update(fresh(), moments(BATCHES[0]), momentum))(0.25)
    np.testing.assert_allclose(traced.mean, 0.75 * BATCHES[0].mean(0), **ROUNDING)


def test_unbiased():
    for momentum, kw in (0.0, {}), (None, {}), (0.9, {"debias": True}):
        running = after(BATCHES[:1], momentum, unbiased=True, **kw)
        np.testing.assert_allclose(running.var, BATCHES[0].astype(float).var(0, ddof=1), **ROUNDING)
        np.testing.assert_allclose(running.mean, BATCHES[0].astype(float).mean(0), **ROUNDING)


def test_unbiased_variance_of_one_element():
    # n - 1 is 0: var_unbiased is defined as 0 there, never 0 / 0
    one = moments(BATCHES[0][:1])
    assert one.var_unbiased.tolist() == [0.0, 0.0]
    assert one.var.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(jn.update(fresh(), one, 0.75, unbiased=True).var, [0.75, 0.75], rtol=1e-7)


# --- what leaves the state alone


@pytest.mark.parametrize(
    "kw", [{}, {"momentum": 0.0}, {"momentum": None}, {"debias": True}, {"unbiased": True}], ids=lambda kw: str(kw)
)
def test_moments_of_nothing_leave_it(kw):
    before = after(BATCHES[:2], **kw)
    masked, short = moments(BATCHES[0], mask=np.zeros((6, 1), bool)), moments(BATCHES[0][:0])
    for nothing in jn.empty_moments("c", c=2), masked, short:
        unchanged(jn.update(before, nothing, **kw), before)
        unchanged(jn.update(fresh(), nothing, **kw), fresh())


def test_nothing_then_something():
    # an empty first batch must not eat the first step of the warm-up
    running = jn.update(fresh(), jn.empty_moments("c", c=2), debias=True)
    running = jn.update(running, moments(BATCHES[0]), debias=True)
    np.testing.assert_array_equal(running.mean, moments(BATCHES[0]).mean)


def test_no_gradient_flows_into_the_state():
    def kept(x):
        running = jn.update(fresh(), moments(x), 0.5)
        _, other = jn.batch_norm(x, fresh(), momentum=0.5)
        return sum(jnp.sum(z) for z in (running.mean, running.var, other.mean, other.var))

    assert kept(BATCHES[0]) > 1
    assert not jax.grad(kept)(BATCHES[0]).any()
    _, tangent = jax.jvp(kept, (BATCHES[0],), (np.ones_like(BATCHES[0]),))
    assert tangent == 0


def test_use_and_update_are_two_calls():
    x = BATCHES[0]
    y, stats = jn.standardize(x, "n c", "n")
    for kw in {}, {"momentum": 0.5}, {"momentum": None}, {"debias": True}, {"unbiased": True}:
        z, running = jn.batch_norm(x, fresh(), "n c", "n", **kw)
        np.testing.assert_array_equal(y, z)
        unchanged(jn.update(fresh(), stats, **kw), running)
    # evaluation is normalize with the state, and changes nothing
    expected = (x - np.asarray(running.mean)) / np.sqrt(np.asarray(running.var) + 1e-5)
    np.testing.assert_allclose(jn.normalize(x, running, "n c"), expected, **ROUNDING)


# --- layouts of the state


def test_ghosts_are_merged():
    x = BATCHES[0]
    y, running = jn.batch_norm(x, fresh(), "(m n) c", "n", features="c", momentum=0.0, sizes={"m": 3})
    ghosts = x.reshape(3, 2, 2).astype(float)
    expected = (ghosts - ghosts.mean(1, keepdims=True)) / np.sqrt(ghosts.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected.reshape(6, 2), rtol=2e-6, atol=2e-6)
    # merged, not averaged: the variance of the whole batch, with the part between the ghosts
    np.testing.assert_allclose(running.mean, x.astype(float).mean(0), **ROUNDING)
    np.testing.assert_allclose(running.var, x.astype(float).var(0), **ROUNDING)
    assert running.axes == ("c",)
    kept = jn.moments(x, "(m n) c", "n", sizes={"m": 3})
    unchanged(jn.update(fresh(), kept, 0.0), running)


def test_a_state_finds_its_axes_by_name():
    x = RNG.normal(size=(4, 2, 3)).astype(np.float32)
    stats = jn.moments(x, "n h c", "n")
    turned = jn.update(jn.running_stats("c h", h=2, c=3), stats, 0.0)
    np.testing.assert_array_equal(turned.mean, stats.mean.T)
    np.testing.assert_array_equal(turned.var, stats.var.T)
    xhat = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(jn.normalize(x, turned, "n h c"), xhat, rtol=2e-6, atol=2e-6)
    # scale and bias of batch norm are laid out along what is not averaged, in the order of the layout
    scale = np.arange(6, dtype=np.float32).reshape(2, 3)
    y, running = jn.batch_norm(x, jn.running_stats("c h", h=2, c=3), "n h c", "n", scale=scale, momentum=0.0)
    np.testing.assert_allclose(y, xhat * scale, rtol=2e-6, atol=2e-6)
    unchanged(running, turned)


def test_complex_moments_give_a_complex_mean():
    x = (BATCHES[0] + 1j * BATCHES[1]).astype(np.complex64)
    running = jn.update(fresh(), moments(x), 0.5)
    assert running.mean.dtype == np.complex64
    assert running.var.dtype == np.float32
    np.testing.assert_allclose(running.mean, 0.5 * x.mean(0), **ROUNDING)
    np.testing.assert_allclose(running.var, 0.5 + 0.5 * x.var(0), **ROUNDING)


# --- types


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_type_of_the_state_stays(dtype):
    start = jn.RunningStats(jnp.zeros(2, dtype), jnp.ones(2, dtype), jnp.int32(0), ("c",))
    for kw in {}, {"momentum": None}, {"debias": True}, {"unbiased": True}:
        step = lambda running, batch, kw=kw: (jn.update(running, moments(batch), **kw), None)  # noqa: E731
        carried, _ = jax.lax.scan(step, start, BATCHES)
        assert jax.tree.map(jax.typeof, carried) == jax.tree.map(jax.typeof, start)
        assert carried.num_updates == 10
        by_hand = start
        for batch in BATCHES:
            by_hand, _ = step(by_hand, batch)
        tolerance = float(jnp.finfo(dtype).eps) * 4  # a fused multiply-add may round once less at each step
        np.testing.assert_allclose(
            np.asarray(carried.var, np.float32), np.asarray(by_hand.var, np.float32), rtol=tolerance
        )


def test_many_states_under_vmap():
    many = jax.vmap(lambda batch: jn.update(fresh(), moments(batch), 0.5))(BATCHES)
    assert many.mean.shape == (10, 2)
    assert many.num_updates.tolist() == [1] * 10
    assert many.axes == ("c",)
    np.testing.assert_allclose(many.mean, 0.5 * BATCHES.astype(float).mean(1), **ROUNDING)


def test_states_and_moments_are_pytrees_that_know_their_axes():
    for tree in fresh(), moments(BATCHES[0]):
        leaves, structure = jax.tree.flatten(tree)
        assert len(leaves) == 3
        assert jax.tree.unflatten(structure, leaves).axes == ("c",)
        other = jn.running_stats("d", d=2) if isinstance(tree, jn.RunningStats) else jn.moments(BATCHES[0], "n d", "n")
        assert jax.tree.structure(other) != structure
        with pytest.raises(AttributeError):  # frozen
            tree.mean = None


def test_a_state_built_by_hand():
    """As an importer builds it: NumPy arrays and Python numbers."""
    by_hand = jn.RunningStats(np.zeros(3, np.float32), np.ones(3, np.float32), 0, ("c",))
    batch = jn.moments(np.arange(6, dtype=np.float32).reshape(2, 3), "n c", "n")
    same = jn.update(jn.running_stats(c=3), batch, debias=True)
    np.testing.assert_array_equal(jn.update(by_hand, batch, debias=True).mean, same.mean)
    assert jn.merge(jn.Moments(2.0, batch.mean, batch.m2, ("c",)), batch).count.tolist() == [4.0] * 3


def test_float64_state_is_averaged_in_float64():
    with jax.enable_x64(True):
        running = jn.RunningStats(jnp.zeros(1, jnp.float64), jnp.ones(1, jnp.float64), jnp.zeros((), jnp.int32), ("c",))
        for value in range(1, 6):
            batch = jn.moments(jnp.full((2, 1), float(value), jnp.float64), "n c", "n")
            running = jn.update(running, batch, momentum=None)
        np.testing.assert_allclose(running.mean, [3.0], rtol=1e-15)
