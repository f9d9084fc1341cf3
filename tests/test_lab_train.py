"""The lab's parts: the data, the nets that differ in nothing but the norm, the data-parallel step."""

import functools
import gzip
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from jaxnorm.lab import data, options, train
from jaxnorm.lab.model import Classifier

DIGITS = data.load("digits")
RATE = 0.05


def mesh(devices):
    first = jax.devices()[:devices]
    return jax.make_mesh((devices,), ("devices",), axis_types=(AxisType.Auto,), devices=first)


def model(norm="batch", local_stats=False, depth=2):
    return Classifier(norm, depth, "sigmoid", DIGITS.classes, local_stats)


@pytest.fixture(scope="module")
def trained():
    """State after two steps and what the second saw, by number of devices and kind of statistics."""

    def two_steps(devices, local_stats):
        programs = train.compiled(model("batch", local_stats), optax.sgd(RATE), mesh(devices), 64, DIGITS)
        batches = train.train_batches(DIGITS, 64, mesh(devices), seed=0, epoch=0)
        state, _ = programs.step(programs.init(jax.random.key(0)), *next(batches))
        return programs, *programs.step(state, *next(batches))

    return {(n, local): two_steps(n, local) for n, local in ((1, False), (8, False), (8, True))}


def test_synced_batch_norm_on_eight_devices_is_that_on_one(trained):
    _, one, seen_by_one = trained[1, False]
    _, eight, seen_by_eight = trained[8, False]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, eight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), seen_by_one, seen_by_eight)


def test_local_statistics_differ(trained):
    """Each device normalizes with the statistics of its eight examples, so the gradients are others."""
    synced, local = trained[8, False][2], trained[8, True][2]
    assert np.abs(synced.gradient_norms / local.gradient_norms - 1).max() > 1e-3  # 1e-6 is rounding
    rows = trained[8, True][1].stats["norm_1"]["mean"]
    assert rows.shape[0] == 8
    assert np.asarray(rows).std(axis=0).max() > 1e-4


def test_the_gradient_is_that_of_the_mean_over_the_whole_batch(trained):
    """Against plain jax.grad on one device without a map, where `devices?` is absent."""
    net = model()
    x, y = DIGITS.x[:64], DIGITS.y[:64]
    programs = trained[8, False][0]
    state = programs.init(jax.random.key(3))
    after, seen = programs.step(state, x, y)

    def mean_loss(params, stats):
        logits, changed = net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed["batch_stats"]

    params, stats = jax.device_get((state.params, state.stats))
    (loss, stats), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(params, stats)
    np.testing.assert_allclose(seen.loss, loss, rtol=1e-6)
    norms = [jnp.linalg.norm(grads[f"conv_{i}"]["kernel"].ravel()) for i in range(2)]
    np.testing.assert_allclose(seen.gradient_norms, norms, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after.params, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after.stats, stats)


def test_pooled_has_the_variance_between_the_devices():
    """Two devices with the elements -3, -1 and 1, 3: each has variance 1, together they have 5."""
    stats = {"norm_0": {"mean": jnp.array([[-2.0], [2.0]]), "var": jnp.array([[1.0], [1.0]])}}
    pooled = train.pooled(stats)["norm_0"]
    assert pooled["mean"].tolist() == [0.0]
    assert pooled["var"].tolist() == [np.var([-3, -1, 1, 3])]


@pytest.mark.parametrize("key", [(1, False), (8, False), (8, True)])
def test_scores_count_every_test_example_once(key, trained):
    """359 examples do not divide by 8. The reference is one call without a map, and no padding."""
    programs, state, _ = trained[key]
    (batch,) = train.held_out_batches(DIGITS, mesh(key[0]))
    scored = programs.evaluate(state, *batch)
    stats = train.pooled(state.stats) if key[1] else state.stats
    params, stats = jax.device_get((state.params, stats))
    logits = model().apply({"params": params, "batch_stats": stats}, DIGITS.x_test, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, DIGITS.y_test)
    assert int(scored.count) == 359
    assert int(scored.correct) == int((logits.argmax(-1) == DIGITS.y_test).sum())
    np.testing.assert_allclose(scored.loss, losses.sum(), rtol=1e-5)


def test_batches_hold_every_example_once():
    few = data.Dataset(DIGITS.x[:50], DIGITS.y[:50], DIGITS.x[:1030], DIGITS.y[:1030], 10)
    met = np.concatenate([x for x, _ in train.train_batches(few, 16, mesh(8), seed=0, epoch=0)])
    assert len(met) == 48  # whole batches only
    assert len(np.unique(met.reshape(48, -1), axis=0)) == 48
    parts = list(train.held_out_batches(few, mesh(8)))
    assert [mask.sum() for _, _, mask in parts] == [1024, 6]
    np.testing.assert_array_equal(np.concatenate([x[mask] for x, _, mask in parts]), few.x_test)


def test_orders_differ_by_seed_and_epoch():
    orders = {
        tuple(next(train.train_batches(DIGITS, 64, mesh(1), seed, epoch))[1]) for seed in range(2) for epoch in range(2)
    }  # fmt: skip
    assert len(orders) == 4


@pytest.mark.parametrize("activation", options.ACTIVATIONS)
@pytest.mark.parametrize("norm", options.NORMS)
def test_nets_differ_in_nothing_but_the_norm(norm, activation):
    x = DIGITS.x[:4]
    net = Classifier(norm, 2, activation, 10)
    variables = net.init(jax.random.key(1), x, train=False)
    plain = Classifier("none", 2, activation, 10).init(jax.random.key(1), x, train=False)["params"]
    for name in plain:
        jax.tree.map(np.testing.assert_array_equal, variables["params"][name], plain[name])
    assert ("batch_stats" in variables) == (norm == "batch")
    logits, seen = net.apply(variables, x, train=True, mutable=["batch_stats", "intermediates"])
    values = np.asarray(seen["intermediates"]["pre_activation_0"][0])
    squares = {  # what each norm makes 1, or leaves
        "batch": values.var(axis=(0, 1, 2)),
        "layer": values.var(axis=3),
        "instance": values.var(axis=(1, 2)),
        "group": values.reshape(4, -1, 4, 4).var(axis=(1, 3)),
        "rms": np.square(values).mean(axis=3),
    }
    assert np.isfinite(logits).all()
    if norm in squares:
        np.testing.assert_allclose(np.median(squares[norm]), 1, atol=0.02)
    else:
        assert abs(np.median(squares["batch"]) - 1) > 0.1


@pytest.mark.parametrize("norm", sorted(set(options.EVERY_NORM) - set(options.NORMS)))
def test_every_norm_has_its_place_in_the_net(norm):
    """A step on two devices and an evaluation can be traced; the state keeps its type, and the loss has a gradient."""
    net, optimizer = model(norm), optax.sgd(RATE)
    spec = train.State(train.SAME, train.SAME, train.SAME)
    step = jax.shard_map(
        functools.partial(train.step, net, optimizer), mesh=mesh(2), in_specs=(spec, train.EACH, train.EACH),
        out_specs=(spec, train.Seen(train.SAME, train.SAME, train.SAME, train.EACH)),
    )  # fmt: skip
    x, y = DIGITS.x[:8], DIGITS.y[:8]
    state = jax.eval_shape(lambda key: train.init(net, optimizer, x.shape[1:], 2, key), jax.random.key(0))
    after, _ = jax.eval_shape(step, state, x, y)
    assert jax.tree.map(lambda z: (z.shape, z.dtype), after) == jax.tree.map(lambda z: (z.shape, z.dtype), state)
    logits = jax.eval_shape(lambda s: net.apply({"params": s.params, "batch_stats": s.stats}, x, train=False), state)
    assert logits.shape == (8, DIGITS.classes)


def test_digits_are_scaled_and_split_once_and_for_all():
    assert (len(DIGITS.x), len(DIGITS.x_test), DIGITS.classes) == (1438, 359, 10)
    np.testing.assert_allclose([DIGITS.x.mean(), DIGITS.x.std()], [0, 1], atol=1e-5)
    again = data.load("digits")
    np.testing.assert_array_equal(DIGITS.x_test, again.x_test)
    images, _ = data.digits()
    together = np.concatenate([DIGITS.x, DIGITS.x_test]).reshape(len(images), -1)
    assert len(np.unique(together, axis=0)) == len(np.unique(images.reshape(len(images), -1), axis=0))


def test_npz_labels_are_numbered_from_0(tmp_path):
    x = np.arange(10 * 2 * 3, dtype=np.uint8).reshape(10, 2, 3)
    np.savez(tmp_path / "pets.npz", x=x, y=np.where(np.arange(10) % 2, -5, 12))
    pets = data.load(str(tmp_path / "pets.npz"))
    assert (pets.x.shape, pets.x_test.shape, pets.classes) == ((8, 2, 3, 1), (2, 2, 3, 1), 2)
    assert set(pets.y) | set(pets.y_test) == {0, 1}


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def fashion(tmp_path):
    """A folder with six training and two test pictures in MNIST's format."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("t10k", 2)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 2)
    return tmp_path


def test_fashion_mnist_keeps_its_own_split(fashion):
    loaded = data.load("fashion-mnist", fashion)
    assert (loaded.x.shape, loaded.x_test.shape) == ((6, 28, 28, 1), (2, 28, 28, 1))
    assert loaded.y.tolist() == [0, 1, 0, 1, 0, 1]
    assert loaded.y_test.tolist() == [0, 1]


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", gzip.compress(b"\0\0\x08\x01"), gzip.compress(b"no")])
def test_a_broken_fashion_file_is_named(content, fashion):
    (fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(options.BadOption, match=r"t10k-labels-idx1-ubyte.gz' that is not in MNIST's format"):
        data.load("fashion-mnist", fashion)


def test_the_rate_falls_to_zero():
    optimizer = train.sgd(0.5, steps=2)
    state = optimizer.init(jnp.zeros(1))
    rates = []
    for _ in range(3):
        update, state = optimizer.update(jnp.ones(1), state)
        rates.append(-float(update[0]))
    # velocity 1, 1.9, 2.71 times the rate 0.5, 0.25, 0
    np.testing.assert_allclose(rates, [0.5, 0.25 * 1.9, 0.0], atol=1e-7)
