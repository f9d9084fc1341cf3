"""Corners that a review found: poison beside weights, empty statistics, layouts without examples, zero variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm as jn


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e38])
def test_masked_slots_and_the_gradient_of_weights(poison):
    """What stands in a masked slot, of x or of the weights, reaches no gradient of either."""
    x = np.random.default_rng(5).normal(size=(6, 3)).astype(np.float32)
    weights, mask = np.linspace(0.5, 2, 6, dtype=np.float32)[:, None], np.arange(6)[:, None] != 0

    def gradients(x, weights):
        def loss(x, weights):
            y, stats = jn.standardize(x, "n c", "n", mask=mask, weights=weights)
            return jnp.sum(jnp.where(mask, jnp.sin(y), 0)) + jnp.sum(stats.m2)

        return jax.jit(jax.grad(loss, (0, 1)))(x, weights)

    clean = gradients(x, weights)
    x[0] = poison
    for got, want in zip(gradients(x, weights), clean, strict=True):
        np.testing.assert_array_equal(got, want)
    weights[0] = poison
    for got, want in zip(gradients(x, weights), clean, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("dtype", "epsilon"), [(np.float16, 1e-6), (np.float32, 0.0)])
def test_everything_masked_is_finite_at_the_edges(dtype, epsilon):
    y = jn.layer_norm(np.full((2, 4), 300, dtype), mask=np.zeros((2, 4), bool), epsilon=epsilon)
    assert np.isfinite(y).all()


def test_group_norm_leaves_the_examples_apart():
    x = np.random.default_rng(6).normal(size=(4, 6)).astype(np.float32)
    for layout, features in (("c n", "c"), ("... c", "c")):
        with pytest.raises(jn.LayoutError, match="leaves the first name"):
            jn.group_norm(x, 2, layout, features=features)


def test_evaluation_has_the_features_of_training():
    """Channels first: batch_norm and normalize with its state take scale along c, though w is the last name."""
    x = np.random.default_rng(7).normal(size=(4, 3, 3, 3)).astype(np.float32)
    scale = np.array([1, 10, 100], np.float32)
    y, running = jn.batch_norm(x, jn.running_stats(c=3), "n c h w", "n h w", scale=scale, momentum=0.0)
    np.testing.assert_allclose(jn.normalize(x, running, "n c h w", scale=scale), y, rtol=1e-5, atol=1e-5)


def test_std_has_a_gradient_where_it_is_zero():
    gradient = jax.grad(lambda x: jn.moments(x, "n c", "n").std.sum())(jnp.ones((4, 2)))
    np.testing.assert_array_equal(gradient, np.zeros((4, 2)))
