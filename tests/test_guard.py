"""What must be said instead of a silent number: batches of one, statistics that are none, masks, missing collections.

What the norms themselves say of shapes stands here for the Flax modules, and word for word in test_errors.py for the
functions; what only values tell is jaxnorm.tools.guard.
"""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modules import HOSTS

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.errors import ArgumentError

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(1.0, 2.0, (8, 4)).astype(np.float32)
ONE = X[:1]
MESH = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))


def said(call, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


def linen(x=X, init=X, **settings):
    """A call in training of a batch norm that lies in a model."""
    model = nn.Sequential([jaxnorm.linen.BatchNorm(use_running_average=False, **settings)])
    variables = model.init(KEY, init)
    return model.apply(variables, x, mutable=["batch_stats"])


def module(x=X, **settings):
    return jaxnorm.nnx.BatchNorm(4, rngs=nnx.Rngs(0), **settings)(x)


modules = pytest.mark.parametrize(
    ("call", "name"), [(linen, "linen.BatchNorm 'layers_0'"), (module, "nnx.BatchNorm")], ids=["linen", "nnx"]
)

# --- a batch of one (PEERS.md, row 18)

WAY_OUT = (
    "\n  Train on more examples; or name the mapped axis along which they lie in over (Flax: axis_name); or normalize "
    "with the running statistics (use_running_average=True); or take group_norm."
)


@modules
def test_batch_of_one_in_a_module(call, name):
    assert said(lambda: call(ONE), ArgumentError) == (
        f"jaxnorm.{name}: every statistic would be of one element, y bias and the running variance 0.\n"
        '  layout "d0 d1", over "d0", x.shape (1, 4)\n  mapped axes bound here: none' + WAY_OUT
    )
    jitted = said(lambda: jax.eval_shape(call, jax.ShapeDtypeStruct((1, 4), jnp.float32)))
    assert jitted == said(lambda: call(ONE))  # from shapes alone
    assert "mapped axes bound here: devices" in said(lambda: jax.vmap(call, axis_name="devices")(X))


def test_initialisation_takes_one_example():
    model = jaxnorm.linen.BatchNorm(use_running_average=False)
    assert model.init_with_output(KEY, ONE)[0].tolist() == [[0.0] * 4]  # as Flax: its own statistics
    renorm = jaxnorm.linen.BatchRenorm(use_running_average=False)
    np.testing.assert_allclose(renorm.init_with_output(KEY, ONE)[0], ONE / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("where", ["vmap", "shard_map"])
def test_examples_on_mapped_axes_count(where):
    """One example a device is a batch of eight where the axis is named, and one of one where it is not."""

    def train(over, groups=None):
        def local(x):
            return jn.batch_norm(x.reshape(1, 4), jn.running_stats(c=4), "n c", over, groups=groups)[0]

        if where == "vmap":
            return jax.vmap(local, axis_name="devices")(X).reshape(8, 4)
        return jax.jit(jax.shard_map(local, mesh=MESH, in_specs=P("devices"), out_specs=P("devices")))(X)

    z = X.astype(np.float64)
    np.testing.assert_allclose(train("n devices"), (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5), rtol=1e-4, atol=1e-5)
    assert "every statistic would be of one element" in said(lambda: train("n"))
    train("n devices", {"devices": [[0, 1], [2, 3, 4], [5, 6, 7]]})
    assert "every statistic would be of one element" in said(
        lambda: train("n devices", {"devices": [[0], list(range(1, 8))]})
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda x, r: jn.batch_norm(x, r),
        lambda x, r: jn.batch_renorm(x, r),
        lambda x, r: jn.streaming_norm(x, r),
        lambda x, r: jn.ghost_batch_norm(np.repeat(x, 3, 0), r, 3),
        lambda x, r: jn.split_batch_norm(x, {"a": r}, "a"),
        lambda x, r: jn.switchable_norm(x, r, jnp.ones(3), jnp.ones(3)),
        lambda x, r: jn.batch_channel_norm(x, r, 2),
        lambda x, r: jn.evo_norm_b0(x, r),
        lambda x, r: jn.conditional_batch_norm(x, r, jnp.array([0]), scale=jnp.ones((2, 4))),
        lambda x, r: jn.decorrelated_batch_norm(x, jn.running_covariance(2, c=4)),
        lambda x, r: jn.iterative_norm(x, jn.running_covariance(2, c=4)),
    ],
)
def test_batch_of_one_in_a_function(call):
    running = jn.running_stats(c=4)
    assert "every statistic would be of one element" in said(lambda: jax.eval_shape(call, ONE, running), ArgumentError)
    jax.eval_shape(call, X[:1, None].repeat(2, 1), running)  # one example of two places


def test_what_needs_no_batch_takes_one():
    running, reference = jn.running_stats(c=4), jn.moments(X)
    np.testing.assert_allclose(jn.normalize(ONE, running), ONE / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(jn.frozen_batch_norm(ONE, running), ONE / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert jn.standardize(ONE)[1].count.tolist() == [1.0] * 4  # who asks for it gets it
    assert jn.layer_norm(ONE).shape == jn.virtual_batch_norm(ONE, reference).shape == ONE.shape
    _, none = jn.batch_norm(X[:0], running)  # of no element: nothing moves
    assert none.var.tolist() == [1.0] * 4


# --- an axis that is bound to nothing (row 21)


@modules
@pytest.mark.parametrize("how", [{"axis_name": "batch"}, {"layout": "d0 d1", "over": "d0 batch"}], ids=min)
def test_unbound_axis_in_a_module(call, name, how):
    assert said(lambda: call(**how), jn.AxisError) == (
        f"""jaxnorm.{name}: 'batch' in over is neither a dimension of the layout nor a mapped axis.
  over "d0 batch"
           ^^^^^
  layout "d0 d1", over "d0 batch", x.shape (8, 4)
  mapped axes bound here: none
  Put the call under vmap(..., axis_name='batch'), pmap or shard_map, or write 'batch?' to skip the axis where it is """
        "absent. Under jit over sharded arrays leave it out: statistics are global there."
    )


# --- masks


@pytest.mark.parametrize("host", HOSTS)
def test_wrong_masks_in_a_module(host):
    def call(mask, x=X):
        if host == "nnx":
            return jaxnorm.nnx.BatchNorm(4, rngs=nnx.Rngs(0))(x, mask=mask)
        norm = jaxnorm.linen.BatchNorm(use_running_average=False)
        return norm.init_with_output(KEY, x, mask=mask)[0]

    assert "mask of shape (8,) does not broadcast to x" in said(lambda: call(np.ones(8, bool)), jn.LayoutError)
    assert "mask of shape (8, 3) does not" in said(lambda: call(np.ones((8, 3), bool)), jn.LayoutError)
    assert "mask has dtype float32: pass how much" in said(lambda: call(np.ones((8, 1), np.float32)), jn.LayoutError)
    square = X[:4]
    mask = np.array([True, True, True, False])
    text = said(lambda: call(mask, square), jn.LayoutError)  # of examples, or of channels?
    assert "mask of shape (4,) fits the first dimensions of x, and the last ones too." in text
    z = square.astype(np.float64)
    got = call(mask[:, None], square)
    np.testing.assert_allclose(got, (z - z[:3].mean(0)) / np.sqrt(z[:3].var(0) + 1e-5), rtol=1e-4, atol=1e-5)
    got = call(mask[None, :], square)[:, :3]  # as written: a channel that does not count
    np.testing.assert_allclose(got, ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5))[:, :3], rtol=1e-4, atol=1e-5)


def test_masks_and_weights_that_fit_twice_in_functions():
    square, cube = X[:4], np.ones((3, 3, 3), np.float32)
    for name in ("mask", "weights"):
        kind = bool if name == "mask" else np.float32
        for call in (
            lambda z: jn.moments(square, "n c", "n", **z),
            lambda z: jn.batch_norm(square, jn.running_stats(c=4), **z),
            lambda z: jn.standardize(square, "(m n) c", "n", sizes={"m": 2}, **z),
        ):
            assert f"{name} of shape (4,) fits the first" in said(lambda: call({name: np.ones(4, kind)}))  # noqa: B023
        assert "fits the first" in said(lambda: jn.moments(cube, "n t c", "t", **{name: np.ones((3, 3), kind)}))  # noqa: B023
    mask = np.array([True, False, True, True])
    want = square.astype(np.float64)[:, mask]
    got = jn.layer_norm(square, mask=mask)[:, mask]  # over c, examples mean nothing: as in Flax the last dimension
    mean, var = want.mean(1, keepdims=True), want.var(1, keepdims=True)
    np.testing.assert_allclose(got, (want - mean) / np.sqrt(var + 1e-6), rtol=1e-4, atol=1e-5)
    assert jn.batch_norm(square, jn.running_stats(c=4), mask=np.array(True))[1].num_updates == 1
    assert jn.batch_norm(X, jn.running_stats(c=4), mask=mask)[1].mean[1] == 0.0  # 8 examples: it can be one thing only


# --- statistics that are missing


class Net(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train=False):
        more = {"GhostBatchNorm": {"num_ghosts": 2}, "DecorrelatedBatchNorm": {"group_size": 2}}
        settings = more.get(self.norm.__name__, {})
        return self.norm(use_running_average=not train, **settings, name="bn")(x)


@pytest.mark.parametrize("kind", ["BatchNorm", "GhostBatchNorm", "FrozenBatchNorm", "DecorrelatedBatchNorm"])
def test_missing_statistics_in_linen(kind):
    model = Net(getattr(jaxnorm.linen, kind))
    params = {"params": model.init(KEY, X)["params"]}
    for mutable in (False, ["batch_stats"]):  # Flax evaluates with mean 0 and var 1 where they are mutable
        text = said(lambda: model.apply(params, X, mutable=mutable), ArgumentError)  # noqa: B023
        assert text.startswith(f"jaxnorm.linen.{kind} 'bn': there are no batch_stats of this layer: apply takes {{")
        assert "recalibrate" in text


def test_training_may_start_statistics_as_in_flax():
    for norm in (jaxnorm.linen.BatchNorm, nn.BatchNorm):
        model = Net(norm)
        params = {"params": model.init(KEY, X)["params"]}
        with jax.numpy_rank_promotion("allow"):  # Flax's
            _, state = model.apply(params, X, train=True, mutable=["batch_stats"])
        mean = state["batch_stats"]["bn"]["mean"]
        np.testing.assert_allclose(mean, 0.01 * X.astype(np.float64).mean(0), rtol=1e-5)


# --- jaxnorm.tools.check_stats


def stats(mean=0.5, var=2.0, **more):
    return {"block": {"bn": {"mean": jnp.full(3, mean), "var": jnp.full(3, var), **more}, "ln": {"scale": jnp.ones(3)}}}


NEVER = "the running statistics of 'block/bn' were never updated: train, load or measure them (recalibrate)."
STATS = [
    (stats(0.0, 1.0), NEVER),
    (stats(0.0, 1.0, num_updates=jnp.array(0)), NEVER),
    (stats(0.0, 1.0, num_updates=jnp.array(1)), None),
    (stats(0.0, 2.0), None),
    (stats(0.5, 1.0), None),
    (stats(0.5, 2.0, num_updates=jnp.array(0)), None),  # loaded into a model that counts
    (stats(jnp.nan), "mean of 'block/bn' is not finite."),
    (stats(0.5, jnp.inf), "var of 'block/bn' is not finite."),
    (stats(0.5, -0.25), "a var of 'block/bn' is -0.25, and no variance is negative."),
]


@pytest.mark.parametrize(("tree", "message"), STATS)
def test_check_stats(tree, message):
    def program(tree, x):
        jn.tools.check_stats(tree)
        return 2 * x

    error, y = jax.jit(checkify.checkify(program))(tree, jnp.ones(2))
    assert y.tolist() == [2.0, 2.0]
    if message is None:
        jn.tools.check_stats(tree)
        error.throw()
    else:
        assert said(lambda: jn.tools.check_stats(tree), ArgumentError) == f"jaxnorm.tools.check_stats: {message}"
        assert message in error.get()


def test_check_stats_names_every_layer_once():
    tree = {"a": jn.running_stats(c=2), "b": jn.running_stats(c=2)}
    text = said(lambda: jn.tools.check_stats(tree))
    assert text.count("never updated") == 2
    assert "'a'" in text
    assert "'b'" in text
    assert "'a'" not in said(lambda: jn.tools.check_stats(tree, "b"))
    assert "no running statistics" in said(lambda: jn.tools.check_stats({"ln": {"scale": jnp.ones(2)}}))


def test_check_stats_reads_every_framework():
    model = nnx.Sequential(jaxnorm.nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    assert "'layers/0' were never updated" in said(lambda: jn.tools.check_stats(nnx.state(model)))
    model(X)
    jn.tools.check_stats(nnx.state(model))
    norm = jaxnorm.linen.DecorrelatedBatchNorm(group_size=2, use_running_average=False)
    variables = norm.init(KEY, X)
    assert "never updated" in said(lambda: jn.tools.check_stats(variables))
    jn.tools.check_stats(norm.apply(variables, X, mutable=["batch_stats"])[1])
    net = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, True))
    with jax.numpy_rank_promotion("allow"):  # haiku's
        params, state = net.init(KEY, X)
        state = jax.tree.map(jnp.zeros_like, state)  # Haiku updates in init too
        assert "'batch_norm' were never updated" in said(lambda: jn.tools.check_stats((params, state)))
        jn.tools.check_stats(net.apply(params, state, None, X)[1])


def test_checks_in_jit_need_checkify():
    """JAX says so: nothing passes unchecked."""
    assert "checkify" in said(lambda: jax.jit(jn.tools.check_stats)(jn.running_stats(c=2)))


def test_checks_cost_nothing_where_they_are_not():
    plain = str(jax.make_jaxpr(lambda x, r: jn.normalize(x, r))(X, jn.running_stats(c=4)))
    assert "check" not in plain
    training = str(jax.make_jaxpr(lambda x, r: jn.batch_norm(x, r))(X, jn.running_stats(c=4)))
    assert "check" not in training.replace("checkpoint", "")


# --- jaxnorm.tools.check_moments


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        ([8, 8, 8, 8], None),
        ([8, 2, 3, 8], None),
        ([8, 1, 8, 8], "the least count of 'bn' is 1: statistics need more elements."),
        ([8, 8, 0, 1], "the least count of 'bn' is 0: statistics need more elements."),
    ],
)
def test_check_moments(valid, message):
    mask = np.arange(8)[:, None] < np.array(valid)[None]

    def program(mask):
        seen = {"bn": {"moments": jn.moments(X, mask=mask)}}
        jn.tools.check_moments(seen)
        return seen

    error, seen = jax.jit(checkify.checkify(program))(mask)
    if message is None:
        jn.tools.check_moments(seen)
        error.throw()
    else:
        assert said(lambda: jn.tools.check_moments(seen), ArgumentError) == f"jaxnorm.tools.check_moments: {message}"
        least = str(float(min(valid)))
        assert f"the least count of 'bn' is {least}: statistics need more" in error.get()


def test_check_moments_of_a_model():
    """A mask that leaves one example, in a model in training: what the batch norm saw says so, by its name."""
    model = nn.Sequential([jaxnorm.linen.BatchNorm(use_running_average=False)])
    variables = model.init(KEY, X)
    mask = np.arange(8)[:, None] == 3

    def seen(mask):
        norm = jaxnorm.linen.BatchNorm(use_running_average=False)
        own = {name: tree["layers_0"] for name, tree in variables.items()}
        return {"bn": norm.apply(own, X, mask=mask, mutable=["batch_stats", "moments"])[1]["moments"]}

    assert "the least count of 'bn' is 1" in said(lambda: jn.tools.check_moments(seen(mask)))
    jn.tools.check_moments(seen(~mask))
    _, state = model.apply(variables, X, mutable=["batch_stats", "moments"])
    jn.tools.check_moments(state["moments"])
    assert "there are no Moments" in said(lambda: jn.tools.check_moments(variables))


# --- jaxnorm.tools.check_complete


def test_check_complete():
    model = Net(jaxnorm.linen.BatchNorm)
    like = jax.eval_shape(model.init, KEY, X)
    variables = model.init(KEY, X)
    jn.tools.check_complete(variables, like)
    jn.tools.check_complete(jax.tree.map(np.asarray, variables), variables)
    assert said(lambda: jn.tools.check_complete({"params": variables["params"]}, like), ArgumentError) == (
        "jaxnorm.tools.check_complete: the checkpoint does not fit the model.\n"
        "  missing: batch_stats/bn/mean (4,), batch_stats/bn/var (4,)\n"
        "  Statistics alone can be measured anew: jaxnorm.tools.recalibrate."
    )
    other = {"params": {"bn": {"scale": X[0, :3], "beta": X[0]}}, "batch_stats": like["batch_stats"]}
    assert said(lambda: jn.tools.check_complete(other, like)) == (
        "jaxnorm.tools.check_complete: the checkpoint does not fit the model.\n"
        "  missing: params/bn/bias (4,)\n"
        "  not the model's: params/bn/beta (4,)\n"
        "  of another shape: params/bn/scale (3,), the model's is (4,)"
    )


def test_check_complete_across_containers():
    model = nnx.Sequential(jaxnorm.nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    saved = nnx.to_pure_dict(state)
    for like in (state, nnx.as_pure(state), nnx.eval_shape(lambda: nnx.state(model))):
        jn.tools.check_complete(saved, like)
    del saved["layers"][0]["var"]
    assert "missing: layers/0/var (4,)" in said(lambda: jn.tools.check_complete(saved, state))
