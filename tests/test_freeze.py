"""Freezing the scale and bias of a norm, or its statistics; and back, without loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from freezing import Model, Net, X, as_users_run, bits, variables  # noqa: F401

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx

# --- scale and bias

OPTIMIZERS = {
    "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.1, weight_decay=0.1),
    "lamb": optax.lamb(0.1, weight_decay=0.1),
    "adafactor": optax.adafactor(0.1, weight_decay_rate=0.1),
}


def trained(tx, labels):
    return optax.multi_transform({"trained": tx, "frozen": jn.tools.frozen()}, labels)


def steps(tx, params, number, start=None):
    """Ten steps in one program."""

    def loss(params, i):
        y, _ = Net().apply({"params": params, **stats}, X + i, mutable=["batch_stats"])
        return jnp.sin(y).sum()

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, i), state, params)
        return (optax.apply_updates(params, updates), state), None

    stats = {"batch_stats": variables()["batch_stats"]}
    carry = params, tx.init(params) if start is None else start
    return jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(float(number)))[0])(carry)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_layer_does_not_move_by_a_bit(name):
    """Ten steps, with weight decay and a global clip outside; the rest moves."""
    params = variables()["params"]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), trained(OPTIMIZERS[name], jn.tools.freeze_affine(params, ["a/*", "ln"]))
    )
    new, _ = steps(tx, params, 10)
    for frozen in (("a", "bn"), ("ln",)):
        assert bits(functools.reduce(dict.get, frozen, new)) == bits(functools.reduce(dict.get, frozen, params))
    for moved in (("a", "dense"), ("b", "bn"), ("b", "dense")):
        for old, z in zip(*(jax.tree.leaves(functools.reduce(dict.get, moved, t)) for t in (params, new)), strict=True):
            assert (old != z).any()


def test_freezing_ends_without_loss():
    """Frozen for three steps and then trained: what plain SGD gives from the same point."""
    params = variables()["params"]
    frozen, _ = steps(trained(optax.sgd(0.1), jn.tools.freeze_affine(params)), params, 3)
    assert bits(frozen["a"]["bn"]) == bits(params["a"]["bn"])
    on = trained(optax.sgd(0.1), jax.tree.map(lambda _: "trained", params))
    assert bits(steps(on, frozen, 3)[0]) == bits(steps(optax.sgd(0.1), frozen, 3)[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_frozen_moves_no_number(dtype):
    """x + -0.0 is x for every x. With 0.0, which optax.set_to_zero adds, -0.0 becomes 0.0."""
    x = jnp.array([-0.0, 0.0, jnp.inf, -jnp.inf, jnp.nan, 1.0, -3e4, 6.2e-5], dtype)
    x = -x if dtype == jnp.complex64 else x  # with -0.0 in imaginary parts
    moved = []
    for tx in (jn.tools.frozen(), optax.set_to_zero()):
        step = lambda x: optax.apply_updates(x, tx.update(jnp.ones_like(x), tx.init(x), x)[0])  # noqa: E731, B023
        moved.append(bits(step(x)) != bits(x))
    assert moved == [False, True]
    assert bits(jax.jit(step)(x[5:])) == bits(x[5:])


def test_labels():
    params = {"dense": {"kernel": X}, "bn": {"scale": X[0], "bias": X[0]}, "ln": {"scale": X[0]}}
    labels = jn.tools.freeze_affine(params, lambda norm: norm.kind == "scale")
    assert labels == {
        "dense": {"kernel": "trained"}, "bn": {"scale": "trained", "bias": "trained"}, "ln": {"scale": "frozen"},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"jaxnorm.tools.freeze_affine: where='c' matches no norm"):
        jn.tools.freeze_affine(params, "c")
    with pytest.raises(ValueError, match=r"jaxnorm.tools.freeze_affine: there is no norm to freeze"):
        jn.tools.freeze_affine(params["dense"])


@pytest.mark.parametrize("whole", [False, True], ids=["function", "tree"])
def test_a_frozen_layer_in_nnx(whole):
    model = Model()
    state = nnx.state(model, nnx.Param)
    before = bits(state["bns"][0]), bits(state["bns"][1]), bits(state["dense"])
    labels = functools.partial(jn.tools.freeze_affine, where="bns/0")
    optimizer = nnx.Optimizer(
        model, trained(optax.adamw(0.1, weight_decay=0.1), labels(state) if whole else labels), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sin(model(X)).sum())(model))

    for _ in range(10):
        step(model, optimizer)
    state = nnx.state(model, nnx.Param)
    assert bits(state["bns"][0]) == before[0]
    assert bits(state["bns"][1]) != before[1]
    assert bits(state["dense"]) != before[2]


# --- statistics


def update(v, x=X):
    return Net().apply(v, x, mutable=["batch_stats"])[1]


def test_freeze_stats():
    v = variables()
    new = update(v)
    got = jn.tools.freeze_stats(v, new, "a/*")["batch_stats"]  # from all variables, into the statistics alone
    assert bits(got["a"]) == bits(v["batch_stats"]["a"])
    assert bits(got["b"]) == bits(new["batch_stats"]["b"])
    assert bits(got["b"]) != bits(v["batch_stats"]["b"])
    alone = jn.tools.freeze_stats(v["batch_stats"], new["batch_stats"], lambda norm: norm.path == "a/bn")
    assert bits(alone) == bits(got)
    whole = jn.tools.freeze_stats(v, {**v, **new})
    assert bits(whole) == bits(v)
    assert jax.tree.structure(whole) == jax.tree.structure({**v, **new})


def test_freezing_statistics_ends_without_loss():
    """Frozen in steps 1 and 2 they are as if the model had met the batch of step 3 alone: 0.5 old + 0.5 batch."""
    v = variables()
    for i in range(3):
        new = update(v, X + i)
        v = {**v, **(jn.tools.freeze_stats(v, new) if i < 2 else new)}
    dense = v["params"]["a"]["dense"]
    z = (X + 2).astype(np.float64) @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"], np.float64)
    old = variables()["batch_stats"]["a"]["bn"]
    np.testing.assert_allclose(v["batch_stats"]["a"]["bn"]["mean"], 0.5 * old["mean"] + 0.5 * z.mean(0), rtol=1e-5)
    np.testing.assert_allclose(v["batch_stats"]["a"]["bn"]["var"], 0.5 * old["var"] + 0.5 * z.var(0), rtol=1e-5)


def test_freeze_stats_in_other_trees():
    model = Model()
    old = nnx.as_pure(nnx.state(model))
    model(X)
    new = nnx.as_pure(nnx.state(model))
    got = jn.tools.freeze_stats(old, new, "bns/1")
    assert isinstance(got, nnx.State)
    with pytest.raises(ValueError, match="old and new hold the same nnx Variables"):
        jn.tools.freeze_stats(nnx.state(model), nnx.state(model))
    assert bits(got["bns"][1]) == bits(old["bns"][1])
    assert bits(got["bns"][0]) == bits(new["bns"][0]) != bits(old["bns"][0])
    torch = {"1.weight": X[0], "1.running_mean": X[1], "1.running_var": X[2], "1.num_batches_tracked": np.array(1)}
    later = {name: z + 1 for name, z in torch.items()}
    got = jn.tools.freeze_stats(torch, later)
    assert {name for name in torch if got[name] is torch[name]} == set(torch) - {"1.weight"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"ln": {"scale": X[0]}}, {"ln": {"scale": X[0]}}, "there are no running statistics: see find_norms."),
        ({}, {"bn": jn.running_stats(c=2)}, "old has no mean of 'bn'."),
        (
            {"bn": jn.running_stats(c=3)},
            {"bn": jn.running_stats(c=2)},
            "mean of 'bn' is float32[3] in old, float32[2] in new.",
        ),
    ],
)
def test_wrong_statistics(old, new, message):
    with pytest.raises(jn.errors.ArgumentError) as error:
        jn.tools.freeze_stats(old, new)
    assert str(error.value) == f"jaxnorm.tools.freeze_stats: {message}"
