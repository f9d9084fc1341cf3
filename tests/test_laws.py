"""Laws, for inputs that hypothesis picks: moments are a commutative monoid, and a layout is only a way of writing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxnorm as jn

# No deadline: the first example of a shape compiles. A fixed seed: what fails for one fails for everybody.
laws = settings(max_examples=30, deadline=None, derandomize=True)
layouts = settings(laws, max_examples=12)  # here every example compiles

merge = jax.jit(jn.merge)
measure = jax.jit(functools.partial(jn.moments, layout="n c", over="n"), static_argnames="center")

seeds = st.integers(0, 2**32 - 1)
means = st.sampled_from([0.0, 10.0, 1e3])


def elements(seed, shape, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1.0, shape).astype(np.float32)


def any_moments(seed, mean=0.0, channels=3):
    """Moments along c of up to six elements a channel, none in some, with weights."""
    rng = np.random.default_rng(seed)
    weights = (rng.uniform(0.1, 2.0, (6, channels)) * rng.integers(0, 2, (6, channels))).astype(np.float32)
    return measure(elements(seed, (6, channels), mean), weights=weights * rng.integers(0, 2, channels))


def equal(a, b):
    """Equal as statistics: float32 rounding of a mean near 1e3 and of sums of up to 20 squares of size 1.

    A mean is off by a unit in its last place, 1.2e-7 of it; each square of a difference of two such means by twice that
    times the difference, 1e-3 at mean 1e3.
    """
    assert a.axes == b.axes
    size = 1 + float(np.abs(a.mean).max(initial=0))
    np.testing.assert_allclose(a.count, b.count, rtol=1e-6)
    np.testing.assert_allclose(a.mean, b.mean, rtol=0, atol=5e-7 * size)
    np.testing.assert_allclose(a.m2, b.m2, rtol=1e-5, atol=5e-6 * size)


@laws
@given(st.tuples(seeds, seeds, seeds), means)
def test_merge_is_associative_and_commutative(three, mean):
    a, b, c = (any_moments(seed, mean) for seed in three)
    equal(merge(merge(a, b), c), merge(a, merge(b, c)))
    for order in itertools.permutations((a, b, c)):
        equal(merge(*order), merge(a, merge(b, c)))


@laws
@given(seeds, means)
def test_merge_has_a_neutral_element(seed, mean):
    a, empty = any_moments(seed, mean), jn.empty_moments("c", c=3)
    z = (elements(seed, (6, 3), mean) + 1j * elements(seed + 1, (6, 3))).astype(np.complex64)
    for other in measure(z), measure(z.real, center=False):
        jax.tree.map(np.testing.assert_array_equal, merge(empty, other), other)
    for merged in merge(a, empty), merge(empty, a), merge(empty, a, empty), merge(a):
        jax.tree.map(np.testing.assert_array_equal, merged, a)  # to the bit


@laws
@given(seeds, seeds)
def test_merge_goes_by_name(one, two):
    a, b = (jn.moments(elements(seed, (4, 2, 3)), "n h c", "n") for seed in (one, two))
    turned = jn.Moments(b.count.T, b.mean.T, b.m2.T, ("c", "h"))
    jax.tree.map(np.testing.assert_array_equal, merge(a, turned), merge(a, b))


@laws
@given(seeds, means, st.lists(st.integers(0, 7), max_size=3), st.sets(st.sampled_from(["mask", "weights"])))
def test_any_split_of_a_batch_is_the_batch(seed, mean, cuts, kinds):
    rng = np.random.default_rng(seed)
    x, mask = elements(seed, (7, 2), mean), rng.random((7, 2)) < 0.6
    weights = rng.uniform(0.1, 2.0, (7, 2)).astype(np.float32)
    kw = {"mask": mask, "weights": weights}
    kw = {name: kw[name] for name in kinds}
    whole = measure(x, **kw)
    bounds = [0, *sorted(cuts), 7]
    pieces = [slice(*pair) for pair in itertools.pairwise(bounds)]  # some of them empty
    parts = [measure(x[piece], **{k: v[piece] for k, v in kw.items()}) for piece in pieces]
    equal(merge(*parts), whole)
    shards = [(x[piece], *(kw[k][piece] if k in kw else None for k in ("mask", "weights"))) for piece in pieces]
    stats = reference.pool(shards, "n c", "n")
    equal(jn.Moments(*(jnp.asarray(z, jnp.float32) for z in stats[:3]), axes=("c",)), whole)


@layouts
@given(seeds, st.permutations("nhwc"), st.sets(st.sampled_from("nhwc"), min_size=1), st.sampled_from("nhwc"))
def test_a_permuted_layout_permutes_the_result(seed, order, over, features):
    sizes = {"n": 2, "h": 3, "w": 2, "c": 4}
    x, scale = elements(seed, tuple(sizes.values())), elements(seed + 1, sizes[features])
    kw = {"scale": scale, "features": features}
    y, stats = jn.standardize(x, "n h w c", " ".join(sorted(over)), **kw)
    turned = np.transpose(x, ["nhwc".index(name) for name in order])
    z, moments = jn.standardize(turned, " ".join(order), tuple(over), **kw)
    # The same sums in another order: at most 48 numbers of size 1, each rounded to 6e-8.
    np.testing.assert_allclose(np.transpose(z, [order.index(name) for name in "nhwc"]), y, rtol=3e-6, atol=3e-6)
    assert moments.axes == tuple(name for name in order if name not in over)
    assert stats.axes == tuple(name for name in "nhwc" if name not in over)
    back = [moments.axes.index(name) for name in stats.axes]
    np.testing.assert_allclose(np.transpose(moments.m2, back), stats.m2, rtol=3e-6, atol=1e-6)


@layouts
@given(seeds, st.sampled_from([1, 2, 3, 6]), st.sets(st.sampled_from(["n", "a", "b", "c"]), min_size=1), st.booleans())
def test_a_composed_layout_is_a_reshape(seed, a, over, whole):
    x = elements(seed, (2, 6, 3))
    parts = {"layout": "n a b c", "over": " ".join(sorted(over)), "features": "a b"}
    scale = elements(seed + 1, (a, 6 // a))
    y, stats = jn.standardize(x.reshape(2, a, 6 // a, 3), scale=scale, **parts)
    parts |= {"layout": "n (a b) c", "sizes": {"a": a}}
    if whole:  # scale along the dimension as it stands in x
        parts["features"], scale = "(a b)", scale.reshape(6)
    z, moments = jn.standardize(x, scale=scale, **parts)
    np.testing.assert_array_equal(z, np.reshape(y, x.shape))
    jax.tree.map(np.testing.assert_array_equal, moments, stats)
    assert moments.axes == stats.axes


@layouts
@given(seeds, st.integers(0, 3), st.sampled_from(["c", "...", "... c"]))
def test_dots_are_any_number_of_dimensions(seed, dots, over):
    x = elements(seed, (*(2, 3, 1)[:dots], 4))
    if dots == 0 and over == "...":
        over = "c"  # nothing else is there to average
    y, stats = jn.standardize(x, "... c", over)
    names = "n h w"[: 2 * dots - 1] if dots else ""
    z, moments = jn.standardize(x, f"{names} c", over.replace("...", names))
    np.testing.assert_array_equal(y, z)
    for name in "count", "mean", "m2":
        np.testing.assert_array_equal(getattr(stats, name), getattr(moments, name))
