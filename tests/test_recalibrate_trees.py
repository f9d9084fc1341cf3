"""Recalibration in every kind of tree: what is written, what stays, what is said, and what is wrong."""

import sys

import flax.core
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
import jaxnorm.linen as jl
from jaxnorm.tools.recalibrate import recalibrate


def one_norm(**more):
    variables = {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2), **more}}
    return lambda v, x: {"bn": jn.moments(x, "n c", "n")}, variables


A, B = jnp.array([[1.0, 2.0], [3.0, 8.0]]), jnp.array([[8.0, 2.0]])
MEAN, VAR = np.array([4.0, 4.0]), np.array([26 / 3, 8.0])  # of 1 3 8 and of 2 8 2


def test_dtypes_types_and_unbiased():
    collect, variables = one_norm(scale=jnp.ones(2))
    variables = flax.core.freeze({"model": variables, "step": 7})
    variables = jax.tree.map(lambda z: z.astype(jnp.bfloat16) if isinstance(z, jax.Array) else z, variables)
    inner = lambda v, x: {"model/bn": collect(v, x)["bn"]}  # noqa: E731
    done, _ = recalibrate(inner, variables, [A, B], unbiased=True, progress=False)
    assert isinstance(done, flax.core.FrozenDict)
    assert done["step"] == 7
    assert {leaf.dtype for leaf in done["model"]["bn"].values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(np.asarray(done["model"]["bn"]["var"], np.float32), VAR * 3 / 2, rtol=2**-8)


def test_what_lay_nowhere_in_particular_stays_free():
    """Committed to one device it could not be used beside an array on a mesh."""
    collect, variables = one_norm()
    done, _ = recalibrate(collect, variables, [A, B], progress=False)
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    spread = jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("devices")))
    np.testing.assert_allclose(jax.jit(lambda m, x: x + m[None])(done["bn"]["mean"], spread), np.ones((8, 2)) + MEAN)


def test_complex_means_stay_complex():
    collect, variables = one_norm()
    done, _ = recalibrate(collect, variables, [jax.lax.complex(A, A), jax.lax.complex(B, B)], progress=False)
    np.testing.assert_allclose(done["bn"]["mean"], MEAN * (1 + 1j), rtol=1e-6)
    np.testing.assert_allclose(done["bn"]["var"], 2 * VAR, rtol=1e-6)


def test_training_goes_on_as_after_that_many_updates():
    norm = jl.BatchNorm(momentum=None)
    variables = norm.init(jax.random.key(0), A, True)
    collect = lambda v, x: norm.apply(v, x, True, mutable=["moments"])[1]  # noqa: E731  all of it; the norm is the root
    done, report = recalibrate(collect, variables, [A, B, A], progress=False)
    assert report.to_dict()["norm"] == [""]
    assert int(done["batch_stats"]["num_updates"]) == 3
    rows = np.concatenate([A, B, A])
    _, after = norm.apply(done, A, False, mutable=["batch_stats"])
    expected = 3 / 4 * rows.mean(0) + 1 / 4 * np.asarray(A).mean(0)
    np.testing.assert_allclose(after["batch_stats"]["mean"], expected, rtol=1e-6)


def test_torch_names():
    state = {"1.weight": np.ones(2), "1.running_mean": np.zeros(2), "1.running_var": np.ones(2)}
    state["1.num_batches_tracked"] = np.array(100)
    collect = lambda v, x: {"1": jn.moments(x, "n c", "n")}  # noqa: E731
    done, _ = recalibrate(collect, state, lambda: iter([A, B]), unbiased=True, progress=False)
    np.testing.assert_allclose(done["1.running_mean"], MEAN, rtol=1e-12)  # NumPy's float64 stays
    np.testing.assert_allclose(done["1.running_var"], VAR * 3 / 2, rtol=1e-12)
    assert done["1.num_batches_tracked"] == 2
    assert state["1.running_mean"].tolist() == [0, 0]


def test_haiku_goes_on_from_what_was_written():
    """Its state holds the average before it is debiased too: both belong together."""
    model = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, 0.9)(x, is_training=train))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, state = model.init(jax.random.key(0), A, train=True)
        for _ in range(3):
            _, state = model.apply(params, state, None, 5 * A, train=True)
    collect = lambda v, x: {"batch_norm": jn.moments(x, "n c", "n")}  # noqa: E731
    (_, done), _ = recalibrate(collect, (params, state), [A, B], progress=False)
    average = done["batch_norm/~/mean_ema"]["average"]
    np.testing.assert_allclose(average[0], MEAN, rtol=1e-6)
    np.testing.assert_allclose(done["batch_norm/~/var_ema"]["average"][0], VAR, rtol=1e-6)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _, after = model.apply(params, done, None, A, train=True)
    t = int(state["batch_norm/~/mean_ema"]["counter"])
    old = 0.9 * (1 - 0.9**t) / (1 - 0.9 ** (t + 1))  # the weight of the old debiased average in the next one
    expected = old * MEAN + (1 - old) * np.asarray(A).mean(0)
    np.testing.assert_allclose(after["batch_norm/~/mean_ema"]["average"][0], expected, rtol=1e-5)


def test_what_was_not_seen_stays_and_is_said():
    collect, variables = one_norm()
    stale = {"mean": jnp.array([5.0, 5.0]), "var": jnp.array([2.0, 2.0])}
    variables |= {"silent": stale, "empty": stale, "half": stale, "other": {"scale": jnp.ones(2)}}

    def partly(v, x):
        half = jn.moments(x, "n c", "n", mask=jnp.array([[True, False]]))
        return collect(v, x) | {"empty": jn.moments(x, "n c", "n", mask=False), "half": half}

    done, report = recalibrate(partly, variables, [A, B], progress=False)
    assert done["silent"]["mean"].tolist() == done["empty"]["mean"].tolist() == [5, 5]
    np.testing.assert_allclose(done["half"]["mean"], [4, 5])
    np.testing.assert_allclose(done["half"]["var"], [26 / 3, 2], rtol=1e-6)
    notes = dict(zip(report.to_dict()["norm"], report.to_dict()["note"], strict=True))
    assert notes["bn"] is None
    assert "2 of 2 channels" in notes["empty"]
    assert "1 of 2 channels" in notes["half"]
    assert "no moments" in notes["silent"]
    assert report.title.startswith("2 of 4 batch norms")
    moved = report.rows[0]
    np.testing.assert_allclose(moved["mean moved"], (MEAN / np.sqrt(VAR)).max(), rtol=1e-6)  # from 0, and var from 1
    np.testing.assert_allclose(moved["var times"], 26 / 3, rtol=1e-6)


def test_where():
    own = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
    collect = lambda v, x: dict.fromkeys(v, jn.moments(x, "n c", "n"))  # noqa: E731
    done, report = recalibrate(collect, {"a1": own, "a2": own, "b": own}, [A, B], where="a*", progress=False)
    assert report.to_dict()["norm"] == ["a1", "a2"]
    assert done["b"] == own
    np.testing.assert_allclose(done["a2"]["var"], VAR, rtol=1e-6)


def test_a_norm_called_twice_has_seen_both():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = jl.BatchNorm(use_running_average=True)
            return norm(x) + norm(10 * x)

    variables = Twice().init(jax.random.key(0), A)
    collect = lambda v, x: Twice().apply(v, x, mutable=["moments"])[1]["moments"]  # noqa: E731
    done, report = recalibrate(collect, variables, [A, B], progress=False)
    rows = np.concatenate([A, B, 10 * A, 10 * B]).astype(np.float64)
    np.testing.assert_allclose(done["batch_stats"]["BatchNorm_0"]["mean"], rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(done["batch_stats"]["BatchNorm_0"]["var"], rows.var(0), rtol=1e-6)
    assert report.to_dict()["count"] == [6]


def test_statistics_so_wrong_that_the_next_norm_overflows():
    def collect(v, x):
        first = jn.moments(x, "n c", "n")
        running = jn.RunningStats(v["a"]["mean"], v["a"]["var"], jnp.int32(0), ("c",))
        y = 1e10 * jn.normalize(x, running, "n c", epsilon=0.0)
        return {"a": first, "b": jn.moments(y, "n c", "n")}

    own = {"mean": jnp.zeros(2), "var": jnp.full(2, 1e-30)}
    with pytest.raises(ValueError, match="'b' sees in batch 0 of pass 1 is not finite"):
        recalibrate(collect, {"a": own, "b": own}, [A, B], passes=1, progress=False)
    done, report = recalibrate(collect, {"a": own, "b": own}, [A, B], progress=False)
    np.testing.assert_allclose(done["a"]["var"], VAR, rtol=1e-6)
    np.testing.assert_allclose(done["b"]["var"], np.full(2, 1e20), rtol=1e-5)
    np.testing.assert_allclose(done["b"]["mean"], np.zeros(2), atol=1e4)
    assert report.to_dict()["note"] == [None, None]


# --- the bar, and what is wrong


def test_progress(monkeypatch, capsys):
    collect, variables = one_norm()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    recalibrate(depends, {**variables, "other": variables["bn"]}, [A, B])
    seen = capsys.readouterr()
    assert "recalibrate, pass 2" in seen.err
    assert "4/4" in seen.err
    assert not seen.out
    recalibrate(collect, variables, [A, B], progress=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as if it were not installed
    recalibrate(collect, variables, [A, B])
    monkeypatch.undo()
    recalibrate(collect, variables, [A, B])  # into a pipe
    assert capsys.readouterr().err.strip() == ""


def depends(v, x):
    """On a statistic that changes: a second pass is needed."""
    return {"bn": jn.moments(x + v["bn"]["mean"][None], "n c", "n")}


def give(value):
    return lambda v, x: value


SEEN = jn.moments(A, "n c", "n")
NAN = jn.Moments(SEEN.count, jnp.full(2, jnp.nan), SEEN.m2, ("c",))
ERRORS = {
    "passes": ({"passes": 0}, "passes is a number from 1"),
    "iterator": ({"batches": iter([A]), "passes": 2}, "an iterator can be read once"),
    "no batch": ({"batches": []}, "there was no batch in pass 1"),
    "used up": ({"batches": (lambda rest: lambda: rest)(iter([A])), "collect": depends, "passes": 2},
                "there was no batch in pass 2"),
    "no norm": ({"variables": {"dense": {"kernel": A}}}, "no batch norm among the variables"),
    "pattern": ({"where": "bm"}, "matches no norm. Did you mean 'bn'"),
    "unknown": ({"collect": give({"bm": SEEN})}, "moments of 'bm', and there is no such batch norm. Did you mean 'bn'"),
    "twice": ({"collect": give({"bn": {"moments": SEEN}, "moments": {"bn": SEEN}})}, "moments of 'bn', twice"),
    "an array": ({"collect": give({"bn": {"mean": A}})}, "there is a .* at ['bn']['mean']"),
    "nothing": ({"collect": give({})}, "gave no moments at all"),
    "not finite": ({"collect": give({"bn": NAN})}, "'bn' sees in batch 0 of pass 1 is not finite"),
    "shape": ({"collect": give({"bn": jn.moments(jnp.ones((2, 3)), "n c", "n")})}, "shape (3,), and its mean has"),
    "per device": ({"collect": give({"bn": jn.moments(jnp.ones((3, 2, 2)), "d n c", "n")})}, "name these in `over`"),
    "other shapes": ({"collect": lambda v, x: {"bn": jn.moments(x, "n c", "n" if len(x) > 1 else "c")}},
                     "batch 1 of pass 1 gave moments of other norms or shapes"),
    "unbiased": ({"batches": [B], "unbiased": True}, "the count of 'bn' is not above 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    given, message = ERRORS[case]
    collect, variables = one_norm()
    arguments = {"collect": collect, "variables": variables, "batches": [A, B], "progress": False, **given}
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")) as error:
        recalibrate(**arguments)
    assert str(error.value).startswith("jaxnorm.tools.recalibrate: ")
